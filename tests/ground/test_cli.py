"""What the commands share: flags from a dataclass, help that says the defaults, errors in one line."""

import resource
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

from lavender_min import cli


@dataclass
class Flags:
    data: str = cli.required("which data set", {"toy": 1, "real": 2})
    steps: int = cli.flag(0, "how many")
    rate: float | None = cli.flag(None, "how fast (default: as it comes)")
    sides: list[int] = cli.flag([8, 4], "which sides", metavar="SIDE")
    quick: bool = cli.flag(False, "whether to hurry")

    def __post_init__(self):
        cli.at_least(0, steps=self.steps)


ABOUT = """What it does:

    two lines,   as they stand
"""


def parse(*argv):
    return cli.parse(Flags, "some.py", ABOUT, argv)


def test_the_command_line_fills_the_dataclass():
    assert parse("--data", "toy") == Flags("toy", 0, None, [8, 4], False)
    found = parse("--data", "real", "--steps", "3", "--rate", "1e-3", "--sides", "16", "32", "--quick")
    assert found == Flags("real", 3, 1e-3, [16, 32], True)


def test_a_list_is_not_shared_between_two_runs():
    parse("--data", "toy").sides.append(2)
    Flags("toy").sides.append(2)
    assert parse("--data", "toy").sides == Flags("toy").sides == [8, 4]


def test_help_shows_the_description_as_it_is_and_each_default_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and ABOUT in out
    said = " ".join(out.split())
    assert "how many (default: 0)" in said and "which sides (default: [8, 4])" in said
    assert said.count("default: as it comes)") == 1 and said.count("(default") == 3
    assert "--data {toy,real} which data set" in said


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: --data"),
        (["--data", "other"], "argument --data: invalid choice: 'other' (choose from"),
        (["--data", "toy", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
        # No abbreviations: what is misspelt is an error.
        (["--data", "toy", "--step", "1"], "there is no flag --step"),
        (["--data", "toy", "--steps", "-1"], "--steps must be a whole number of at least 0; got -1"),
        (["--data", "toy", "--sides"], "argument --sides: expected at least one argument"),
        (["--data", "toy", "--steps", "1\n2"], r"argument --steps: invalid int value: '1\n2'"),
        (["--data", "a\nb"], r"argument --data: invalid choice: 'a\nb'"),
        # argparse would give an empty list.
        (["--data=--"], "argument --data: expected a value; got '--'"),
        (["--data", "toy", "--steps=--"], "argument --steps: expected a value; got '--'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, argv, message):
    try:
        code = cli.run("some.py", lambda: print(parse(*argv)))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("some.py: ") and message in err and err.count("\n") == 1


def test_flags_are_not_read_from_a_file_beside_the_script(tmp_path, monkeypatch):
    (tmp_path / "some.args").write_text("--steps 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "some.py")])
    assert parse("--data", "toy").steps == 0


def test_run_gives_the_exit_code_and_one_line_for_what_the_user_can_mend(capsys):
    assert cli.run("some.py", lambda: None) == 0 and cli.run("some.py", lambda: 130) == 130

    def fails(error):
        raise error

    for error in (ValueError("two\n  lines"), FileNotFoundError("two lines")):
        assert cli.run("some.py", lambda error=error: fails(error)) == 2
        assert capsys.readouterr().err == "some.py: two lines\n"
    assert cli.run("some.py", lambda: fails(MemoryError())) == 2
    assert capsys.readouterr().err == "some.py: the memory of this machine is full\n"
    # Anything else is a mistake of ours.
    assert cli.run("some.py", lambda: fails(KeyError("x"))) == 1
    assert "this is a bug in lavender-min (KeyError: 'x')" in capsys.readouterr().err


def test_at_least_passes_what_is_not_given():
    cli.at_least(1, limit=None, steps=1)
    with pytest.raises(ValueError, match="--draws must be a whole number of at least 2; got 1"):
        cli.at_least(2, limit=2, draws=1)


@pytest.mark.parametrize("value", [-0.1, 1, float("nan"), float("inf")])
def test_between_refuses_what_lies_outside_and_what_is_no_number(value):
    cli.between(0, 1, dropout=None, beta=0, other=0.99)
    with pytest.raises(ValueError, match=f"--dropout must be at least 0 and below 1; got {value}"):
        cli.between(0, 1, dropout=value)
    if value != 1:
        with pytest.raises(ValueError, match=f"--rate must be a finite number of at least 0; got {value}"):
            cli.between(0, float("inf"), rate=value)


@pytest.mark.parametrize(
    ("stage", "arguments", "code"),
    [
        ("teachers", ["--help"], 0),
        ("teachers", ["--data", "flickr30k"], 2),
        ("teachers", ["--data", "x"], 2),
        ("tuning", ["--help"], 0),
        ("tuning", ["--qlora"], 2),
        ("tuning", ["--data", "toy", "--maps", "nowhere"], 2),
        ("tuning", ["--data", "toy", "--learning_rat", "1"], 2),
        ("evaluation", ["--help"], 0),
        ("evaluation", ["--data", "flickr30k"], 2),
    ],
)
def test_help_and_missing_data_take_under_three_seconds_and_no_torch(tmp_path, stage, arguments, code):
    script = f"""
import sys
from lavender_min.{stage}.command import main
try:
    code = main({arguments})
except SystemExit as stop:
    code = stop.code
assert code == {code}, code
assert not {{"torch", "diffusers", "accelerate"}} & set(sys.modules)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
