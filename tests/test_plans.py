"""The README's table of which card fits which host is what the planner computes."""

import os
import re
import subprocess

import pytest
from conftest import ROOT

from lavender_min.hosts import published
from lavender_min.hosts.load import family_of
from lavender_min.hosts.mllama import Mllama

SCRIPT = ROOT / "experiments" / "plans.sh"
BEGIN, END = "<!-- planned: printed by `sh experiments/plans.sh` -->\n", "<!-- /planned -->"
TABLE = (ROOT / "README.md").read_text().split(BEGIN)[1].split(END)[0].splitlines()
ROWS = {line.split("|")[1].strip(): line for line in TABLE[2:]}


def test_the_table_has_a_row_for_each_model_of_the_script():
    named = re.findall(r"\S+/\S+", SCRIPT.read_text().split("set -- ")[1].split("\n\n")[0])
    assert list(ROWS) == named and len(named) > 10


@pytest.mark.parametrize("name", ROWS)
def test_a_published_name_is_enough_to_find_its_family(name):
    """No flag says what kind of model it is."""
    config = Mllama("mllama").config(name) or published.config(name)
    assert family_of(name, config.model_type).name == config.model_type


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_planner_says(name):
    done = subprocess.run(
        ["sh", SCRIPT, name], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.splitlines() == [*TABLE[:2], ROWS[name]], done.stderr
