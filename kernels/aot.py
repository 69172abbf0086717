"""What the compiler makes of every kernel, without a GPU: `python -m lavender_min.kernels.aot` (`make kernels`).

The launchers run as they are, on tensors of the device "meta" (shapes, no memory), under a driver that knows the target but
cannot launch. So block sizes, dtypes, strides and alignment are those of a real call, and Triton compiles each kernel
as it would there. TRITON_INTERPRET must be unset.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .aligner_mse import aligner_mse
from .diffusion_attention import diffusion_attention
from .word_attention import word_attention

TARGETS = {80: "A100", 86: "A10G", 89: "L4", 90: "H100"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Report(NamedTuple):
    case: str
    kernel: str
    target: int  # 86: sm_86
    warps: int
    registers: int  # a thread
    shared: int  # bytes a block
    spills: int  # bytes of stack and local memory a thread
    tensor: int  # tensor-core instructions in the PTX
    asynchronous: int  # copies from global to shared memory that overlap with work


class CompileOnlyDriver:
    """Stands in for the CUDA driver: names a target, has no device."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        # JITFunction keeps its compiled kernels by device: one number a target
        self.device = -capability

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list]:
    """Inside, `kernel[grid](...)` compiles for sm_<capability> and launches nothing. Yields the list of (name, compiled kernel)."""
    compiled, run, active = [], JITFunction.run, triton.runtime.driver._active

    def warm_up(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = warm_up
    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


class _Layout(NamedTuple):
    index: torch.Tensor
    resize_y: torch.Tensor
    resize_x: torch.Tensor


def word_case(dtype=torch.bfloat16, t=512, n=32, tiles=4, d=128, mask="float") -> None:
    """Llama-3.2-Vision 11B: 32 query heads, 8 key heads, `tiles` tiles of 1 + 40² keys; forward and backward."""
    p, side = tiles * 1601, 80 if tiles == 4 else 40
    query = torch.empty(1, t, 32, d, dtype=dtype, device="meta").transpose(1, 2).requires_grad_()
    key = torch.empty(1, p, 8, d, dtype=dtype, device="meta").transpose(1, 2).requires_grad_()
    line = torch.empty(1, 32, side, device="meta")
    layout = _Layout(torch.empty(1, side, side, dtype=torch.int32, device="meta"), line, line)
    masks = {"float": dtype, "bool": torch.bool}
    attn_mask = torch.empty(1, 1, t, p, dtype=masks[mask], device="meta") if mask in masks else None
    rows = torch.empty(n, dtype=torch.int32, device="meta")
    out = word_attention(query, key, rows, [n], layout, attn_mask=attn_mask, is_causal=mask == "causal")
    out.backward(torch.empty_like(out))


def diffusion_case(side: int, d: int, dtype=torch.float16, words=16) -> None:
    """Stable Diffusion 1.4: 8 heads, 77 tokens, side² latent pixels."""
    query, key = (torch.empty(4, length, 8, d, dtype=dtype, device="meta").transpose(1, 2) for length in (side**2, 77))
    maps = torch.empty(4, words, side**2, device="meta")
    diffusion_attention(query, key, key, torch.empty(4, 77, words, device="meta"), maps)


def aligner_case(dtype=torch.float32, m=64, c=32, output="minmax") -> None:
    """The Aligner's last layer: 32 channels, 32×32 cells."""
    features, weight, bias = (
        torch.empty(s, dtype=dtype, device="meta").requires_grad_() for s in ((m, c, 32, 32), (c,), ())
    )
    trust = torch.empty(m, device="meta")
    target = torch.empty(m, 32, 32, device="meta")
    aligner_mse(features, weight, bias, target, output=output, trust=trust).backward()


CASES: dict[str, Callable[[], None]] = {
    "word, Llama-3.2, 4 tiles": word_case,
    "diffusion, 64², d 40": lambda: diffusion_case(64, 40),
    "diffusion, 32², d 80": lambda: diffusion_case(32, 80),
    "diffusion, 16², d 160": lambda: diffusion_case(16, 160),
    "aligner, 32 channels": aligner_case,
}


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a compiled kernel, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, _, value in (item.partition(":") for item in text.split()) if value.isdigit()}


def report(case: str, capability: int) -> list[Report]:
    with compile_only(capability) as compiled:
        CASES[case]()
    rows = {}
    for name, kernel in compiled:
        use, ptx = resources(kernel.asm["cubin"]), kernel.asm["ptx"]
        rows[name] = Report(
            case, name, capability, kernel.metadata.num_warps, use["REG"], kernel.metadata.shared, use["STACK"] + use["LOCAL"],
            ptx.count("mma.sync") + ptx.count("wgmma.mma_async"), ptx.count("cp.async.ca.shared") + ptx.count("cp.async.cg.shared"),
        )  # fmt: skip
    return list(rows.values())


def main() -> None:
    print(f"triton {triton.__version__}; shared memory in bytes a block, registers and spilled bytes a thread")
    print(
        f"{'case':27} {'kernel':20} {'target':12} {'warps':>5} {'regs':>5} {'shared':>7} {'spills':>6} {'tensor':>6} {'async':>5}"
    )
    for case in CASES:
        for target, name in TARGETS.items():
            for r in report(case, target):
                print(
                    f"{r.case:27} {r.kernel:20} {f'sm_{target} {name}':12} {r.warps:5} {r.registers:5} {r.shared:7} {r.spills:6} "
                    f"{r.tensor:6} {r.asynchronous:5}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
