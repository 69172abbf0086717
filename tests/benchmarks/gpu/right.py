"""Is every kernel right on this device? Each against eager PyTorch in float64, gradients too, and twice for bit-equality.

The tolerance needs no table: error(kernel) ≤ 2 · error(eager PyTorch in the kernel's own precision) + 1e-5, both against float64. A
wrong address or a race may still give right numbers once, so NVIDIA's compute-sanitizer looks at small cases where it is installed.

Compiling takes longer than running, so the cases are shared out over processes. Triton's interpreter is wrong in bf16: left out.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from gpu.cases import TINY, WAYS, Case, cases, draw
from gpu.record import Record

TOOLS = ("memcheck", "racecheck")


def values(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What comes out, and the gradients of the inputs where there are any."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    if isinstance(out, tuple):
        return [x.detach() for x in out]
    return [out, *torch.autograd.grad((out * draw(99, *out.shape)).sum(), inputs)]


def share_of_bound(error: float, eager_error: float) -> float:
    """At most 1 where the kernel is right; infinite where either has lost its numbers."""
    share = error / (2 * eager_error + 1e-5)
    return share if math.isfinite(error) and math.isfinite(eager_error) else math.inf


def check(case: Case) -> dict[str, Any]:
    """Error and bound of the value that comes nearest to its bound, or furthest over it."""
    dtype = getattr(torch, case.dtype)
    kernel, eager, inputs = WAYS[case.op](dtype, case.sizes)
    # Rounded once, so that all three see the same numbers.
    inputs = [x.to(dtype) for x in inputs]
    got, again, low = values(kernel, inputs, dtype), values(kernel, inputs, dtype), values(eager, inputs, dtype)
    pairs = [
        [(x.double() - z).abs().max().item() for x in (kernels, eagers)]
        for kernels, eagers, z in zip(got, low, values(eager, inputs, torch.float64), strict=True)
    ]
    worst = max(range(len(pairs)), key=lambda i: share_of_bound(*pairs[i]))
    error, bound = pairs[worst][0], 2 * pairs[worst][1] + 1e-5
    same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    fine = share_of_bound(*pairs[worst]) <= 1 and same
    return {"error": error, "bound": bound, "value": worst, "twice": same, "right": fine}


def run(record: Record) -> None:
    todo = cases(record.tiny)
    sanitizers = {} if record.tiny else {tool: sanitizer(tool) for tool in TOOLS}
    workers = 1 if record.tiny else min(14, os.cpu_count() or 1)
    right = 0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for case, future in [(case, pool.submit(check, case)) for case in todo]:
            name = f"{case.op} {case.dtype}, {case.what}"
            with record.trying(name):
                row = future.result()
                record.add(name, **row)
                right += row["right"]
                if not row["right"]:
                    raise ArithmeticError("error {error:.2e}, bound {bound:.2e}, twice the same: {twice}".format(**row))
    record.add("all", right=right, cases=len(todo))
    if record.tiny:
        record.add("bfloat16", skipped="wrong in Triton's interpreter")
    for tool in TOOLS:
        with record.trying(tool):
            record.add(tool, **verdict(sanitizers.get(tool), max(1.0, record.left() - 5)))


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


def small_cases() -> None:
    """What the sanitizer looks at: forward and backward of every op, once."""
    for op, sizes in TINY.items():
        kernel, _, inputs = WAYS[op](torch.float16, sizes)
        values(kernel, inputs, torch.float16)


class Sanitizer(NamedTuple):
    process: subprocess.Popen
    said: IO[str]  # a file, not a pipe, which a process that outlives its parent would hold open


def sanitizer(tool: str) -> Sanitizer | None:
    """`small_cases` under one of its tools, if it is installed. PyTorch keeps no memory meanwhile: it would hide bad addresses."""
    binary = shutil.which("compute-sanitizer", path=os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin")
    if not binary:
        return None
    code = f"import sys; sys.path[:] = {sys.path!r}; from gpu.right import small_cases; small_cases()"
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = tempfile.TemporaryFile("w+")
    command = [binary, "--tool", tool, sys.executable, "-c", code]
    return Sanitizer(subprocess.Popen(command, env=env, stdout=said, stderr=said), said)


def verdict(started: Sanitizer | None, seconds: float) -> dict[str, Any]:
    """How many errors it found; the first of them is the exception."""
    if started is None:
        return {"skipped": "needs a GPU, and compute-sanitizer"}
    status = started.process.wait(timeout=seconds)
    started.said.seek(0)
    text = started.said.read()
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if not found:
        raise RuntimeError(f"no summary, exit status {status}: {text.strip()[-300:]}")
    if int(found[-1]):
        first = next(line for line in text.splitlines() if line.startswith("========= ") and "COMPUTE" not in line)
        raise RuntimeError(f"{found[-1]} errors, first {first.removeprefix('========= ')}")
    return {"errors": 0}
