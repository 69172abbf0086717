"""Time and extra peak memory of one call, and a file of what was measured. Nothing is written that was not run."""

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
OWN = "triton" if DEVICE == "cuda" else "torch"  # the backend `ops` picks here
RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    op: str
    case: str
    method: str
    forward_ms: float
    both_ms: float  # forward and backward; as forward where there is no gradient
    forward_mib: float  # extra peak: the most that was held at once, beside the inputs
    both_mib: float
    tflops: float  # useful flops of both passes over both_ms; 0: not counted
    gbps: float  # bytes that have to be read or written once, over both_ms


class Ratio(NamedTuple):
    """One method over another: below 1 it is faster, or smaller."""

    op: str
    case: str
    method: str
    over: str
    turns: int
    forward_time: float
    both_time: float  # forward and backward
    forward_memory: float  # extra peak
    both_memory: float


def milliseconds(function: Callable[[], object]) -> float:
    """Median: `do_bench` on a GPU, three runs after a warm one on a CPU."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return do_bench(function, return_mode="median")
    function()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The profiler's native code announces itself on stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def extra_peak_mib(function: Callable[[], object]) -> float:
    """The most memory held at once during a call, beyond what was held before; by the allocator, so that all of it counts."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def measure(
    op: str,
    case: str,
    method: str,
    forward: Callable[[], torch.Tensor],
    inputs: Sequence[torch.Tensor] = (),
    flops=0,
    nbytes=0,
) -> Row:
    """`forward` is run as it is and, if there are inputs to take gradients for, with its backward."""
    gradient = torch.randn_like(forward().detach())

    def both():
        return torch.autograd.grad(forward(), inputs, gradient) if inputs else forward()

    times, peaks = ([f(x) for x in (forward, both)] for f in (milliseconds, extra_peak_mib))
    seconds = times[1] / 1e3
    return Row(op, case, method, *times, *peaks, flops / seconds / 1e12, nbytes / seconds / 1e9)


def compare(
    op: str,
    case: str,
    methods: dict[str, Callable[[], torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    turns: int,
) -> Ratio:
    """The first of two methods over the second, on a CPU.

    They take turns, in changing order, and a turn gives a ratio of CPU times; the median over turns counts. So other work
    on the machine slows both alike, and does not decide.
    """
    (name, one), (other_name, other) = methods.items()
    gradient = torch.randn_like(one().detach())

    def cpu_time(function: Callable[[], object]) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    def ratios(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
        times = []
        for turn in range(turns + 1):
            order = (first, second) if turn % 2 else (second, first)
            spent = {function: cpu_time(function) for function in order}
            times.append(spent[first] / spent[second])
        # the first turn warms up
        return statistics.median(times[1:]), extra_peak_mib(first) / extra_peak_mib(second)

    forward_time, forward_memory = ratios(one, other)
    both_time, both_memory = ratios(*(lambda f=f: torch.autograd.grad(f(), inputs, gradient) for f in (one, other)))
    return Ratio(op, case, name, other_name, turns, forward_time, both_time, forward_memory, both_memory)


def show(rows: Sequence[Row], baseline: str) -> None:
    """A table for every case, beside the baseline's time and memory."""
    print(f"\n{DEVICE}: {device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'case':32} {'method':28} {'forward':>10} {'+backward':>10} {'peak':>9}", end="")
    print(f" {'faster':>7} {'smaller':>8} {'TFLOP/s':>8} {'GB/s':>7}")
    for row in rows:
        base = next((r for r in rows if r.case == row.case and r.method == baseline), row)
        print(
            f"{row.case:32} {row.method:28} {row.forward_ms:8.3f}ms {row.both_ms:8.3f}ms {row.both_mib:6.1f}MiB "
            f"{base.both_ms / row.both_ms:6.1f}x {base.both_mib / max(row.both_mib, 1e-3):7.1f}x {row.tflops:8.2f} {row.gbps:7.1f}"
        )


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()


def ceilings() -> dict[str, float]:
    """What this GPU reaches: GB/s of a copy of 512 MiB, TFLOP/s of a 8192³ product in bfloat16."""
    if DEVICE != "cuda":
        return {}
    source = torch.empty(2**28, dtype=DTYPE, device=DEVICE)
    target, square = torch.empty_like(source), torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE)
    copy, product = milliseconds(lambda: target.copy_(source)), milliseconds(lambda: square @ square)
    return {"copy_gbps": 2 * source.nbytes / copy / 1e6, "matmul_tflops": 2 * 8192**3 / product / 1e9}


def write(rows: Sequence[Row | Ratio], folder: Path = RESULTS) -> Path:
    """<device>.json, one entry an op, with the versions it was measured with; entries of other ops stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device_name().replace(' ', '-') if DEVICE == 'cuda' else 'cpu'}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    about = {"device": device_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    if DEVICE == "cuda":
        import triton

        driver = torch._C._cuda_getDriverVersion()
        about |= {"triton": triton.__version__, "cuda": torch.version.cuda, "driver": driver, **ceilings()}
    found[rows[0].op] = {"measured with": about, "rows": [row._asdict() for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time and peak memory along every sweep: cases named "<axis> <number>"."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row.case.rsplit(" ", 1)[0] for row in rows))
    figure, grid = pyplot.subplots(2, len(axes), figsize=(4 * len(axes), 6), squeeze=False)
    for column, axis in enumerate(axes):
        ticks = {int(row.case.rsplit(" ", 1)[1]) for row in rows if row.case.rsplit(" ", 1)[0] == axis}
        for method in dict.fromkeys(row.method for row in rows):
            mine = [r for r in rows if r.method == method and r.case.rsplit(" ", 1)[0] == axis]
            x = [int(r.case.rsplit(" ", 1)[1]) for r in mine]
            grid[0][column].plot(x, [r.both_ms for r in mine], marker="o", label=method)
            grid[1][column].plot(x, [r.both_mib for r in mine], marker="o", label=method)
        for line, unit in ((0, "forward + backward, ms"), (1, "extra peak, MiB")):
            grid[line][column].set(xscale="log", yscale="log", xlabel=axis, ylabel=unit)
            grid[line][column].set_xticks(sorted(ticks), labels=sorted(ticks))
            grid[line][column].minorticks_off()
    grid[0][0].legend(fontsize=7)
    figure.suptitle(f"word_attention on {device_name()}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
