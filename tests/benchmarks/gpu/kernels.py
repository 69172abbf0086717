"""Time and memory of the three ops beside every honest alternative, and which block sizes are best on this device.

Each row is one way to compute the same thing: ours, eager PyTorch, rows first (plain and compiled), one-hot values. It is timed
alone and with its backward, as the median of many runs, beside the most memory held beyond the inputs. The bytes that have to be
moved and the flops that have to be done are set against what the device reaches in a large copy (`of_copy`) and in a large matrix
product (`of_matmul`).

The search varies one block size of word_attention at a time and keeps what is fastest, forward and backward together. What does not
compile, does not fit or is not right any more drops out. The block sizes in the code were chosen by compiling, never by time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import alternatives
import torch
from measure import DEVICE, DTYPE, Row, milliseconds

from gpu.record import Record, ceilings
from lavender_min import ops
from lavender_min.geometry import PatchLayout, resize_matrix
from lavender_min.kernels import word_attention

TINY = {"h": 2, "hkv": 1, "d": 16, "t": 4, "n": 1, "tiles": 1, "b": 1, "patches": 2, "g": 2}
CANDIDATES = {"BR": (16, 32, 64, 128), "BX": (16, 32, 64), "BK": (32, 64, 128), "num_warps": (4, 8)}
TINY_CANDIDATES: dict[str, tuple[int, ...]] = {"BX": (16, 32)}


Measurements = dict[str, Callable[[], list[Row]]]


def measurements(tiny: bool) -> tuple[Measurements, Measurements]:
    """What the README shows, and what it does not."""
    word, diffusion, aligner = alternatives.word_rows, alternatives.diffusion_rows, alternatives.aligner_rows
    if tiny:
        few: dict[str, Any] = {"backends": ("triton",)}
        return {
            "word_attention": partial(word, "small", compiled=False, **few, **TINY),
            "diffusion_attention": partial(diffusion, 4, 8, b=1, h=2, length=5, w=2, **few),
            "aligner_mse": partial(aligner, 2, 2, 4, compiled=False, **few),
        }, {"diffusion_attention, again": partial(diffusion, 4, 8, b=1, h=1, length=3, w=1, **few)}
    shown: Measurements = {
        "word_attention": partial(word, "Llama-3.2", **alternatives.LLAMA),
        "diffusion_attention": partial(diffusion, 64, 40),
        "aligner_mse": aligner,
    }
    more: Measurements = {
        f"diffusion_attention {side}": partial(diffusion, side, d) for side, d in ((32, 80), (16, 160))
    }
    for axis, value in (("n", 4), ("n", 256), ("t", 2048), ("b", 8), ("tiles", 1)):
        sizes = alternatives.LLAMA | {axis: value}
        more[f"word_attention {axis} {value}"] = partial(word, f"{axis} {value}", compiled=False, **sizes)
    return shown, more


def run(record: Record) -> None:
    most = ceilings(record.tiny, DTYPE)
    record.add("ceilings", **most)
    shown, more = measurements(record.tiny)
    for name, make in shown.items():
        take(record, name, make, most)
    with record.trying("blocks"):
        search(record, TINY if record.tiny else alternatives.LLAMA, TINY_CANDIDATES if record.tiny else CANDIDATES)
    for name, make in more.items():
        if record.left() > 10:
            take(record, name, make, most)


def take(record: Record, name: str, make: Callable[[], list[Row]], most: dict[str, float]) -> None:
    """Every way by itself, and ours beside the fastest of the others."""
    with record.trying(name):
        rows = make()
        for row in rows:
            _, case, method, *numbers = row
            shares = {"of_copy": row.gbps / most["copy_gbps"], "of_matmul": row.tflops / most["matmul_tflops"]}
            record.add(f"{name}: {case}, {method}", **dict(zip(Row._fields[3:], numbers, strict=True)), **shares)
        record.add(name, **beside(rows))


def beside(rows: list[Row]) -> dict[str, Any]:
    """Ours, and the fastest of the others."""
    ours, other = rows[0], min(rows[1:], key=lambda row: row.both_ms)
    return {
        "ours_ms": ours.both_ms, "ours_mib": ours.both_mib, "faster": other.both_ms / ours.both_ms,
        "other": other.method, "other_ms": other.both_ms, "other_mib": other.both_mib,
    }  # fmt: skip


# --- block sizes ------------------------------------------------------------------------------------------------------


def once(sizes: dict[str, int]) -> Callable[[], list[torch.Tensor]]:
    """A call of the kernel at these sizes: its maps and its gradients. Patches lie as in Llama 3.2: four tiles are two by two."""
    h, hkv, d, t, n, tiles, b, patches, g = (sizes[axis] for axis in "h hkv d t n tiles b patches g".split())
    high, wide = patches * (2 if tiles == 4 else 1), patches * min(tiles, 2)
    y, x = torch.arange(high)[:, None], torch.arange(wide)
    index = (y // patches * 2 + x // patches) * (patches**2 + 1) + 1 + y % patches * patches + x % patches
    layout = PatchLayout(
        index.int().expand(b, -1, -1), *(resize_matrix(m, g).expand(b, -1, -1) for m in (high, wide))
    ).to(DEVICE)
    inputs = [
        torch.randn(b, many, heads, d, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
        for many, heads in ((t, h), (tiles * (patches**2 + 1), hkv))
    ]
    rows = torch.cat([torch.randperm(t)[:n] for _ in range(b)]).int().to(DEVICE)
    gradient = torch.randn(b * n, h, g, g, device=DEVICE)

    def call() -> list[torch.Tensor]:
        out = ops.word_attention(*inputs, rows, [n] * b, layout, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

    return call


def search(record: Record, sizes: dict[str, int], candidates: dict[str, tuple[int, ...]]) -> None:
    """From the block sizes in the code, one after the other, to the fastest found; printed as the dict to put there."""
    original, used = word_attention.blocks, []
    with patch.object(word_attention, "blocks", lambda *args: used.append(original(*args)) or used[-1]):
        call = once(sizes)
        wanted = call()
    best, best_ms = dict(used[0]), milliseconds(call)
    record.add("blocks in the code", ms=best_ms, blocks=dict(best))
    for axis, values in candidates.items():
        for value in values:
            tried = best | {axis: value}
            if value == best[axis] or record.left() < 30:
                continue
            with patch.object(word_attention, "blocks", lambda *_, tried=tried: tried):
                ms, reason = timed(call, wanted)
            if reason:
                record.add(f"blocks {tried}", dropped=reason)
                continue
            record.add(f"blocks {tried}", ms=ms)
            if ms < best_ms:
                best, best_ms = tried, ms
    record.add("blocks", ms=best_ms, blocks=best)
    print(f"  best blocks for group {sizes['h'] // sizes['hkv']}, d {sizes['d']}, {DTYPE}: {best}")


def timed(call: Callable[[], list[torch.Tensor]], wanted: list[torch.Tensor]) -> tuple[float, str]:
    """Milliseconds, and why these blocks will not do (empty: they will)."""
    try:
        found = call()
        for x, y in zip(found, wanted, strict=True):
            # other blocks add up in another order: the same to the precision of the inputs
            if not (x - y).abs().max() <= 4 * torch.finfo(DTYPE).eps * y.abs().max():
                return 0.0, "gives other numbers"
        return milliseconds(call), ""
    # What the compiler says of a shape it cannot take has many types.
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {str(error)[:200]}"
