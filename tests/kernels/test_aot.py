"""Every kernel compiled for real GPUs, at real sizes, without one: what fits, what spills, which instructions are used.

In a process of its own: compiling wants TRITON_INTERPRET unset before triton is imported, the other tests want it set.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# bytes a block can have; A100 163 KB, H100 227 KB
A10G_SHARED = 99 * 1024
DOTS = {"row_stats", "small_map", "query_gradient", "key_gradient", "attend"}
# no matrix product in these
PLAIN = {"key_order", "sum_query_gradient", "word_error", "feature_gradient"}

COMPILE = """
import json
from lavender_min.kernels import aot
print(json.dumps([r._asdict() for case in aot.CASES for target in aot.TARGETS for r in aot.report(case, target)]))
"""
# Branches that the default cases do not take: each dtype and kind of mask, head dims that are no power of two, enlarged canvases.
VARIANTS = """
import torch
from lavender_min.kernels import aot
def meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)
with aot.compile_only(86):
    aot.word_case(dtype=torch.float32, d=80, n=3, tiles=1, mask="causal")
    aot.word_case(dtype=torch.float16, d=64, n=5, mask="bool")
    aot.word_case(dtype=torch.bfloat16, d=256, mask="none")
    aot.diffusion_case(8, 24, dtype=torch.float32, words=40)
    aot.aligner_case(dtype=torch.bfloat16, output="none")
    # latents, one output row
    line = aot._Layout(meta(2, 1, 64, dtype=torch.int32), meta(2, 1, 1), meta(2, 12, 64))
    query, key = (meta(2, heads, length, 16).requires_grad_() for heads, length in ((3, 7), (1, 64)))
    out = aot.word_attention(query, key, meta(3, dtype=torch.int32), [1, 2], line)
    out.backward(meta(out.shape))
"""


def run(code: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_kernels_fit_do_not_spill_and_use_the_hardware():
    rows = json.loads(run(COMPILE))
    assert {row["target"] for row in rows} == {80, 86, 89, 90}
    assert {row["kernel"] for row in rows} == DOTS | PLAIN
    for row in rows:
        where = f"{row['kernel']} on sm_{row['target']} ({row['case']})"
        assert row["shared"] <= A10G_SHARED, f"{where}: {row['shared']} bytes of shared memory"
        assert row["spills"] == 0, f"{where}: {row['spills']} bytes spilled"
        if row["kernel"] in DOTS:
            assert row["tensor"] > 0, f"{where}: no tensor-core instruction"
            assert row["asynchronous"] > 0, f"{where}: no asynchronous copy"


def test_other_configurations_compile():
    run(VARIANTS)
