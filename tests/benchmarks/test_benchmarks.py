"""The ops beside every honest alternative, in one run: `make bench`. On a GPU the kernels in bf16, on a CPU the torch backend.

Real sizes carry the marker `benchmark`; `test_the_benchmarks_run` tries the same code at toy sizes in the ordinary suite,
where it also runs the kernels through Triton's interpreter.
"""

import shutil

import pytest
import torch
from einops import rearrange, repeat
from measure import DEVICE, DTYPE, OWN, Row, measure, plot, show, write
from torch.nn import functional as F

from lavender_min import ops
from lavender_min.geometry import PatchLayout, resize_matrix

LLAMA = {"h": 32, "hkv": 8, "d": 128, "t": 512, "n": 32, "tiles": 4, "b": 1, "patches": 40, "g": 32}
TOY = {"h": 4, "hkv": 2, "d": 16, "t": 8, "n": 2, "tiles": 1, "b": 1, "patches": 4, "g": 4}
MOST = 16 * 2**30 if DEVICE == "cuda" else 6 * 2**30  # bytes: eager maps that would need more are left out
COMPILES = DEVICE == "cuda" or shutil.which("g++") is not None

# --- word_attention and what one would write without it ---------------------------------------------------------------


def resample(attention, layout):
    """[b, h, n, p] -> [b, n, h, gy, gx], as everyone would: gather, then two products."""
    index = layout.index.long().flatten(1)
    canvas = attention.gather(-1, repeat(index, "b c -> b h n c", h=attention.shape[1], n=attention.shape[2]))
    canvas = canvas.unflatten(-1, layout.index.shape[1:]).to(layout.resize_y.dtype)
    return rearrange(
        layout.resize_y[:, None, None] @ canvas @ layout.resize_x.mT[:, None, None], "b h n y x -> b n h y x"
    )


