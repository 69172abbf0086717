"""The pages of docs/ do what they say: their code runs in order, and prints what stands below it. The same for experiments/."""

import contextlib
import io
import re
import subprocess
import sys
import types
from decimal import Decimal

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_readme import README, tree

from lavender_min import data, hosts, teachers
from lavender_min.align import AGGREGATIONS, aggregate

DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
# Pages without code.
TABLES = ("released.md",)
# What a page may add rows to.
REGISTRIES = (data.SOURCES, hosts.FAMILIES, teachers.RECIPES, AGGREGATIONS, aggregate.POOLS)
# Of a line of output: what a block prints stands below it behind this.
MARK = "# → "
# Of the core path, blank lines not counted.
MOST_LINES = 3000
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?"


@pytest.fixture(autouse=True)
def restored():
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, rows in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(rows)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


def shown(block: str) -> list[str]:
    return [line.removeprefix(MARK) for line in block.splitlines() if line.startswith(MARK)]


def same(expected: str, printed: str) -> bool:
    """The same words and whole numbers; other numbers may differ by one in the last digit that is shown."""
    pairs = list(zip(re.findall(NUMBER, expected), re.findall(NUMBER, printed), strict=False))
    near = all(abs(Decimal(a) - Decimal(b)) <= (Decimal(a).as_tuple().exponent < 0) * unit(a) for a, b in pairs)
    return re.split(NUMBER, expected) == re.split(NUMBER, printed) and near


def unit(number: str) -> Decimal:
    return Decimal(1).scaleb(int(Decimal(number).as_tuple().exponent))


@pytest.mark.parametrize(
    ("expected", "printed", "alike"),
    [
        ("[12, 4] True", "[12, 4] True", True),
        ("[12, 4] True", "[13, 4] True", False),
        ("[12, 4] True", "[12, 4] False", False),
        ("loss 0.31", "loss 0.32", True),
        ("loss 0.31", "loss 0.33", False),
        ("2e-05", "3e-05", True),
        ("2e-05", "2e-04", False),
        ("a 1", "a 1 2", False),
    ],
)
def test_output_is_compared(expected, printed, alike):
    assert same(expected, printed) is alike


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TABLES])
def test_pages_run_and_print_what_they_say(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(page.removesuffix(".md"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    lines = 0
    for block in blocks(page):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, page, "exec"), module.__dict__)
        printed = out.getvalue().splitlines()
        expected = shown(block)
        lines += len(expected)
        differ = [pair for pair in zip(expected, printed, strict=False) if not same(*pair)]
        assert len(printed) == len(expected) and not differ, f"{page} says\n{expected}\nand the block prints\n{printed}"
    assert lines > 4
    for made in tmp_path.glob("*.png"):
        assert_alike(made, DOCS / made.name)


def assert_alike(made, kept):
    """A picture of the repository is the one that its page draws, but for the last bits."""
    with Image.open(made) as a, Image.open(kept) as b:
        assert a.size == b.size, kept
        apart = np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float))
    assert apart.mean() < 2, f"{kept} is not what the page draws: off by {apart.mean():.1f} of 255"
    assert kept.stat().st_size < 150_000


def test_the_word_is_followed_with_a_picture():
    assert {"one_word.md", "extending.md"} <= set(PAGES)
    assert "](one_word.png)" in (DOCS / "one_word.md").read_text() and (DOCS / "one_word.png").exists()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    """Paths in the text are those of the repository, or of the package."""
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(), flags=re.S | re.M)
    named = re.findall(r"`([\w/]+\.(?:py|md|sh))(?:::\w+)?`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert named and links
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "lavender_min" / name).exists(), name
    for link in links:
        assert (DOCS / link).exists(), link


def test_the_core_path_is_read_in_one_sitting():
    core = [entry.path for entry in tree() if entry.bold]
    assert len(core) > 20 and f"{MOST_LINES:,} lines" in README
    lines = {path: sum(1 for line in (ROOT / path).read_text().splitlines() if line.strip()) for path in core}
    assert sum(lines.values()) < MOST_LINES, lines


def test_the_log_goes_from_new_to_old():
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)", (ROOT / "experiments" / "LOG.md").read_text(), re.M)
    assert len(dates) > 3 and dates == sorted(dates, reverse=True)


def test_the_shared_flags_stand_once():
    """demo.sh and seeds.sh take the flags of the tuning and of the maps from flags.sh, and repeat none of them."""
    folder = ROOT / "experiments"
    flags = set(re.findall(r"--\w+", (folder / "flags.sh").read_text()))
    assert len(flags) > 12
    for script in ("demo.sh", "seeds.sh"):
        text = (folder / script).read_text()
        assert "\n. experiments/flags.sh\n" in text and "$TUNING" in text and "$MAPS" in text
        assert not flags & set(re.findall(r"--\w+", text)), script
        assert subprocess.run(["sh", "-n", folder / script]).returncode == 0


def test_every_row_about_the_released_code_names_a_test_that_is_there():
    page = (ROOT / "docs" / "released.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 9
    for row in rows:
        [named] = re.findall(r"`(tests/\S+\.py)::(test_\w+)` \|$", row)
        assert f"def {named[1]}(" in (ROOT / named[0]).read_text(encoding="utf-8")
