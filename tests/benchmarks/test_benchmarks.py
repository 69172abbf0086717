"""The ops beside every honest alternative, in one run: `make bench`. On a GPU the kernels in bf16, on a CPU the torch backend.

Real sizes carry the marker `benchmark`; `test_the_benchmarks_run` tries the same code at toy sizes in the ordinary suite,
where it also runs the kernels through Triton's interpreter.
"""

import json

import jaxtyping
import pytest
import torch
from alternatives import (
    LLAMA,
    TOY,
    aligner_rows,
    diffusion_rows,
    eager,
    eager_mse,
    explicit,
    one_hot,
    rows_first,
    word_ratio,
    word_rows,
)
from measure import DEVICE, plot, show, write

from lavender_min import ops
from lavender_min.geometry import PatchLayout

# --- word_attention ---------------------------------------------------------------------------------------------------


@pytest.mark.benchmark
def test_word_attention_at_llama_sizes():
    rows = word_rows("Llama-3.2 1", **LLAMA)
    show(rows, "eager full maps")
    own = rows[0]
    base = next(row for row in rows if row.method == "eager full maps")
    best = min(row.both_ms for row in rows[1:])
    faster, smaller = base.both_ms / own.both_ms, base.both_mib / own.both_mib
    write([row._replace(op="word_attention, Llama-3.2") for row in rows])
    if DEVICE == "cuda":
        assert faster >= 10 and smaller >= 50 and best / own.both_ms >= 2
    else:
        assert faster >= 8 and smaller >= 10


@pytest.mark.benchmark
@pytest.mark.skipif(DEVICE == "cuda", reason="measures CPU time")
def test_the_pytorch_backend_is_as_fast_and_as_small_as_rows_first(monkeypatch):
    # outside the tests nothing checks annotations at run time
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ratio = word_ratio("Llama-3.2 1", turns=60, **LLAMA)
    print(
        f"\nPyTorch backend over rows first: time {ratio.forward_time:.2f} forward, {ratio.both_time:.2f} with backward; "
        f"memory {ratio.forward_memory:.2f} and {ratio.both_memory:.2f}"
    )
    write([ratio])
    assert ratio.forward_time <= 1 and ratio.both_time <= 1
    assert ratio.forward_memory <= 1.05 and ratio.both_memory <= 1.05


@pytest.mark.benchmark
def test_word_attention_sweeps():
    sweeps = {"n": [4, 16, 32, 64, 256], "t": [128, 512, 2048, 8192], "tiles": [1, 2, 3, 4], "b": [1, 2, 4, 8]}
    names = {"n": "picked tokens", "t": "text tokens", "tiles": "tiles", "b": "batch"}
    if DEVICE == "cpu":
        # eager full maps take seconds a call here
        sweeps = {"n": [4, 64], "t": [128, 512], "tiles": [1, 4], "b": [1, 2]}
    rows = []
    for axis, values in sweeps.items():
        for value in values:
            sizes = LLAMA | {"t": 256} | {axis: value}
            rows += word_rows(f"{names[axis]} {value}", compiled=DEVICE == "cuda", **sizes)
    show(rows, "eager full maps")
    plot(rows, write(rows).with_suffix(".png"))


# --- diffusion_attention ----------------------------------------------------------------------------------------------


@pytest.mark.benchmark
def test_diffusion_attention():
    rows = [row for side, d in ((64, 40), (32, 80), (16, 160)) for row in diffusion_rows(side, d)]
    show(rows, "SDPA, one-hot value")
    write(rows)
    if DEVICE == "cuda":
        for case in {row.case for row in rows if not row.case.startswith("16")}:
            own, trick = (
                next(r.both_ms for r in rows if r.case == case and r.method.startswith(m)) for m in ("ours", "SDPA")
            )
            assert own < trick, f"{case}: {own:.3f} ms, the one-hot trick {trick:.3f} ms"


# --- aligner_mse ------------------------------------------------------------------------------------------------------


@pytest.mark.benchmark
def test_aligner_mse():
    rows = aligner_rows()
    show(rows, "eager")
    write(rows)


# --- the same code at toy sizes ---------------------------------------------------------------------------------------


def test_the_benchmarks_run(tmp_path):
    """Every method runs, every alternative computes the same thing, the files are written where they should be."""
    both = ("torch", "triton")
    words = word_rows("toy 1", both, compiled=False, **TOY)
    others = diffusion_rows(4, 8, b=1, h=2, length=5, w=2, backends=both) + aligner_rows(2, 2, 4, both, compiled=False)
    assert [row.method for row in words] == ["ours (torch)", "ours (triton)", "rows first", "eager full maps"]
    assert len(others) == 4 + 3 and all(row.both_ms > 0 and row.both_mib > 0 for row in words + others)
    ratio = word_ratio("toy 1", turns=1, **TOY)
    assert (ratio.method, ratio.over) == ("ours (torch)", "rows first") and min(ratio[-4:]) > 0
    write([ratio], tmp_path)
    path = write(words, tmp_path)
    assert set(json.loads(path.read_text())) == {ratio.op, words[0].op}
    plot(words, path.with_suffix(".png"))
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".png"}


def test_the_alternatives_compute_the_same():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, many, 8, generator=draw) for many in (9, 6, 6))
    rows, counts = torch.tensor([3, 1, 0, 3]), [2, 2]
    layout = PatchLayout(
        torch.arange(6).view(1, 2, 3).repeat(2, 1, 1),
        torch.rand(2, 4, 2, generator=draw),
        torch.rand(2, 5, 3, generator=draw),
    )
    wanted = ops.word_attention(query, key, rows, counts, layout, backend="torch")
    for method in (eager, rows_first):
        torch.testing.assert_close(method(query, key, rows, counts, layout), wanted)
    weights, results = torch.rand(2, 6, 2, generator=draw), []
    for method in (lambda *x: ops.diffusion_attention(*x, backend="torch"), explicit, one_hot):
        maps = torch.ones(2, 2, 9)
        results.append((method(query, key, value, weights, maps), maps))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    features, weight, bias = torch.randn(3, 2, 4, 5, generator=draw), torch.randn(2, generator=draw), torch.randn(1)
    target, trust = torch.rand(3, 4, 5, generator=draw), torch.tensor([1.0, 0.0, 1.0])
    wanted = ops.aligner_mse(features, weight, bias, target, trust=trust, backend="torch")
    torch.testing.assert_close(eager_mse(features, weight, bias, target, trust), wanted)
