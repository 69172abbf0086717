"""What one part has measured so far: on disk after every number, so that a kill loses none of them."""

import contextlib
import datetime
import importlib.metadata
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import device_name, milliseconds

from gpu.results import write_json

PACKAGES = ("torch", "triton", "transformers", "diffusers", "peft", "bitsandbytes")


class Record:
    """A part's numbers by measurement, and what went wrong, by measurement too: the rest goes on."""

    def __init__(self, path: Path, seconds: float, tiny: bool):
        self.path, self.end, self.tiny = path, time.monotonic() + seconds, tiny
        self.about = about()
        self.numbers: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.write()

    def left(self) -> float:
        """Seconds before this part is ended."""
        return self.end - time.monotonic()

    def add(self, name: str, **numbers: Any) -> None:
        self.numbers[name] = numbers
        self.write()
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
        )
        print(f"  {name}: {', '.join(shown)}", flush=True)

    def fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self.write()
        print(f"  {name}: FAILED, {reason}", flush=True)

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """An error inside is noted under `name`, with its traceback in the log, and goes no further."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(name, one_line(error))

    def write(self) -> None:
        write_json(self.path, {"about": self.about, "numbers": self.numbers, "failed": self.failed})


def one_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]


def about() -> dict[str, Any]:
    """The device and the versions that a part's numbers hold for."""
    versions = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": device_name(),
        "python": sys.version.split()[0],
        **versions,
        "cuda": torch.version.cuda,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }


def first_line(*command: str) -> str | None:
    """What a program says of itself; None where there is no such program, or nothing to say."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().partition("\n")[0] or None


def ceilings(tiny: bool, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches: GB/s of a copy (bytes read and written), TFLOP/s of a square matrix product of random numbers."""
    device = "cpu" if tiny else "cuda"
    copied, side = (2**18, 128) if tiny else (2**28, 8192)
    source, square = torch.randn(copied, device=device).to(dtype), torch.randn(side, side, device=device).to(dtype)
    target = torch.empty_like(source)
    copy, product = milliseconds(lambda: target.copy_(source)), milliseconds(lambda: square @ square)
    return {"copy_gbps": 2 * source.nbytes / copy / 1e6, "matmul_tflops": 2 * side**3 / product / 1e9}
