"""The runs: each is trained and measured, its result is written down as one file, and its weights are thrown away.

    OUT/results/<digest>.json          the numbers of a finished run, and what it was
    OUT/results/<digest>.safetensors   its maps of a few words, for the figures
    OUT/tuning/<digest>                the training of a run that is at work, or was stopped: train.py goes on with it
    OUT/locks/<digest>.lock            held by the process that works on the run
    OUT/vision/<host>                  what the host's frozen vision tower makes of each picture, for all runs
    OUT/maps/<store>                   the maps (stores.py)
    OUT/parts/<host>                   a host taken apart (parts.py)

A result is written aside and renamed, so it is whole or not there. Any number of processes may share the folder OUT, whenever they
are started. A run belongs to the process that holds its lock, and the system frees the lock when that process ends, even if killed.
"""

import fcntl
import functools
import gc
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lavender_min.failing import read_json, say
from lavender_min.ledger import plan as planning
from lavender_min.ledger import stores
from lavender_min.ledger.declared import Claim, Setup
from lavender_min.ledger.plan import Run

# Seconds to wait before looking again, while other processes work on all runs that are missing.
PATIENCE = 5
# The folder that the package lies in.
ROOT = Path(__file__).parents[2]


class Ledger(NamedTuple):
    """The folder OUT, and the declarations whose runs it holds."""

    out: Path
    setup: Setup
    claims: Sequence[Claim]

    def file(self, run: Run) -> Path:
        """Where a run's result stands, once it is finished."""
        return self.out / "results" / f"{run.digest}.json"

    def result(self, run: Run) -> dict[str, Any] | None:
        """The content of a run's `file`; None if it is not there yet."""
        return read_json(self.file(run), dict) if self.file(run).exists() else None

    def files(self, host: str, arms: Sequence[str]) -> dict[str, list[Path]]:
        """{arm: the files of its results, by seed}. An arm without any is left out; all others have the same first seeds."""
        best, found = planning.best_of(self.setup, self.result), dict[str, list[Path]]()
        for arm in arms:
            choice = self.setup.arms[arm].choice
            chosen = best(choice, host) if choice else {}
            if chosen is not None:
                of = [self.file(planning.run_of(self.setup, arm, host, seed, chosen)) for seed in self.setup.seeds]
                if there := list(itertools.takewhile(Path.exists, of)):
                    found[arm] = there
        shared = min(map(len, found.values()), default=0)
        return {arm: of[:shared] for arm, of in found.items()}

    def numbers(self, host: str, arms: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """{arm: the numbers in these files, by seed}"""
        found = self.files(host, arms)
        return {arm: [read_json(file, dict)["measures"] for file in of] for arm, of in found.items()}

    def known_plan(self) -> planning.Plan:
        """The runs of all arms whose choices are made, and all trials."""
        return planning.plan(self.setup, self.claims, planning.best_of(self.setup, self.result))

    def whole_plan(self) -> planning.Plan:
        """The runs of all arms. Where a choice is not made yet, its first trial stands in for the best."""
        best, first = planning.best_of(self.setup, self.result), planning.first_trial(self.setup)
        return planning.plan(self.setup, self.claims, lambda choice, host: best(choice, host) or first(choice, host))


def forecast(ledger: Ledger, processes: int) -> str:
    """A line: how many runs are missing, and how long they take by the declared pace."""
    runs = ledger.whole_plan().runs.values()
    left = [run for run in runs if not ledger.file(run).exists()]
    hours = sum(planning.seconds(ledger.setup, run) for run in left) / 3600
    shared = f", {hours / processes:.1f} in {processes} processes" if processes > 1 else ""
    return f"{len(left)} of {len(runs)} runs are to be made, about {hours:.1f} hours of one core{shared}"


def work(ledger: Ledger) -> None:
    """Makes runs that are missing, until none is. Runs that other processes work on are left to them."""
    commit()
    while True:
        current = ledger.known_plan()
        missing = [run for run in current.runs.values() if not ledger.file(run).exists()]
        if not missing and not current.waiting:
            return
        # A list, because `any` of a generator would stop at the first run that was taken.
        if not any([take(ledger, run) for run in missing]):
            time.sleep(PATIENCE)


def take(ledger: Ledger, run: Run) -> bool:
    """Makes one run, unless it is finished or another process works on it. Returns whether it made it."""
    with held(ledger.out / "locks" / f"{run.digest}.lock") as mine:
        # Another process may have finished it a moment ago.
        if not mine or ledger.file(run).exists():
            return False
        began = time.time()
        make(ledger, run)
    numbers = read_json(ledger.file(run), dict)["measures"]
    right = [value for name, value in numbers.items() if name.endswith("/answers.all")]
    shown = f", {100 * right[0]:.1f} % of the answers right" if right else ""
    say(f"{run.name}: {time.time() - began:.0f} s{shown}; {forecast(ledger, 1)}")
    return True


@contextmanager
def held(file: Path) -> Iterator[bool]:
    """Tries to lock a file while the `with` lasts, and gives whether it could. The file says who holds it, for people to read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield True


def make(ledger: Ledger, run: Run) -> None:
    """Trains and measures a run, writes its result, and removes its weights.

    Raises ValueError if a training ends with an error, SystemExit if it was told to stop.
    """
    # Imported here because they are slow to import, and `plan` needs neither.
    from safetensors.torch import save_file

    from lavender_min.ledger import measures

    folder, file, began = ledger.out / "tuning" / run.digest, ledger.file(run), time.time()
    trained = train(ledger, run, folder)
    trained_for = time.time() - began
    store = stores.folder(ledger.out, run.mapped, "sd") if run.mapped else None
    parts = parts_folder(ledger, run) if any(planning.ASSEMBLE in stage for stage in run.stages) else None
    found = measures.of_run(run, store, trained, parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    if found.shown:
        save_file({name: maps.half().contiguous() for name, maps in found.shown.items()}, aside)
        os.replace(aside, file.with_suffix(".safetensors"))
    result = {
        "run": run._asdict(),
        "commit": commit(),
        "measures": found.numbers,
        "extents": found.extents,
        "seconds": {"training": trained_for, "all": time.time() - began},
    }
    # Written last, because a run whose JSON is there counts as finished.
    aside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(aside, file)
    shutil.rmtree(folder, ignore_errors=True)
    gc.collect()


def train(ledger: Ledger, run: Run, folder: Path) -> Path | None:
    """Runs the stages of a run that are not finished. Returns the folder of the last; None if nothing is trained."""
    # Slow to import.
    from lavender_min.tuning import command, stages

    made: list[stages.Stage] = []
    for number, declared in enumerate(run.stages, 1):
        into, own = folder / str(number), dict(declared)
        host = stages.result(made[-1]) if made else planning.host_folder(run.host)
        if kind := own.pop(planning.ASSEMBLE, ""):
            host = assembled(ledger, run, kind, host, folder / f"{number}-host")
        values = own | {
            "data": ["toy"] * len(stores.listed(own["split"])),
            "maps": [str(stores.folder(ledger.out, split, run.maps)) for split in stores.listed(own["split"])],
            "vlm": str(host),
            "seed": run.seed,
            "output_dir": str(into),
        }
        if not own.get("full"):
            # The vision tower is frozen, so what it makes of a picture serves all runs of a host.
            values["cache_vision"] = True
            share(ledger.out / "vision" / run.host, into / "vision")
        argv = [word for pair in values.items() for word in stages.as_flag(*pair)]
        made.append(stages.Stage(f"{run.name}, stage {number}", into, argv))
        # A stage that is followed by another leaves a whole host, its adapter merged.
        code = stages.run([made[-1]]) if number < len(run.stages) else command.train(argv)
        # 128 + the number of a signal: it was told to stop.
        if code > 128:
            raise SystemExit(code)
        if code:
            raise ValueError(f"{run.name}: the training ended with exit code {code}")
    return made[-1].folder if made else None


def assembled(ledger: Ledger, run: Run, kind: str, trained: Path, into: Path) -> Path:
    """A host of the parts of the run's host (`parts`), in the folder `into`."""
    # Slow to import.
    from lavender_min.ledger import parts

    of = parts_folder(ledger, run)
    with stores.locked(ledger.out / "locks" / f"parts-{run.host}.lock"):
        if not of.exists():
            aside = of.with_name(f".tmp-{of.name}")
            parts.take_apart(planning.host_folder(run.host), aside)
            os.replace(aside, of)
    parts.put_together(kind, of, trained, run.seed, into)
    return into


def parts_folder(ledger: Ledger, run: Run) -> Path:
    return ledger.out / "parts" / run.host


def share(folder: Path, link: Path) -> None:
    """Makes `link` a link to `folder`, and both of them if they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(folder.absolute())


@functools.cache
def commit() -> str:
    """The git commit of the code that makes a result, with "-dirty" behind it after changes; "" outside of a repository.

    Asked once, when the work begins: the repository may go on while the process runs with the code that it had loaded.
    """
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip()


def run_all(ledger: Ledger, processes: int, argv: Sequence[str]) -> int:
    """Makes the stores that are missing, then the runs, in `processes` processes. Returns the exit code.

    `argv` is the command line of this command: each process is started with it, and with --processes=1 behind it.
    """
    say(forecast(ledger, processes))
    runs = list(ledger.whole_plan().runs.values())
    for one in stores.wanted([run for run in runs if not ledger.file(run).exists()]):
        stores.make(ledger.out, one)
    if processes == 1:
        work(ledger)
        return 0
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    words = [sys.executable, "-m", "lavender_min.ledger", *argv, "--processes=1"]
    workers = [subprocess.Popen(words, env=env) for _ in range(processes)]
    try:
        return max(worker.wait() for worker in workers)
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
