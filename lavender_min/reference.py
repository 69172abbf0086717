"""The three ops in plain PyTorch: what the Triton kernels must equal, and what runs on a CPU.

Everything is computed in float32 (float64 for float64 inputs), whatever the inputs are stored in, because maps are small
numbers: one key out of 6,404 gets 0.00016 on average.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from lavender_min.geometry import PatchLayout

# in the min-max normalisation, as in the paper's code
EPS = 1e-6


def word_attention(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b hkv p d"],
    rows: Int[Tensor, " n"],
    counts: Sequence[int],
    layout: PatchLayout,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "n h gy gx"]:
    """Attention of picked rows of the query over the picture, one map a head: out = resize_y · A[..., index] · resize_xᵀ.

    `rows` is one list for the whole batch, picture after picture; picture i has counts[i] of them.

    1. Rows first: only the n picked rows of the query are scored, never all t.
    2. A is the softmax over all keys. Query head i reads key head i // (h / hkv), so K is never repeated.
    3. The keys of `layout` are put in picture order (index −1: no patch, 0) and resampled to gy × gx.

    Steps 2 and 3 are done for one picture and one key head at a time (`head_maps`): its scores fit in the processor's cache.
    Rows of −1 and rows whose keys are all masked (False or −inf) are 0.
    """
    (b, h, t, d), (hkv, p), n = query.shape, key.shape[1:3], len(rows)
    dtype = torch.promote_types(query.dtype, torch.float32)
    picture = torch.arange(b).repeat_interleave(torch.tensor(counts, dtype=torch.long)).to(rows.device)
    nothing, row = rows[:, None] < 0, rows.long().clamp(min=0)
    picked = query[picture, :, row].to(dtype) * (d**-0.5 if scale is None else scale)  # [n, h, d]

    mask = None
    if is_causal:
        mask = additive(torch.arange(p, device=rows.device) <= row[:, None, None], dtype)
    elif attn_mask is not None:
        mask = additive(attn_mask[(None,) * (4 - attn_mask.ndim)].expand(b, -1, t, p)[picture, :, row], dtype)
    if mask is not None:
        # softmax of a row with no key left would be 0 / 0
        dead = (mask == -torch.inf).all(-1)
        mask, nothing = mask.masked_fill(dead[..., None], 0).expand(n, h, p), nothing | dead

    queries = by_key_head(picked, counts, hkv)
    masks = [None] * len(queries) if mask is None else by_key_head(mask, counts, hkv)
    # unbind: the gradient of a slice would be as large as all of K, once for every slice
    keys = rearrange(key, "b hkv p d -> (b hkv) p d").unbind()
    layouts = list(zip(layout.index.long(), layout.resize_y.to(dtype), layout.resize_x.to(dtype), strict=True))
    maps = [
        head_maps(q, k.to(dtype), m, *layouts[i // hkv])
        for i, (q, k, m) in enumerate(zip(queries, keys, masks, strict=True))
    ]
    out = torch.cat([torch.cat(maps[i : i + hkv], 1) for i in range(0, b * hkv, hkv)])
    return out.masked_fill(nothing[..., None, None], 0) if nothing.any() else out


def head_maps(
    query: Float[Tensor, "n group d"],
    key: Float[Tensor, "p d"],
    mask: Float[Tensor, "n group p"] | None,
    index: Int[Tensor, "hc wc"],
    resize_y: Float[Tensor, "gy hc"],
    resize_x: Float[Tensor, "gx wc"],
) -> Float[Tensor, "n group gy gx"]:
    """The maps of one picture through one key head: resize_y · softmax(query · keyᵀ + mask)[..., index] · resize_xᵀ."""
    (n, group, _), (p, _) = query.shape, key.shape
    scores = (query.flatten(0, 1) @ key.mT).view(n, group, p)
    if mask is not None:
        scores += mask
    cells = index.clamp(min=0).flatten().expand(n, group, -1)
    canvas = scores.softmax(-1).gather(-1, cells).unflatten(-1, index.shape)
    if (index < 0).any():
        canvas = canvas.masked_fill(index < 0, 0)
    return resize_y @ canvas @ resize_x.mT


def by_key_head(x: Float[Tensor, "n h _"], counts: Sequence[int], hkv: int) -> list[Tensor]:
    """[n, h, ·] -> one [counts[i], h / hkv, ·] for each picture i and each key head, picture after picture."""
    return [block for own in x.split(list(counts)) for block in own.chunk(hkv, 1)]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: where a bool one is False, −inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask.to(dtype)


@torch.no_grad()
def diffusion_attention(
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b h t d"],
    value: Float[Tensor, "b h t d"],
    word_weights: Float[Tensor, "b t w"],
    maps: Float[Tensor, "b w q"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h q d"]:
    """The UNet's cross-attention output; in the same pass `maps += mean over heads of A · word_weights`, in place.

    A word's column of `word_weights` is 1/k on its k text tokens: its map is the mean of theirs. No gradient.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = einsum(query.to(dtype) * scale, key.to(dtype), "b h q d, b h t d -> b h q t")
    attention = scores.softmax(-1)
    maps += einsum(attention.mean(1), word_weights.to(dtype), "b q t, b t w -> b w q")
    return einsum(attention, value.to(dtype), "b h q t, b h t d -> b h q d").to(query.dtype)


def aligner_mse(
    features: Float[Tensor, "m c gy gx"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, ""] | Float[Tensor, " 1"],
    target: Float[Tensor, "m gy gx"],
    *,
    output: str = "minmax",
    trust: Float[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Mean squared error between the Aligner's maps and their targets, over cells and, weighted by trust τ, over words:

        loss = Σ_m τ_m Σ_cells error² / (cells · Σ_m τ_m)

    map = features · weight + bias; output "minmax" makes it (map - min) / (max - min + 1e-6), "none" leaves it.
    The gradient goes through min and max too; cells that tie for one share its gradient evenly. A constant map has no
    direction in which to stretch (and 1 / 1e-6 would drown the batch): it counts in the loss, with gradient 0.
    A word of trust 0 is not looked at. No trust in any word: exactly 0, with zero gradients.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    kept = trust > 0
    features, target, trust = features[kept].to(dtype), target[kept].to(dtype), trust[kept].to(dtype)
    predicted = einsum(features, weight.to(dtype), "m c gy gx, c -> m gy gx") + bias.to(dtype)
    if output == "minmax":
        low, high = predicted.amin((1, 2), keepdim=True), predicted.amax((1, 2), keepdim=True)
        # x / inf: value 0, gradient 0
        spread = torch.where(high > low, high - low + EPS, torch.inf)
        predicted = (predicted - low) / spread
    cells = target.shape[1] * target.shape[2]
    error = (predicted - target).square() * trust[:, None, None]
    return error.sum() / (cells * trust.sum() if len(trust) else 1)
