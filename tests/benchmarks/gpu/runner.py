"""Runs the parts one after another, each in a process of its own with a time limit, and keeps one JSON of all that is known.

    python3 tests/benchmarks/gpu [--only PART …] [--budget SECONDS] [--out DIR] [--tiny]

A part that fails, hangs or takes the interpreter down loses what it had not yet measured; the next one starts fresh. The JSON,
gpu.json in --out, is renewed while a part runs; what the parts say on stderr is in log.txt beside it. Of a real run the numbers
also go to tests/benchmarks/results, where the README's table takes them from. Exit status 1: something failed.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpu import results, table

HERE = Path(__file__).resolve().parent
# characters of the log that a failed part brings into the JSON
TAIL = 2000


class Part(NamedTuple):
    module: str  # with `run(record)`
    seconds: float  # its share of the budget


PARTS = {
    "right": Part("gpu.right", 80),
    "kernels": Part("gpu.kernels", 110),
    "stage1": Part("gpu.stage1", 120),
    "stage2": Part("gpu.stage2", 110),
    "whole": Part("gpu.whole", 60),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--budget", type=float, default=480, help="seconds for all of it (default: 480)")
    add("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")), help="default: $OUT, else runs/gpu")
    add("--tiny", action="store_true", help="the same in small, on the CPU")
    # what this script calls itself with
    add("--part", metavar="MODULE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.part:
        return run_part(args.part, args.out, args.budget, args.tiny)
    if not args.tiny:
        import torch

        if not torch.cuda.is_available():
            print("gpu: torch sees no GPU here; `make gpu TINY=1` runs the same in small on the CPU", file=sys.stderr)
            return 2
    # SIGTERM ends the part at work too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = run_parts({name: PARTS[name] for name in PARTS if name in args.only}, args.out, args.budget, args.tiny)
    if not args.tiny:
        print(f"the numbers are in {results.keep(report)} too; `make results` puts them into the README")
    print("\n" + table.draw([report]))
    failures = results.failures(report)
    print("\n".join(["", "failed:", *failures] if failures else ["", "nothing failed"]))
    return 1 if failures else 0


def run_parts(parts: Mapping[str, Part], out: Path, budget: float, tiny: bool) -> dict[str, Any]:
    """All parts in their order. What a quick part leaves of its share goes to those after it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    end, ahead = time.monotonic() + budget, sum(part.seconds for part in parts.values())
    report: dict[str, Any] = {"tiny": tiny, "parts": {}}
    for name, part in parts.items():
        limit = (end - time.monotonic()) * part.seconds / ahead
        ahead -= part.seconds
        print(f"{name}: up to {limit:.0f} s", flush=True)
        for known in watch(part.module, limit, out / "log.txt", tiny):
            report["parts"][name] = known
            results.write_json(out / "gpu.json", report)
        known = report["parts"][name]
        done = f"{len(known['numbers'])} measurements, {len(known['failed'])} failed"
        print(f"{name}: {known['seconds']:.1f} s, {done}, {known['error'] or 'ended by itself'}", flush=True)
    return report


def watch(module: str, limit: float, log: Path, tiny: bool) -> Iterator[dict[str, Any]]:
    """Starts a part and yields, about every second and once at its end, all that is known of it."""
    small = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if tiny else {}
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **small}
    with tempfile.TemporaryDirectory() as folder, log.open("a") as errors:
        file, start, began = Path(folder) / "part.json", errors.tell(), time.monotonic()
        command = [sys.executable, str(HERE), "--part", module, "--out", str(file), "--budget", str(limit)]
        # In a session of its own, so that the processes it starts can be ended with it.
        process = subprocess.Popen(command + ["--tiny"] * tiny, env=env, stderr=errors, start_new_session=True)
        try:
            ended = False
            while not ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=min(1.0, max(0.0, began + limit - time.monotonic())))
                seconds = time.monotonic() - began
                ended = process.returncode is not None or seconds >= limit
                known = json.loads(file.read_text()) if file.exists() else {"about": {}, "numbers": {}, "failed": {}}
                error = why(process.returncode, known["failed"], limit) if ended else "still at work"
                bad = error or known["failed"]
                tail = log.read_bytes()[start:][-TAIL:].decode(errors="replace") if bad else ""
                yield known | {"seconds": seconds, "error": error, "log": tail}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def why(status: int | None, failed: Mapping[str, str], limit: float) -> str | None:
    """Why a part did not end by itself, in one line; what failed in one that did is in `failed`."""
    if status is None:
        return f"ended at its limit of {limit:.0f} s"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}" if status and not failed else None


def run_part(module: str, path: Path, seconds: float, tiny: bool) -> int:
    """The child's side."""
    from gpu.record import Record

    record = Record(path, seconds, tiny)
    with record.trying("the part as a whole"):
        importlib.import_module(module).run(record)
    return 1 if record.failed else 0
