"""What the README says can be done, can be done: its commands exist, the cheap ones run, its files are there."""

import ast
import re
import shlex
from typing import NamedTuple

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


class Entry(NamedTuple):
    """A file or folder of the README's tree, and whether it is bold: on the core path."""

    path: str
    bold: bool


def tree() -> list[Entry]:
    """Each line names one or more files, then says what they are; what is indented lies in the folder above it."""
    (drawn,) = re.findall(r"<pre>\n(.*?)</pre>", README, re.S)
    entries: list[Entry] = []
    folders: list[str] = []
    for line in drawn.splitlines():
        indent, bold, names = re.match(r"( *)(<b>)?([\w./]+(?:, [\w./]+)*)(?:</b>)?(?:  |$)", line).groups()
        del folders[len(indent) // 2 :]
        entries += [Entry("".join(folders) + name, bool(bold)) for name in names.split(", ")]
        if names.endswith("/"):
            folders.append(names)
    return entries


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
    else:
        # They want the results of those.
        assert any(f"{word}: " in last for word in (command[1], command[2].split(".")[-1], command[2]))


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "--plan" in c], ids=" ".join)
def test_plans_need_nothing(command):
    done = run_script(*command[1:])
    assert done.returncode == 0 and "peak" in done.stdout, done.stderr


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_examples_run_and_print_what_they_say(code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    says = [line.removeprefix("# → ") for line in code.splitlines() if line.startswith("# → ")]
    assert says and capsys.readouterr().out.splitlines() == says


def test_the_tree_holds_every_module_and_nothing_else():
    named = [entry.path for entry in tree()]
    for name in named:
        assert (ROOT / name).exists(), name
    assert len(named) == len(set(named))
    folders = [ROOT, ROOT / "kernels", *(ROOT / "lavender_min").rglob("*/"), ROOT / "lavender_min"]
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        if folder != ROOT / "lavender_min" / "kernels"
        for path in folder.glob("*.py")
        if path.name != "__init__.py"
    }
    assert len(modules) > 60 and modules <= set(named), modules - set(named)


def test_links_lead_somewhere():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 4
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_papers_table_names_what_there_is():
    """A file of the package, and a function or class in it."""
    pairs = re.findall(r"`([\w/]+\.py)` `(\w+)`", README)
    assert len(pairs) > 12
    for file, name in pairs:
        body = ast.walk(ast.parse((ROOT / "lavender_min" / file).read_text()))
        assert name in {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}, (file, name)
