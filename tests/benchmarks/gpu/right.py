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
from typing import Any

import torch
from torch import Tensor

from gpu.cases import TINY, WAYS, Case, cases, draw
from gpu.record import Record, last_line


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
    kernel, eager, inputs = WAYS[case.op](dtype, **case.sizes)
    inputs = [x.to(dtype) for x in inputs]  # rounded once, for all three
    got, again, low = values(kernel, inputs, dtype), values(kernel, inputs, dtype), values(eager, inputs, dtype)
    pairs = [
        [(x.double() - z).abs().max().item() for x in (kernels, eagers)]
        for kernels, eagers, z in zip(got, low, values(eager, inputs, torch.float64), strict=True)
    ]
    worst = max(range(len(pairs)), key=lambda i: share_of_bound(*pairs[i]))
    error, bound = pairs[worst][0], 2 * pairs[worst][1] + 1e-5
    same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    fine = share_of_bound(*pairs[worst]) <= 1 and same
    return {"error": error, "bound": bound, "value": worst, "twice the same": same, "right": fine}


def run(record: Record) -> None:
    todo = cases(record.tiny)
    workers = 1 if record.tiny else min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = [(case, pool.submit(check, case)) for case in todo]
        if not record.tiny:
            for tool in ("memcheck", "racecheck"):
                with record.trying(tool):
                    sanitize(record, tool)
        for case, future in found:
            name = f"{case.op} {case.dtype}, {case.what}"
            try:
                row = future.result()
            except Exception as error:
                record.fail(name, last_line(error))
                continue
            record.add(name, **row)
            if not row["right"]:
                record.fail(
                    name, f"error {row['error']:.2e}, bound {row['bound']:.2e}, twice the same: {row['twice the same']}"
                )
    if record.tiny:
        record.add("bfloat16", skipped="wrong in Triton's interpreter")
        record.add("memcheck", skipped="needs a GPU")
        record.add("racecheck", skipped="needs a GPU")
    right = sum(row.get("right", False) for row in record.numbers.values())
    record.add("all", right=right, cases=len(todo))


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


def small_cases() -> None:
    """What the sanitizer looks at: forward and backward of every op, once."""
    for op, sizes in TINY.items():
        kernel, _, inputs = WAYS[op](torch.float16, **sizes)
        values(kernel, inputs, torch.float16)


def sanitize(record: Record, tool: str) -> None:
    """Runs `small_cases` under one of its tools. Without PyTorch's caching, as memory that is kept hides what lies outside."""
    binary = shutil.which("compute-sanitizer", path=os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin")
    if not binary:
        record.add(tool, skipped="compute-sanitizer is not installed")
        return
    code = f"import sys; sys.path[:] = {sys.path!r}; from gpu.right import small_cases; small_cases()"
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [binary, "--tool", tool, sys.executable, "-c", code]
    with tempfile.TemporaryFile("w+") as out:  # not a pipe, which a process that outlives its parent would hold open
        status = subprocess.run(
            command, env=env, stdout=out, stderr=out, timeout=max(5.0, record.left() / 3)
        ).returncode
        out.seek(0)
        text = out.read()
    said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if not said:
        raise RuntimeError(f"compute-sanitizer gave no summary, exit status {status}: {text.strip()[-300:]}")
    record.add(tool, errors=int(said[-1]))
    if int(said[-1]):
        record.fail(
            tool, next(line for line in text.splitlines() if line.startswith("========= ") and "COMPUTE" not in line)
        )
