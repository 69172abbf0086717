"""Made-up bad input: whatever is wrong with flags, data, pictures, maps, runs or models, a command answers well.

LAVENDER_MADE_UP=1000 tries so many cases, LAVENDER_MADE_UP_SEED=7 others. A case is a pure function of its seed and number, so
one that failed is tried alone with `-k "[17]"`. What answering well means stands in `judge`.
"""

import contextlib
import faulthandler
import hashlib
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cases
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_sd import build_tiny_sd

from lavender_min.evaluation import command as evaluation
from lavender_min.evaluation import localise, own_picture
from lavender_min.maps import MapStore
from lavender_min.maps import __main__ as of_maps
from lavender_min.teachers import command as teachers
from lavender_min.toy import data as toy
from lavender_min.toy.models import VLM_FOLDER
from lavender_min.tuning import command as tuning
from lavender_min.tuning import export

COUNT = int(os.environ.get("LAVENDER_MADE_UP", "200"))
SEED = int(os.environ.get("LAVENDER_MADE_UP_SEED", "0"))
SECONDS = 60
# A file that claims to need more is to be refused, not to fill the machine.
BYTES = 6 * 2**30

# Command ─► what runs it, and how its lines on stderr begin.
COMMANDS = {
    "extract": (teachers.main, "extract.py: "),
    "train": (tuning.main, "train.py: "),
    "evaluate": (evaluation.main, "evaluate.py: "),
    "maps": (of_maps.main, "python -m lavender_min.maps"),
    "localise": (localise.main, "localise: "),
    "export": (export.main, "export: "),
}
# A line on the screen that says something was left out, or is odd.
SAID = re.compile(r"[1-9]\d* skipped|could not be read|made again|stand in|holds this run|is the end of this run")


class Hang(BaseException):
    """No command catches this."""