def eager(query, key, tokens, layout):
    """Attention as transformers' eager path computes it, the whole [b, h, t, p], then the rows and keys that are wanted."""
    key = repeat(key, "b hkv p d -> b (hkv group) p d", group=query.shape[1] // key.shape[1])
    scores = query @ key.mT * query.shape[-1] ** -0.5
    attention = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    rows = repeat(tokens.long(), "b n -> b h n p", h=query.shape[1], p=key.shape[2])
    return resample(attention.gather(2, rows), layout)


def rows_first(query, key, tokens, layout):
    """Pick the rows, then softmax: [b, h, n, p]. The natural improvement, and what torch.compile is given."""
    query = query.gather(2, repeat(tokens.long(), "b n -> b h n d", h=query.shape[1], d=query.shape[3]))
    query = rearrange(query, "b (hkv group) n d -> b hkv (group n) d", hkv=key.shape[1])
    attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
    return resample(rearrange(attention, "b hkv (group n) p -> b (hkv group) n p", n=tokens.shape[1]), layout)


def word_rows(case: str, backends=(OWN,), compiled=COMPILES, *, h, hkv, d, t, n, tiles, b, patches, g) -> list[Row]:
    p, high, wide = tiles * (patches**2 + 1), patches * (2 if tiles == 4 else 1), patches * min(tiles, 2)
    if tiles == 3:
        high, wide = patches, 3 * patches
    query = torch.randn(b, t, h, d, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
    key = torch.randn(b, p, hkv, d, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
    tokens = torch.stack([torch.randperm(t)[:n] for _ in range(b)]).int().to(DEVICE)
    tile = torch.arange(tiles)[:, None, None] * (patches**2 + 1) + 1 + torch.arange(patches**2).view(patches, patches)
    index = rearrange(tile, "(ty tx) y x -> (ty y) (tx x)", ty=high // patches).int().expand(b, -1, -1)
    layout = PatchLayout(index, *(resize_matrix(m, g).expand(b, -1, -1) for m in (high, wide))).to(DEVICE)
    arguments = (query, key, tokens, layout)
    methods = {f"ours ({x})": lambda x=x: ops.word_attention(*arguments, backend=x) for x in backends}
    methods["rows first"] = lambda: rows_first(*arguments)
    if compiled:
        quick = torch.compile(rows_first)
        methods["rows first, compiled"] = lambda: quick(*arguments)
    if 3 * 4 * b * h * t * p < MOST:
        methods["eager full maps"] = lambda: eager(*arguments)
    flops = 6 * 2 * b * h * n * p * d
    nbytes = query.element_size() * (2 * b * h * n * d + 3 * key.numel()) + 8 * b * n * h * g * g
    return [measure("word_attention", case, name, f, (query, key), flops, nbytes) for name, f in methods.items()]


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
def test_word_attention_sweeps():
    sweeps = {"n": [4, 16, 32, 64, 256], "t": [128, 512, 2048, 8192], "tiles": [1, 2, 3, 4], "b": [1, 2, 4, 8]}
    names = {"n": "picked tokens", "t": "text tokens", "tiles": "tiles", "b": "batch"}
    if DEVICE == "cpu":  # eager full maps take seconds a call here
        sweeps = {"n": [4, 64], "t": [128, 512], "tiles": [1, 4], "b": [1, 2]}
    rows = []
    for axis, values in sweeps.items():
        for value in values:
            sizes = LLAMA | {"t": 256} | {axis: value}
            rows += word_rows(f"{names[axis]} {value}", compiled=DEVICE == "cuda", **sizes)
    show(rows, "eager full maps")
    plot(rows, write(rows).with_suffix(".png"))


# --- diffusion_attention ----------------------------------------------------------------------------------------------


def explicit(query, key, value, weights, maps):
    attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
    maps += (attention.mean(1) @ weights).mT
    return attention.to(value.dtype) @ value


def one_hot(query, key, value, weights, maps):
    """SDPA with the word weights as further columns of the value: no attention matrix, and no kernel of one's own."""
    columns = weights[:, None].expand(-1, query.shape[1], -1, -1).to(value.dtype)
    both = F.scaled_dot_product_attention(query, key, torch.cat([value, columns], -1))
    maps += both[..., value.shape[-1] :].mean(1, dtype=torch.float32).mT
    return both[..., : value.shape[-1]]


def diffusion_rows(side: int, d: int, b=4, h=8, length=77, w=8, backends=(OWN,)) -> list[Row]:
    query, key, value = (
        torch.randn(b, many, h, d, device=DEVICE, dtype=DTYPE).transpose(1, 2) for many in (side**2, length, length)
    )
    weights, maps = torch.rand(b, length, w, device=DEVICE), torch.zeros(b, w, side**2, device=DEVICE)
    arguments = (query, key, value, weights, maps)
    methods = {f"ours ({x})": lambda x=x: ops.diffusion_attention(*arguments, backend=x) for x in backends}
    methods |= {"explicit softmax": lambda: explicit(*arguments), "SDPA, one-hot value": lambda: one_hot(*arguments)}
    flops = 4 * b * h * side**2 * length * d
    nbytes = 2 * (query.nbytes + key.nbytes) + 2 * maps.nbytes
    case = f"{side}x{side}, head dim {d}, batch {b}"
    return [measure("diffusion_attention", case, name, f, (), flops, nbytes) for name, f in methods.items()]


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


def eager_mse(features, weight, bias, target, valid):
    maps = F.conv2d(features, weight[None, :, None, None], bias)[:, 0].float()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    error = ((maps - low) / (high - low + 1e-6) - target).square().mean((1, 2))
    return (error * valid).sum() / valid.sum().clamp(min=1)


def aligner_rows(m=256, c=32, g=32, backends=(OWN,), compiled=COMPILES) -> list[Row]:
    features = torch.randn(m, c, g, g, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight, bias = (torch.randn(k, device=DEVICE, dtype=DTYPE).requires_grad_() for k in (c, 1))
    target, valid = torch.rand(m, g, g, device=DEVICE), torch.rand(m, device=DEVICE) < 0.7
    inputs = (features, weight, bias)
    methods = {f"ours ({x})": lambda x=x: ops.aligner_mse(*inputs, target, valid=valid, backend=x) for x in backends}
    methods["eager"] = lambda: eager_mse(*inputs, target, valid)
    if compiled:
        quick = torch.compile(eager_mse)
        methods["compiled"] = lambda: quick(*inputs, target, valid)
    nbytes = 2 * features.nbytes + target.nbytes
    return [
        measure("aligner_mse", f"{m} words, {c} channels", name, f, inputs, 0, nbytes) for name, f in methods.items()
    ]


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
    path = write(words, tmp_path)
    plot(words, path.with_suffix(".png"))
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".png"}


def test_the_alternatives_compute_the_same():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, many, 8, generator=draw) for many in (9, 6, 6))
    tokens = torch.tensor([[3, 1]])
    layout = PatchLayout(
        torch.arange(6).view(1, 2, 3), torch.rand(1, 4, 2, generator=draw), torch.rand(1, 5, 3, generator=draw)
    )
    wanted = ops.word_attention(query, key, tokens, layout, backend="torch")
    for method in (eager, rows_first):
        torch.testing.assert_close(method(query, key, tokens, layout), wanted)
    weights, results = torch.rand(1, 6, 2, generator=draw), []
    for method in (lambda *x: ops.diffusion_attention(*x, backend="torch"), explicit, one_hot):
        maps = torch.ones(1, 2, 9)
        results.append((method(query, key, value, weights, maps), maps))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    features, weight, bias = torch.randn(3, 2, 4, 5, generator=draw), torch.randn(2, generator=draw), torch.randn(1)
    target, valid = torch.rand(3, 4, 5, generator=draw), torch.tensor([True, False, True])
    wanted = ops.aligner_mse(features, weight, bias, target, valid=valid, backend="torch")
    torch.testing.assert_close(eager_mse(features, weight, bias, target, valid), wanted)
