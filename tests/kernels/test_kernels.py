"""The Triton kernels against the reference in float64, gradients by its autograd. On a CPU they run in Triton's interpreter.

The interpreter is slow (shapes are small) and wrong in bf16 (tested on CUDA only).
The tolerance needs no table: error(kernel, float64) ≤ 2 × error(eager PyTorch in the same precision, float64) + 1e-5.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavender_min import ops, reference
from lavender_min.geometry import PatchLayout, resize_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is wrong in bf16")),
]
few = settings(max_examples=6, deadline=None, derandomize=True)


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def draw_word(seed=0, h=4, hkv=2, t=6, p=40, d=10, counts=(3, 3), hc=3, wc=5, gy=4, gx=3, dtype=torch.float32):
    """query and key strided as hosts have them ([b, length, heads, d] in memory), a layout with holes, rows of -1."""
    b, n = len(counts), sum(counts)
    query, key = (draw(seed + i, b, *s, d, dtype=dtype).transpose(1, 2) for i, s in enumerate(((t, h), (p, hkv))))
    make = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(p, generator=make)[: hc * wc].view(hc, wc) for _ in range(b)]).int()
    index[torch.rand(b, hc, wc, generator=make) < 0.15] = -1
    resize_y, resize_x = (resize_matrix(c, g).expand(b, -1, -1) for c, g in ((hc, gy), (wc, gx)))
    rows = torch.randint(0, t, (n,), generator=make, dtype=torch.int32)
    if n > 2:
        # no row; one picked twice
        rows[1], rows[-3] = -1, rows[-1]
    return query, key, rows.to(DEVICE), list(counts), PatchLayout(index, resize_y, resize_x).to(DEVICE)


def eager(query, key, rows, counts, layout, *, attn_mask=None, is_causal=False, scale=None):
    """Full attention maps in the dtype of the inputs, then pick and gather: what low-precision PyTorch would give."""
    (b, h, t, d), (hkv, p) = query.shape, key.shape[1:3]
    scores = query @ key.repeat_interleave(h // hkv, 1).mT * (d**-0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(t, p, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        bad = ~attn_mask if attn_mask.dtype == torch.bool else torch.zeros_like(attn_mask, dtype=torch.bool)
        scores = scores.masked_fill(bad, -torch.inf) + (
            0 if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
        )
    full = torch.nan_to_num(scores.softmax(-1))
    full = torch.cat([full, full.new_zeros(b, h, t, 1)], -1)
    picture = torch.tensor(
        [i for i, count in enumerate(counts) for _ in range(count)], device=rows.device, dtype=torch.long
    )
    heads = torch.arange(h, device=rows.device)[:, None, None]
    index, resize_y, resize_x = (x[picture] for x in layout)
    canvas = full[picture[:, None, None, None], heads, rows.long()[:, None, None, None], index[:, None].long()]
    out = torch.einsum("nhyx,nuy,nvx->nhuv", canvas, resize_y.to(query.dtype), resize_x.to(query.dtype))
    return out.masked_fill((rows < 0)[:, None, None, None], 0)


def close(got, low, exact):
    """The tolerance rule, for an output or a gradient."""
    assert torch.isfinite(got).all()
    error, allowed = ((x.double() - exact).abs().max().item() if x.numel() else 0 for x in (got, low))
    assert error <= 2 * allowed + 1e-5, f"error {error:.2e}; eager PyTorch in the same precision has {allowed:.2e}"


def with_gradients(function, inputs, *arguments, **options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *arguments, **options)
    return [out, *torch.autograd.grad((out * draw(99, *out.shape, dtype=out.dtype)).sum(), inputs)]


def check_word(seed=0, dtype=torch.float32, scale=None, is_causal=False, attn_mask=None, **sizes):
    query, key, *rest = draw_word(seed, dtype=dtype, **sizes)
    options = {"is_causal": is_causal, "scale": scale}
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(dtype)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    got = with_gradients(ops.word_attention, (query, key), *rest, attn_mask=mask, backend="triton", **options)
    low = with_gradients(eager, (query, key), *rest, attn_mask=mask, **options)
    rows, counts, layout = rest
    double = PatchLayout(layout.index, layout.resize_y.double(), layout.resize_x.double())
    inputs = (query.double(), key.double())
    exact = with_gradients(reference.word_attention, inputs, rows, counts, double, attn_mask=wide, **options)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype and got[1].stride() == query.stride()
    for x, y, z in zip(got, low, exact, strict=True):
        close(x, y, z)
    return got


# --- word_attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "bool", "bool, one row for all", "float, per head", "causal"])
def test_word_attention(kind):
    """Odd sizes, strides, rows of -1, a row picked twice, cells without a patch, keys outside, and several shares of keys."""
    mask = None
    if kind == "bool":
        mask = draw(5, 2, 1, 6, 90) > -0.5
        # rows that see nothing
        mask[0, 0, 3] = mask[1, 0, 5] = False
    elif kind == "bool, one row for all":
        mask = draw(5, 90) > -0.5
    elif kind == "float, per head":
        mask = draw(5, 1, 4, 6, 90).masked_fill(draw(6, 1, 4, 6, 90) > 1, -torch.inf)
    check_word(p=90, attn_mask=mask, is_causal=kind == "causal", scale=0.5 if kind == "none" else None)


@pytest.mark.parametrize("dtype", HALVES)
def test_word_attention_in_half_precision(dtype):
    check_word(dtype=dtype, d=16)
    check_word(seed=1, dtype=dtype, d=16, attn_mask=draw(5, 6, 40))
    check_word(dtype=dtype, d=16, scale=50.0)


@pytest.mark.parametrize(
    "sizes",
    [
        # enlarged: a canvas row reaches more than TAPS output rows
        {"hc": 8, "wc": 8, "gy": 32, "gx": 12, "p": 70, "counts": (1, 1)},
        # resampler latents as one line
        {"hc": 1, "wc": 64, "gy": 2, "gx": 7, "p": 64, "counts": (2, 2)},
        # four tiles in a row
        {"hc": 1, "wc": 160, "gy": 1, "gx": 16, "p": 170, "counts": (1,), "d": 4},
        # no grouping, one row
        {"h": 3, "hkv": 3, "t": 1, "counts": (1,), "d": 3},
        # 54 dot rows a key head
        {"h": 18, "hkv": 1, "counts": (3,)},
        # one key, one number a head, one cell
        {"p": 1, "hc": 1, "wc": 1, "gy": 1, "gx": 1, "d": 1, "counts": (1, 2)},
        # scores of up to 300: e^s is beyond fp32, and most keys get 0
        {"scale": 20.0},
    ],
    ids=["enlarged", "line", "wide", "single", "grouped", "one key", "large scores"],
)
def test_word_attention_shapes(sizes):
    check_word(**sizes)


@few
@given(st.data())
def test_word_attention_any_shape(data):
    def size(low, high):
        return data.draw(st.integers(low, high))

    hc, wc, hkv = size(1, 6), size(1, 7), size(1, 2)
    check_word(
        seed=size(0, 99), counts=[size(0, 4) for _ in range(size(1, 3))], hkv=hkv, h=hkv * size(1, 3), t=size(1, 9), d=size(1, 24),
        hc=hc, wc=wc,
        p=hc * wc + size(0, 30), gy=size(1, 6), gx=size(1, 6), is_causal=size(0, 1) == 1,
    )  # fmt: skip


def test_word_attention_of_a_cropped_canvas():
    """The picture ends at 2.5 of 4 rows and 3.2 of 5 columns: output comes from there, gradients go to all keys."""
    query, key, rows, counts, layout = draw_word(hc=4, wc=5)
    resize_y, resize_x = (
        resize_matrix(n, g, 0, stop).expand(2, -1, -1).to(DEVICE) for n, g, stop in ((4, 6, 2.5), (5, 3, 3.2))
    )
    assert (resize_y[..., 3] == 0).all()
    layout = PatchLayout(layout.index, resize_y, resize_x)
    got = with_gradients(ops.word_attention, (query, key), rows, counts, layout, backend="triton")
    want = with_gradients(reference.word_attention, (query, key), rows, counts, layout)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_word_attention_of_a_row_of_finfo_min_is_even():
    query, key, *rest = draw_word()
    mask = torch.full((6, 40), torch.finfo(torch.float32).min, device=DEVICE)
    got = ops.word_attention(query, key, *rest, attn_mask=mask, backend="triton")
    torch.testing.assert_close(got, reference.word_attention(query, key, *rest, attn_mask=mask))


@pytest.mark.parametrize("counts", [(3, 3), (9, 0, 2)])
def test_word_attention_is_bit_equal_twice(counts):
    query, key, *rest = draw_word(p=90, counts=counts)
    first, second = (with_gradients(ops.word_attention, (query, key), *rest, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("counts", "kind"), [((3, 0, 7), "none"), ((3, 0, 7), "bool"), ((17, 2, 0), "none"), ((0, 1, 9), "causal")]
)
def test_word_attention_of_a_ragged_batch(counts, kind):
    """Against float64, and against each picture by itself. One has no rows, (17, 2, 0) differ in blocks of 16 dot rows."""
    mask = draw(5, 3, 1, 6, 90) > -0.5 if kind == "bool" else None
    got = check_word(p=90, counts=counts, attn_mask=mask, is_causal=kind == "causal")
    query, key, rows, _, layout = draw_word(p=90, counts=counts)
    direction = draw(99, *got[0].shape).split(counts)
    for i, own in enumerate(rows.split(counts)):
        one = slice(i, i + 1)
        inputs = [x[one].detach().requires_grad_() for x in (query, key)]
        options = {"attn_mask": None if mask is None else mask[one], "is_causal": kind == "causal", "backend": "triton"}
        out = ops.word_attention(*inputs, own, [len(own)], PatchLayout(*(x[one] for x in layout)), **options)
        torch.testing.assert_close(out, got[0].split(counts)[i], atol=1e-6, rtol=1e-5)
        for x, y in zip(torch.autograd.grad((out * direction[i]).sum(), inputs), got[1:], strict=True):
            torch.testing.assert_close(x, y[one], atol=1e-6, rtol=1e-5)
    empty = counts.index(0)
    assert (got[1][empty] == 0).all() and (got[2][empty] == 0).all()


@pytest.mark.parametrize(
    "stored",
    [lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, x], -1)[..., 0], lambda x: x[:1].expand(2, -1, -1, -1)],
    ids=["vectors apart", "every other number", "one for both pictures"],
)
def test_word_attention_however_query_key_and_mask_are_stored(stored):
    query, key, *rest = draw_word()
    query, key = (x[:1].repeat(2, 1, 1, 1) for x in (query, key))
    mask = draw(5, 80, 12).mT[::2, ::2]

    def attention(query, key, stored, backend):
        return ops.word_attention(stored(query), stored(key), *rest, attn_mask=mask, backend=backend)

    got = with_gradients(attention, (query, key), stored, "triton")
    want = with_gradients(attention, (query, key), stored, "torch")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_word_attention_gradient_of_one_input_only():
    query, key, *rest = draw_word()
    whole = with_gradients(ops.word_attention, (query, key), *rest, backend="triton")
    only_key = with_gradients(lambda k: ops.word_attention(query, k, *rest, backend="triton"), (key,))
    only_query = with_gradients(lambda q: ops.word_attention(q, key, *rest, backend="triton"), (query,))
    assert torch.equal(whole[1], only_query[1]) and torch.equal(whole[2], only_key[1])


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes of any tensor made inside, the backward included."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_word_attention_never_holds_a_map_over_all_keys():
    """No tensor of h·n·p half-precision numbers (so none of h·t·p) is made; the reference, which makes one, trips the wire."""
    query, key, *rest = draw_word(h=8, hkv=1, counts=(4,), t=40, p=400, d=8, hc=3, wc=40)
    limit = 2 * 8 * 4 * 400
    for backend, small in (("triton", True), ("torch", False)):
        with LargestTensor() as seen:
            with_gradients(ops.word_attention, (query, key), *rest, backend=backend)
        assert (seen.largest < limit) == small, f"{backend}: {seen.largest} bytes, h·n·p in half precision = {limit}"


def test_word_attention_of_no_rows_sends_zeros_back():
    query, key, *rest = draw_word(counts=(0, 0))
    out, dquery, dkey = with_gradients(ops.word_attention, (query, key), *rest, backend="triton")
    assert out.shape == (0, 4, 4, 3) and (dquery == 0).all() and (dkey == 0).all()


def test_word_attention_limits():
    query, key, rows, counts, layout = draw_word()
    with pytest.raises(ValueError, match="query should be float32 or float16 or bfloat16; got float64"):
        ops.word_attention(query.double(), key.double(), rows, counts, layout, backend="triton")
    wide = layout._replace(resize_x=layout.resize_x.new_zeros(2, 129, 5))
    with pytest.raises(ValueError, match="takes gx up to 128; got 129; use backend='torch'"):
        ops.word_attention(query, key, rows, counts, wide, backend="triton")


# --- diffusion_attention ----------------------------------------------------------------------------------------------


def check_diffusion(dtype=torch.float32, b=1, h=2, q=20, length=7, d=10, w=3, scale=None):
    """q, k, v strided as in a UNet ([b, length, heads·d]); the maps start from something, not from 0."""
    query, key, value = (
        draw(i, b, many, h, d, dtype=dtype).transpose(1, 2) for i, many in enumerate((q, length, length))
    )
    weights, start = draw(3, b, length, w).softmax(1), draw(4, b, w, q)
    results = []
    for backend, inputs in (("triton", (query, key, value)), ("torch", [x.double() for x in (query, key, value)])):
        maps = start.to(inputs[0].dtype if backend == "torch" else torch.float32).clone()
        results.append((ops.diffusion_attention(*inputs, weights, maps, scale=scale, backend=backend), maps))
    (out, maps), (exact, exact_maps) = results
    low = (query @ key.mT * (d**-0.5 if scale is None else scale)).softmax(-1)
    assert out.dtype == dtype and out.stride() == query.stride()
    close(out, low @ value, exact)
    torch.testing.assert_close(maps.double(), exact_maps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d", [24, 40, 80, 160])
def test_diffusion_attention_head_dims(d):
    check_diffusion(d=d, length=77, h=1, q=18, w=17 if d == 24 else 5, scale=0.3 if d == 24 else None)


@pytest.mark.parametrize("dtype", HALVES)
def test_diffusion_attention_in_half_precision(dtype):
    check_diffusion(dtype=dtype, length=77, d=40, b=2)


def test_diffusion_attention_takes_texts_of_up_to_128_tokens():
    check_diffusion(length=128, d=16, h=1, q=3, w=1)
    with pytest.raises(ValueError, match="takes up to 128 tokens; got 129; use backend='torch'"):
        check_diffusion(length=129, d=16, h=1, q=3, w=1)


@few
@given(*(st.integers(low, high) for low, high in ((1, 2), (1, 3), (1, 40), (1, 20), (1, 40), (0, 5))))
def test_diffusion_attention_any_shape(b, h, q, length, d, w):
    check_diffusion(b=b, h=h, q=q, length=length, d=d, w=w)
