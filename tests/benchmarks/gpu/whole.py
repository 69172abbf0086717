"""The whole way on the toy world: the commands of experiments/demo.sh on the device, and a few of their steps beside a CPU's.

First the short way, in two processes at once, of which one sees no GPU: maps of a few pictures, then a few steps of plain and of
Lavender tuning. All is in fp32, so that only the device differs: the first losses must agree, later ones drift apart by rounding.
Then the demo as it stands, with the numbers and the optimiser that a GPU gets; in small only the short way.
"""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu.record import Record

ROOT = Path(__file__).resolve().parents[3]
# share by which the first losses may differ
ALIKE = 0.01
RUNS = ("direct-0", "lavender-0", "plain-0")
# Writes down what it was called with instead of running it: one argument a unit separator, one call a line. In one write, because
# several may be called at once.
STUB = """#!/bin/sh
call=$(for word in "$@"; do printf '%s\\037' "$word"; done)
printf '%s\\n' "$call" >> "$COMMANDS"
"""
EXACT = ["--bf16", "false", "--fp16", "false", "--optim", "adamw_torch", "--lora_dropout", "0", "--logging_steps", "1"]


def demo_commands(out: str) -> list[list[str]]:
    """What `experiments/demo.sh` would run with its results in `out`, without running it: a copy of it finds another python.

    Its trainings run at once, so that only their names have an order.
    """
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / ".venv/bin/python"
        stub.parent.mkdir(parents=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
        shutil.copytree(ROOT / "experiments", Path(folder) / "experiments")
        env = {**os.environ, "OUT": out, "COMMANDS": f"{folder}/commands"}
        subprocess.run(["sh", f"{folder}/experiments/demo.sh"], env=env, check=True, capture_output=True)
        first, *tuning, last = (line.split("\037")[:-1] for line in Path(f"{folder}/commands").read_text().splitlines())
        return [first, *sorted(tuning), last]


def shortened(commands: Sequence[list[str]], steps: int, batch: int) -> list[list[str]]:
    """The same for a few pictures and steps; of two flags of one name the last counts.

    The maps that the report needs are made by a command of their own, since the report would start another process for them.
    """
    pictures = str(2 * steps * batch)
    more = {
        "extract.py": ["--limit", pictures, "--dtype", "fp32"],
        "train.py": [
            *("--limit", pictures, "--max_steps", str(steps), "--per_device_train_batch_size", str(batch)),
            *("--save_strategy", "no", *EXACT),
        ],
        "evaluate.py": ["--scenes", "1", "--extract", ""],
    }
    *tuning, report = [command + more[command[0]] for command in commands]
    return [*tuning, tuning[0] + ["--split", "heldout", "--limit", "8", "--maps", "maps/toy-heldout"], report]


def in_turn(commands: list[list[str]], times: str) -> None:
    """In a process of its own: the scripts one after the other, as a user calls them, so that they share the time to import."""
    seconds: dict[str, float] = {}
    for command in commands:
        name = "train.py --plain" if command[0] == "train.py" and "--plain" in command else command[0]
        began = time.perf_counter()
        sys.argv = [str(ROOT / command[0]), *command[1:]]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{name} ended with status {end.code}") from None
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        Path(times).write_text(json.dumps(seconds))


def start(commands: list[list[str]], folder: Path, hide_gpu: bool = False) -> subprocess.Popen:
    folder.mkdir(parents=True)
    code = f"import sys; sys.path[:] = {sys.path!r}; from gpu.whole import in_turn; in_turn({commands!r}, 'times.json')"
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})}
    # What it prints goes to the log, as its errors do.
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, stdout=sys.stderr)


def finish(process: subprocess.Popen, folder: Path, what: str) -> dict[str, float]:
    """The seconds of each command."""
    if process.wait():
        raise RuntimeError(f"{what} ended with status {process.returncode}: see log.txt")
    return json.loads((folder / "times.json").read_text())


def losses(folder: Path, name: str = "loss") -> list[float]:
    """As the Trainer logged them."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def run(record: Record) -> None:
    missing = [name for name in ("pyarrow", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        record.add("demo", skipped=f"{' and '.join(missing)} not installed")
        return
    demo = demo_commands("out")
    short = shortened(demo, *((2, 2) if record.tiny else (8, 16)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        device, cpu, full = (Path(folder) / name for name in ("device", "cpu", "full"))
        both = [start(short, device), start(short[:-2], cpu, hide_gpu=True)]
        with record.trying("a few steps"):
            record.add("a few steps", **finish(both[0], device, "the device's"))
            finish(both[1], cpu, "the CPU's")
            for name in RUNS:
                compare(record, name, *(losses(place / "out" / name) for place in (device, cpu)))
        if record.tiny:
            return
        with record.trying("demo"):
            seconds = finish(start(demo, full), full, "the demo")
            last = {f"{name} loss": losses(full / "out" / name)[-1] for name in RUNS}
            record.add("demo", **seconds, **last)


def compare(record: Record, name: str, device: list[float], cpu: list[float]) -> None:
    apart = [abs(x - y) / abs(y) for x, y in zip(device, cpu, strict=True)]
    what = f"{name}, device and CPU"
    record.add(what, first_apart=apart[0], most_apart=max(apart), steps=len(apart), last_loss=device[-1])
    if not apart[0] <= ALIKE:
        record.fail(what, f"the first losses are {device[0]:.4f} and {cpu[0]:.4f}")
