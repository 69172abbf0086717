"""What the README says can be done, can be done: its commands exist, the cheap ones run, its files are there."""

import re
import shlex

import pytest
from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]


def test_there_are_commands_to_test():
    assert ["make", "demo"] in COMMANDS and ["python", "train.py", "--qlora"] in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_make_targets_exist(command):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(command[1:]) <= set(targets)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "python" and "--plan" not in c], ids=" ".join)
def test_real_commands_end_in_one_line_without_data_or_network(command):
    """Here they cannot run; what they must not do is fail with a traceback, or after a download has begun."""
    done = run_script(*command[1:])
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    if command[1] in ("extract.py", "train.py"):
        assert last.startswith(command[1]) and "--data toy" in last
    else:  # they ask for the results of those
        assert any(f"{word}: " in last for word in (command[1], command[2].split(".")[-1], command[2]))


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "--plan" in c], ids=" ".join)
def test_plans_need_nothing(command):
    done = run_script(*command[1:])
    assert done.returncode == 0 and "peak" in done.stdout, done.stderr


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_examples_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})


def test_files_and_links_are_there():
    rows = re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", README, re.M)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(named) > 15 and links
    for name in named + links:
        assert (ROOT / name).exists(), name
    modules = {p.name for p in (ROOT / "lavender_min").glob("*.py")} - {"__init__.py"}
    assert modules <= {name.removeprefix("lavender_min/") for name in named}