class Outcome(NamedTuple):
    code: int | str | None
    out: str
    err: str
    # What the command wrote, in a form that can be compared.
    result: dict[str, object]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with `pristine`, the world with nothing wrong in it. Each case has its copy at the same place, `world`."""
    home = tmp_path_factory.mktemp("made_up")
    world = home / "world"
    world.mkdir()
    captions = {example.picture: example for example in toy.load("tune", 100) if not example.question}
    cases.write_data(world, list(captions.values())[:4])
    build_tiny_sd(world / "sd")
    shutil.copytree(VLM_FOLDER, world / "vlm")
    for done in (
        run(world, "extract", [*cases.EXTRACT, "--maps", "maps"], "maps"),
        run(world, "train", [*cases.GO_ON, "--max_steps", "1"], "run"),
    ):
        assert done.code == 0, done.err
    world.rename(home / "pristine")
    return home


@pytest.fixture(scope="session")
def unchanged():
    """What each command gives where nothing is wrong: (command, argv) ─► Outcome, filled as it is needed."""
    return {}


def run(world: Path, command: str, argv: list[str], writes: str) -> Outcome:
    """A command inside `world`, in this process."""
    main, _ = COMMANDS[command]
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    handler = signal.signal(signal.SIGALRM, hang)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
    signal.alarm(SECONDS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        os.chdir(world)
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1][1]))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(argv)
            except SystemExit as stop:
                code = stop.code
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before[0])
        resource.setrlimit(resource.RLIMIT_AS, before[1])
    return Outcome(code, out.getvalue(), said_on(err.getvalue()), result_of(world, writes) if code in (0, None) else {})


def hang(*_: object) -> None:
    raise Hang(f"at work for over {SECONDS} s")


def said_on(err: str) -> str:
    """What stands on the screen when progress bars have been written over."""
    lines = [line.rsplit("\r", 1)[-1] for line in err.splitlines()]
    return "\n".join(line for line in lines if line.strip() and not re.search(r"\d+%\|.*\|.*\[|\[\d\d:\d\d", line))


def result_of(world: Path, writes: str) -> dict[str, object]:
    """What a command has written, which must be sound: maps are probabilities, weights and reports are finite."""
    out, found = world / writes, {}
    # A store that is added to may hold what was broken before; who reads it is told.
    if writes == cases.OUT and (out / "recipe.json").exists():
        store = MapStore(out)
        for id in store:
            of = store[id]
            assert ((of.maps >= 0) & (of.maps <= 1)).all(), f"the maps of {id} are not between 0 and 1"
            found[id] = of.maps.numpy().tobytes(), of.question, of.answer
    for file in sorted(out.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all(), f"{file.name}: {name} is not finite"
            found[f"{file.name} {name}"] = tensor.float().numpy().tobytes()
    for file in sorted(out.glob("*.json")):
        json.loads(file.read_text(), parse_constant=partial(not_finite, file))
    return found


def not_finite(file: Path, constant: str) -> None:
    raise AssertionError(f"{file.name} holds {constant}")


def digests(world: Path) -> dict[str, str]:
    files = [path for path in world.rglob("*") if path.is_file()]
    return {str(path.relative_to(world)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def judge(case: cases.Case, outcome: Outcome, usual: Outcome, before: dict[str, str], after: dict[str, str]) -> None:
    """Raises AssertionError if a command did not answer well."""
    code, out, err, result = outcome
    begins = COMMANDS[case.command][1]
    assert "Traceback" not in err and "Traceback" not in out, err
    # `maps check` leaves with 1 where something is wrong with a store.
    fine = (0, None, 1, 2) if case.command == "maps" else (0, None, 2)
    assert code in fine and "this is a bug" not in err, f"exit code {code}: {err[-1500:]}"
    if code == 2:
        lines = err.splitlines()
        assert lines and lines[-1].startswith(begins), f"the last line does not begin with {begins!r}: {err[-1500:]}"
        assert sum(line.startswith(begins) for line in lines) == 1, err
        assert len(lines[-1]) < 1500, f"a line of {len(lines[-1])} characters: {lines[-1]}"
        text = lines[-1].removeprefix(begins)
        given = [word for word in case.argv if len(word) > 1 and not word.startswith("--")]
        named = re.search(r"--\w|/|\.\w{2,}|argument", text) or any(word[:50] in text for word in given)
        assert named, f"names no file and no flag: {lines[-1]}"
    else:
        assert not case.refused, f"accepted: {out[-500:]} {err[-500:]}"
        if case.change.strict and code in (0, None):
            noticed = SAID.search(out) or err not in ("", usual.err)
            assert noticed or result == usual.result, f"another result, and not a word: {out[-800:]}"
    lost = [name for name in before if not name.startswith(f"{case.writes}/") and after.get(name) != before[name]]
    if code == 2:
        kept = [name for name in before if name.endswith((".safetensors", ".parquet"))]
        lost += [name for name in kept if after.get(name) != before[name]]
    assert not lost, f"changed or gone: {lost}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT))
def test_made_up_input_is_answered(number, home, unchanged, monkeypatch):
    monkeypatch.setattr(own_picture, "LONGEST", 9)
    pristine, world = home / "pristine", home / "world"
    # Left by a case that could not be drawn.
    shutil.rmtree(world, ignore_errors=True)
    case = cases.draw(SEED, number, pristine, world)
    key = case.command, *case.argv
    if case.change.strict and key not in unchanged:
        whole = home / "whole"
        world.rename(whole)
        shutil.copytree(pristine, world)
        unchanged[key] = run(world, case.command, case.argv, case.writes)
        shutil.rmtree(world)
        whole.rename(world)
    before = digests(world)
    try:
        outcome = run(world, case.command, case.argv, case.writes)
        print(f"{number} {case.command} {case.change.what} ─► {outcome.code} {outcome.err[-300:]}")
        judge(case, outcome, unchanged.get(key, outcome), before, digests(world))
    except (Exception, Hang) as error:
        pytest.fail(
            f"case {number} of seed {SEED}: {case.change.what}\n{case.command} {shlex.join(case.argv)}\n"
            f"{type(error).__name__}: {error}\n"
            f'again: LAVENDER_MADE_UP={number + 1} LAVENDER_MADE_UP_SEED={SEED} pytest -m slow tests/made_up -k "[{number}]"'
        )
    finally:
        shutil.rmtree(world)


GOOD = Outcome(2, "", "extract.py: --limit must be a whole number", {})
CASE = cases.Case("extract", ["--limit", "x"], cases.Change("a limit", strict=True))


@pytest.mark.parametrize(
    "outcome, after, wrong",
    [
        (GOOD, {"a.png": "1"}, None),
        (GOOD._replace(code=1), {"a.png": "1"}, "exit code 1"),
        (GOOD._replace(err=""), {"a.png": "1"}, "does not begin with"),
        (GOOD._replace(err=GOOD.err + "\nmore"), {"a.png": "1"}, "does not begin with"),
        (GOOD._replace(err="extract.py: one\n" + GOOD.err), {"a.png": "1"}, "extract.py: one"),
        (GOOD._replace(err="extract.py: Expecting value"), {"a.png": "1"}, "names no file"),
        (GOOD._replace(err="Traceback\n" + GOOD.err), {"a.png": "1"}, "Traceback"),
        (GOOD, {"a.png": "2"}, "changed or gone"),
        (GOOD, {}, "changed or gone"),
        (Outcome(0, "1 skipped", "", {"a": 1}), {"a.png": "1"}, None),
        (Outcome(0, "0 skipped", "", {"a": 1}), {"a.png": "1"}, "not a word"),
    ],
)
def test_the_judge_sees_what_is_wrong(outcome, after, wrong):
    usual = Outcome(0, "0 skipped", "", {"a": 2})
    with pytest.raises(AssertionError, match=wrong) if wrong else contextlib.nullcontext():
        judge(CASE, outcome, usual, {"a.png": "1"}, after)
