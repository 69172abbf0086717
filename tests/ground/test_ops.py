"""The PyTorch reference against first principles: float64 loops, scaled_dot_product_attention, autograd, gradcheck."""

import logging

import jaxtyping
import pytest
import torch
from torch.nn import functional as F

from lavender_min import ops, reference
from lavender_min.geometry import PatchLayout


def draw_layout(b, hc, wc, gy, gx, p, holes=0.2, dtype=torch.float64, seed=0):
    """Distinct keys in random cells, some cells empty; random resampling rows that sum to 1."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(p, generator=draw)[: hc * wc].reshape(hc, wc) for _ in range(b)]).int()
    index[torch.rand(b, hc, wc, generator=draw) < holes] = -1
    rows, cols = (torch.rand(b, g, c, generator=draw, dtype=dtype) for g, c in ((gy, hc), (gx, wc)))
    return PatchLayout(index, rows / rows.sum(-1, keepdim=True), cols / cols.sum(-1, keepdim=True))


def draw_qk(b=2, h=4, hkv=2, t=6, p=15, d=5, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(b, heads, length, d, generator=draw, dtype=dtype) for heads, length in ((h, t), (hkv, p)))


def slow_word_attention(query, key, rows, counts, layout, attn_mask=None, is_causal=False, scale=None):
    """The definition, one row at a time; A comes from scaled_dot_product_attention with the identity as value."""
    b, h, t, _ = query.shape
    p = key.shape[2]
    key = key.repeat_interleave(h // key.shape[1], 1)
    eye = torch.eye(p, dtype=query.dtype).expand(b, h, p, p)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(b, h, query.shape[2], p)
    full = F.scaled_dot_product_attention(query, key, eye, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    pictures = [i for i in range(b) for _ in range(counts[i])]
    out = []
    for i, row in zip(pictures, rows.tolist(), strict=True):
        for head in range(h):
            # index −1 reads the 0 at the end
            attention = torch.cat([full[i, head, row], full.new_zeros(1)])
            canvas = attention[layout.index[i].long()]
            out.append(layout.resize_y[i] @ canvas @ layout.resize_x[i].T * (row >= 0))
    return torch.stack(out).unflatten(0, (len(rows), h))


def masks(b, h, t, p):
    draw = torch.Generator().manual_seed(3)
    bools = torch.rand(b, 1, t, p, generator=draw) < 0.6
    bools[..., 0] = True
    floats = torch.randn(1, h, 1, p, generator=draw, dtype=torch.float64)
    return {"none": None, "bool": bools, "float": floats, "keys": bools[0, 0, 0], "2d": bools[0, 0]}


@pytest.mark.parametrize("kind", ["none", "bool", "float", "keys", "2d", "causal"])
def test_word_attention_is_sdpa_then_resampling(kind):
    query, key = draw_qk()
    layout = draw_layout(2, 3, 4, 5, 2, p=15)
    rows, counts = torch.tensor([0, 5, 3, 3, 2, -1, 4], dtype=torch.int32), [4, 3]
    mask = masks(2, 4, 6, 15).get(kind)
    query.requires_grad_(), key.requires_grad_()
    wanted = slow_word_attention(query, key, rows, counts, layout, mask, kind == "causal", scale=0.7)
    got = ops.word_attention(query, key, rows, counts, layout, attn_mask=mask, is_causal=kind == "causal", scale=0.7)
    assert got.shape == (7, 4, 5, 2)
    torch.testing.assert_close(got, wanted)
    direction = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((x * direction).sum(), (query, key)) for x in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_word_attention_gradcheck():
    query, key = draw_qk(b=1, h=2, hkv=1, t=3, p=7, d=3)
    layout = draw_layout(1, 2, 3, 2, 3, p=7)
    rows = torch.tensor([2, 0, -1], dtype=torch.int32)
    mask = torch.ones(3, 7, dtype=torch.bool)
    # row 0 sees nothing
    mask[0] = False
    assert torch.autograd.gradcheck(
        lambda q, k: reference.word_attention(q, k, rows, [3], layout, attn_mask=mask),
        (query.requires_grad_(), key.requires_grad_()),
    )


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_with_no_key_left_are_zero_and_send_no_nan_back(kind):
    query, key = draw_qk(dtype=torch.float32)
    mask = torch.ones(6, 15, dtype=torch.bool)
    mask[3] = False
    if kind == "float":
        mask = torch.zeros(6, 15).masked_fill(~mask, -torch.inf)
    rows, layout = torch.tensor([3, 1, 0, 3], dtype=torch.int32), draw_layout(2, 3, 4, 4, 4, 15, dtype=torch.float32)
    query.requires_grad_(), key.requires_grad_()
    out = ops.word_attention(query, key, rows, [2, 2], layout, attn_mask=mask)
    assert (out[0] == 0).all() and (out[3] == 0).all() and (out[1] != 0).any() and (out[2] != 0).any()
    out.square().sum().backward()
    assert query.grad.isfinite().all() and key.grad.isfinite().all() and (query.grad[:, :, 3] == 0).all()


def test_a_float_mask_of_finfo_min_everywhere_spreads_evenly_as_in_sdpa():
    query, key = draw_qk(dtype=torch.float32)
    layout = PatchLayout(
        torch.arange(15, dtype=torch.int32).view(1, 3, 5).repeat(2, 1, 1),
        *(torch.eye(n).repeat(2, 1, 1) for n in (3, 5)),
    )
    mask = torch.full((6, 15), torch.finfo(torch.float32).min)
    out = ops.word_attention(query, key, torch.zeros(2, dtype=torch.int32), [1, 1], layout, attn_mask=mask)
    torch.testing.assert_close(out, torch.full_like(out, 1 / 15))


def test_keys_outside_the_layout_get_gradients_through_the_softmax():
    query, key = draw_qk()
    layout = draw_layout(2, 2, 2, 2, 2, p=15, holes=0)
    key.requires_grad_()
    ops.word_attention(query, key, torch.tensor([0, 1]), [1, 1], layout).square().sum().backward()
    inside = torch.zeros(2, 15, dtype=torch.bool).scatter(1, layout.index.flatten(1).long(), True)
    assert (key.grad.abs().sum((1, 3))[~inside] > 0).all()


@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
def test_a_ragged_batch_is_each_picture_by_itself(kind):
    """Pictures with many rows, with none and with few, to the bit; the gradients too."""
    query, key = (x.requires_grad_() for x in draw_qk(b=3))
    layout, counts = draw_layout(3, 3, 4, 5, 2, p=15), [3, 0, 7]
    rows = torch.tensor([5, -1, 0, 4, 4, 1, 0, 3, 2, 5])
    mask = masks(3, 4, 6, 15).get(kind)
    out = ops.word_attention(query, key, rows, counts, layout, attn_mask=mask, is_causal=kind == "causal")
    alone = []
    for i, own in enumerate(rows.split(counts)):
        one = slice(i, i + 1)
        part = None if mask is None else mask[one] if len(mask) == 3 else mask
        parts = PatchLayout(*(x[one] for x in layout))
        alone.append(
            ops.word_attention(query[one], key[one], own, [len(own)], parts, attn_mask=part, is_causal=kind == "causal")
        )
    assert [len(x) for x in alone] == counts and torch.equal(out, torch.cat(alone))
    direction = torch.randn_like(out)
    got, want = (torch.autograd.grad((x * direction).sum(), (query, key)) for x in (out, torch.cat(alone)))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert (got[0][1] == 0).all() and (got[1][1] == 0).all() and (got[1][2] != 0).any()


def test_word_attention_without_rows_is_empty_and_sends_zeros_back():
    query, key = (x.requires_grad_() for x in draw_qk())
    out = ops.word_attention(query, key, torch.zeros(0, dtype=torch.int32), [0, 0], draw_layout(2, 3, 4, 5, 2, p=15))
    assert out.shape == (0, 4, 5, 2)
    out.sum().backward()
    assert (query.grad == 0).all() and (key.grad == 0).all()


def test_half_inputs_are_computed_in_float32():
    query, key = (x.bfloat16() for x in draw_qk(dtype=torch.float32))
    layout, rows = draw_layout(2, 3, 4, 4, 4, 15, dtype=torch.float32), torch.tensor([0, 1, 2, 3])
    out = ops.word_attention(query, key, rows, [2, 2], layout)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, ops.word_attention(query.float(), key.float(), rows, [2, 2], layout))


def test_diffusion_attention_is_sdpa_and_adds_word_maps():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 4, generator=draw, dtype=torch.float64) for n in (16, 7, 7))
    weights = torch.rand(2, 7, 5, generator=draw, dtype=torch.float64)
    maps = torch.ones(2, 5, 16, dtype=torch.float64)
    out = ops.diffusion_attention(query, key, value, weights, maps, scale=0.4)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, scale=0.4))
    # the maps are the attention's output with the weights as value
    one_hot = weights[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(maps, 1 + F.scaled_dot_product_attention(query, key, one_hot, scale=0.4).mean(1).mT)


def test_diffusion_attention_with_no_words_and_with_gradients():
    query, key = torch.randn(1, 2, 16, 4), torch.randn(1, 2, 7, 4)
    out = ops.diffusion_attention(query, key, key, torch.zeros(1, 7, 0), torch.zeros(1, 0, 16))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, key))
    with pytest.raises(ValueError, match="has no gradient"):
        ops.diffusion_attention(query.requires_grad_(), key, key, torch.zeros(1, 7, 1), torch.zeros(1, 1, 16))


def draw_aligner(m=5, c=3, gy=4, gx=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(m, c, gy, gx, generator=draw, dtype=torch.float64)
    weight, bias = (
        torch.randn(c, generator=draw, dtype=torch.float64),
        torch.randn((), generator=draw, dtype=torch.float64),
    )
    target = torch.rand(m, gy, gx, generator=draw, dtype=torch.float64)
    return (
        [x.requires_grad_() for x in (features, weight, bias)],
        target,
        # One word is not looked at, the others count differently.
        torch.tensor([1.0, 0.0, 0.25, 2.0, 0.0]),
    )


@pytest.mark.parametrize("output", ["minmax", "none"])
def test_aligner_mse_is_conv_minmax_mse(output):
    (features, weight, bias), target, trust = draw_aligner()
    predicted = F.conv2d(features, weight[None, :, None, None], bias[None])[:, 0]
    if output == "minmax":
        low, high = predicted.flatten(1).min(1).values, predicted.flatten(1).max(1).values
        predicted = (predicted - low[:, None, None]) / (high - low + 1e-6)[:, None, None]
    wanted = sum(t * F.mse_loss(p, y) for t, p, y in zip(trust, predicted, target, strict=True)) / trust.sum()
    got = ops.aligner_mse(features, weight, bias, target, output=output, trust=trust)
    torch.testing.assert_close(got, wanted)
    inputs = (features, weight, bias)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("output", ["minmax", "none"])
def test_aligner_mse_gradcheck(output):
    inputs, target, trust = draw_aligner(m=5, c=2, gy=2, gx=3)
    assert torch.autograd.gradcheck(lambda *x: reference.aligner_mse(*x, target, output=output, trust=trust), inputs)


def test_aligner_mse_without_trust_is_exactly_zero():
    inputs, target, trust = draw_aligner()
    loss = ops.aligner_mse(*inputs, target, trust=torch.zeros_like(trust))
    loss.backward()
    assert loss == 0 and all(x.grad is not None and (x.grad == 0).all() for x in inputs)


def test_aligner_mse_constant_map_counts_in_the_loss_and_not_in_the_gradient():
    (features, weight, bias), target, trust = draw_aligner()
    constant = torch.ones_like(features).requires_grad_()
    loss = ops.aligner_mse(constant, weight, bias, target, trust=trust)
    torch.testing.assert_close(loss, (target.square().mean((1, 2)) * trust).sum() / trust.sum())
    loss.backward()
    assert all((x.grad == 0).all() for x in (constant, weight, bias))


def test_aligner_mse_ties_share_the_gradient():
    """Two cells tie for the maximum: each gets half of what central differences of both together give."""
    features = torch.tensor([0.0, 0.3, 1.0, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    target, trust = torch.tensor([0.2, 0.1, 0.5, 0.9], dtype=torch.float64).view(1, 2, 2), torch.tensor([3.0])
    weight, bias = torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    loss = lambda x: reference.aligner_mse(x, weight, bias, target, trust=trust)  # noqa: E731
    grad = torch.autograd.grad(loss(features.requires_grad_()), features)[0].flatten()
    step = torch.tensor([0, 0, 1, 1], dtype=torch.float64).view(1, 1, 2, 2) * 1e-6
    both = (loss(features + step) - loss(features - step)) / 2e-6
    torch.testing.assert_close(grad[2] + grad[3], both, atol=1e-8, rtol=1e-6)


# --- dispatch ---------------------------------------------------------------------------------------------------------


def test_backend_choice(monkeypatch, caplog):
    monkeypatch.delenv("LAVENDER_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ops._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="lavender_min.ops"):
        assert ops.choose_backend(torch.zeros(1)) == "torch"
        assert ops.choose_backend(torch.zeros(1)) == "torch"
    assert [r.message for r in caplog.records] == ["attention ops run on torch (cpu tensors)"]
    with pytest.raises(ValueError, match="need CUDA tensors; got cpu .asked for."):
        ops.choose_backend(torch.zeros(1), "triton")
    monkeypatch.setenv("LAVENDER_BACKEND", "triton")
    with pytest.raises(ValueError, match="need CUDA tensors; got cpu .LAVENDER_BACKEND."):
        ops.choose_backend(torch.zeros(1))
    assert ops.choose_backend(torch.zeros(1), "torch") == "torch"
    monkeypatch.setenv("LAVENDER_BACKEND", "cuda")
    with pytest.raises(ValueError, match="should be one of triton, torch; got 'cuda'"):
        ops.choose_backend(torch.zeros(1))


@pytest.fixture
def annotations_unchecked(monkeypatch):
    """The tests check annotations at run time, before an op can say anything itself."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key": torch.zeros(2, 2, 15, 6)},
            r"key should be \[b, hkv, p, d\] with b=2 \(from query\), d=5 .*got \[2, 2, 15, 6\]",
        ),
        ({"key": torch.zeros(2, 3, 15, 5)}, "4 query heads cannot be shared out over 3 key heads"),
        ({"key": torch.zeros(2, 2, 15, 5).half()}, "key should be float32; got float16"),
        ({"rows": torch.zeros(5)}, "rows should be int32 or int64; got float32"),
        ({"rows": torch.zeros(2, 3, dtype=torch.int32)}, r"rows should be \[n\]; got \[2, 3\]"),
        ({"counts": [5]}, r"counts should be 2 whole numbers .* that add up to n=5 .from rows.; got \[5\]"),
        ({"counts": [3, 1]}, r"add up to n=5 .from rows.; got \[3, 1\]"),
        ({"counts": [6, -1]}, r"got \[6, -1\]"),
        ({"counts": torch.tensor([3, 2])}, r"got \[tensor\(3\), tensor\(2\)\]"),
        (
            {"attn_mask": torch.zeros(6, 14)},
            r"attn_mask should broadcast to \[b, h, t, p\] = \[2, 4, 6, 15\]; got \[6, 14\]",
        ),
        ({"attn_mask": torch.ones(6, 15), "is_causal": True}, "not both"),
        ({"attn_mask": torch.ones(6, 15).requires_grad_()}, "attn_mask gets no gradient"),
        ({"query": torch.zeros(2, 6, 5)}, r"query should be \[b, h, t, d\]; got \[2, 6, 5\]"),
    ],
)
def test_word_attention_says_what_is_wrong(change, message, annotations_unchecked):
    query, key = draw_qk(dtype=torch.float32)
    arguments = {"query": query, "key": key, "rows": torch.zeros(5, dtype=torch.int32), "counts": [3, 2]}
    arguments["layout"] = draw_layout(2, 3, 4, 4, 4, 15, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.word_attention(**(arguments | change))


def test_other_ops_say_what_is_wrong(annotations_unchecked):
    x = torch.zeros(2, 3, 16, 4)
    with pytest.raises(ValueError, match=r"maps should be \[b, w, q\] with b=2 .*; got \[2, 5, 15\]"):
        ops.diffusion_attention(x, x[:, :, :7], x[:, :, :7], torch.zeros(2, 7, 5), torch.zeros(2, 5, 15))
    with pytest.raises(ValueError, match="maps should be float32; got float16"):
        ops.diffusion_attention(x, x[:, :, :7], x[:, :, :7], torch.zeros(2, 7, 5), torch.zeros(2, 5, 16).half())
    (features, weight, bias), target, trust = draw_aligner()
    with pytest.raises(ValueError, match='output should be "minmax" or "none"'):
        ops.aligner_mse(features, weight, bias, target, output="softmax", trust=trust)
    with pytest.raises(ValueError, match="bias should be one number"):
        ops.aligner_mse(features, weight, weight, target, trust=trust)
