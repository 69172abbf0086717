"""What one would write without the ops, and rows of measurements that hold the ops beside it.

On a GPU the kernels in bf16, on a CPU the PyTorch backend. Nothing here knows pytest, so any script can measure with it.
"""

import shutil
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from measure import DEVICE, DTYPE, OWN, Ratio, Row, compare, measure
from torch.nn import functional as F

from lavender_min import ops
from lavender_min.geometry import PatchLayout, resize_matrix

LLAMA = {"h": 32, "hkv": 8, "d": 128, "t": 512, "n": 32, "tiles": 4, "b": 1, "patches": 40, "g": 32}
TOY = {"h": 4, "hkv": 2, "d": 16, "t": 8, "n": 2, "tiles": 1, "b": 1, "patches": 4, "g": 4}
# bytes: eager maps that would need more are left out
MOST = 16 * 2**30 if DEVICE == "cuda" else 6 * 2**30
COMPILES = DEVICE == "cuda" or shutil.which("g++") is not None

# --- word_attention ---------------------------------------------------------------------------------------------------
# These pick equally many rows of every picture: `rows` is then [b, n], laid flat, and whole batches go through one product.


def resample(attention, layout):
    """[b, h, n, p] -> [b·n, h, gy, gx], as everyone would: gather, then two products."""
    index = layout.index.long().flatten(1)
    canvas = attention.gather(-1, repeat(index, "b c -> b h n c", h=attention.shape[1], n=attention.shape[2]))
    canvas = canvas.unflatten(-1, layout.index.shape[1:]).to(layout.resize_y.dtype)
    out = layout.resize_y[:, None, None] @ canvas @ layout.resize_x.mT[:, None, None]
    return rearrange(out, "b h n y x -> (b n) h y x")


def eager(query, key, rows, counts, layout):
    """Attention as transformers' eager path computes it, the whole [b, h, t, p], then the rows and keys that are wanted."""
    key = repeat(key, "b hkv p d -> b (hkv group) p d", group=query.shape[1] // key.shape[1])
    scores = query @ key.mT * query.shape[-1] ** -0.5
    attention = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    rows = repeat(rows.long(), "(b n) -> b h n p", b=len(counts), h=query.shape[1], p=key.shape[2])
    return resample(attention.gather(2, rows), layout)


def rows_first(query, key, rows, counts, layout):
    """Pick the rows, then softmax: [b, h, n, p]. The natural improvement, and what torch.compile is given."""
    rows = repeat(rows.long(), "(b n) -> b h n d", b=len(counts), h=query.shape[1], d=query.shape[3])
    query = query.gather(2, rows)
    query = rearrange(query, "b (hkv group) n d -> b hkv (group n) d", hkv=key.shape[1])
    attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
    return resample(rearrange(attention, "b hkv (group n) p -> b (hkv group) n p", n=counts[0]), layout)


def word_arguments(h, hkv, d, t, n, tiles, b, patches, g):
    """query, key, n rows of each of b pictures, counts, and the layout of `tiles` tiles of 1 + patches² keys."""
    p, high, wide = tiles * (patches**2 + 1), patches * (2 if tiles == 4 else 1), patches * min(tiles, 2)
    if tiles == 3:
        high, wide = patches, 3 * patches
    query = torch.randn(b, t, h, d, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
    key = torch.randn(b, p, hkv, d, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
    rows = torch.cat([torch.randperm(t)[:n] for _ in range(b)]).int().to(DEVICE)
    tile = torch.arange(tiles)[:, None, None] * (patches**2 + 1) + 1 + torch.arange(patches**2).view(patches, patches)
    index = rearrange(tile, "(ty tx) y x -> (ty y) (tx x)", ty=high // patches).int().expand(b, -1, -1)
    layout = PatchLayout(index, *(resize_matrix(m, g).expand(b, -1, -1) for m in (high, wide))).to(DEVICE)
    return query, key, rows, [n] * b, layout


def word_rows(case: str, backends: Sequence[str] = (OWN,), compiled: bool = COMPILES, **sizes) -> list[Row]:
    """The sizes are those of `word_arguments`."""
    query, key, *_ = arguments = word_arguments(**sizes)
    (b, h, t, d), p, n, g = query.shape, key.shape[2], sizes["n"], sizes["g"]
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


def word_ratio(case: str, turns: int, **sizes) -> Ratio:
    """The PyTorch backend over rows first, on a CPU."""
    query, key, *_ = arguments = word_arguments(**sizes)
    methods = {
        "ours (torch)": lambda: ops.word_attention(*arguments, backend="torch"),
        "rows first": lambda: rows_first(*arguments),
    }
    return compare("word_attention, torch over rows first", case, methods, (query, key), turns)


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


# --- aligner_mse ------------------------------------------------------------------------------------------------------


def eager_mse(features, weight, bias, target, trust):
    maps = F.conv2d(features, weight[None, :, None, None], bias)[:, 0].float()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    error = ((maps - low) / (high - low + 1e-6) - target).square().mean((1, 2))
    return (error * trust).sum() / trust.sum().clamp(min=1)


def aligner_rows(m=256, c=32, g=32, backends=(OWN,), compiled=COMPILES) -> list[Row]:
    features = torch.randn(m, c, g, g, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight, bias = (torch.randn(k, device=DEVICE, dtype=DTYPE).requires_grad_() for k in (c, 1))
    target, trust = torch.rand(m, g, g, device=DEVICE), (torch.rand(m, device=DEVICE) < 0.7).float()
    inputs = (features, weight, bias)
    methods = {f"ours ({x})": lambda x=x: ops.aligner_mse(*inputs, target, trust=trust, backend=x) for x in backends}
    methods["eager"] = lambda: eager_mse(*inputs, target, trust)
    if compiled:
        quick = torch.compile(eager_mse)
        methods["compiled"] = lambda: quick(*inputs, target, trust)
    nbytes = 2 * features.nbytes + target.nbytes
    return [
        measure("aligner_mse", f"{m} words, {c} channels", name, f, inputs, 0, nbytes) for name, f in methods.items()
    ]
