"""The three ops in plain PyTorch: what the Triton kernels must equal, and what runs on a CPU.

Everything is computed in float32 (float64 for float64 inputs), whatever the inputs are stored in, because maps are small
numbers: one key out of 6,404 gets 0.00016 on average.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lavender_min.geometry import PatchLayout

EPS = 1e-6  # in the min-max normalisation, as in the paper's code


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

    `rows` is one list for the whole batch, picture after picture; picture i has counts[i] of them. For each picture:

    1. Rows first: only the picked rows are scored, so the largest tensor is [h, n, p], never [h, t, p].
    2. A is the softmax over all keys; query head i reads key head i // (h / hkv), so K is never repeated.
    3. The keys of `layout` are put in picture order (index −1: no patch, 0) and resampled to gy × gx.

    Rows of −1 and rows whose keys are all masked (False or −inf) are 0.
    """
    (b, h, t, d), (hkv, p) = query.shape, key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = d**-0.5 if scale is None else scale
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)].expand(b, -1, t, p)
    maps = []
    for i, row in enumerate(rows.long().split(list(counts))):
        nothing, row = row < 0, row.clamp(min=0)
        picked = rearrange(query[i, :, row].to(dtype) * scale, "(hkv group) n d -> hkv (group n) d", hkv=hkv)
        scores = (picked @ key[i].to(dtype).mT).view(h, -1, p)
        if is_causal or attn_mask is not None:
            mask = attn_mask[i, :, row] if attn_mask is not None else torch.arange(p, device=row.device) <= row[:, None]
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
            # a row with no key left would be 0 / 0
            dead = (mask == -torch.inf).all(-1)
            scores, nothing = scores + mask.masked_fill(dead[..., None], 0), nothing | dead
        attention = scores.softmax(-1)

        index = layout.index[i].long()
        canvas = attention[..., index.clamp(min=0)]
        if (index < 0).any():
            canvas = canvas.masked_fill(index < 0, 0)
        out = layout.resize_y[i].to(dtype) @ canvas @ layout.resize_x[i].to(dtype).mT
        maps.append(rearrange(out.masked_fill(nothing[..., None, None], 0), "h n gy gx -> n h gy gx"))
    return torch.cat(maps)


@torch.no_grad()
def diffusion_attention(
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b h l d"],
    value: Float[Tensor, "b h l d"],
    word_weights: Float[Tensor, "b l w"],
    maps: Float[Tensor, "b w q"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h q d"]:
    """The UNet's cross-attention output; in the same pass `maps += mean over heads of A · word_weights`, in place.

    A word's column of `word_weights` is 1/k on its k text tokens: its map is the mean of theirs. No gradient.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = einsum(query.to(dtype) * scale, key.to(dtype), "b h q d, b h l d -> b h q l")
    attention = scores.softmax(-1)
    maps += einsum(attention.mean(1), word_weights.to(dtype), "b q l, b l w -> b w q")
    return einsum(attention, value.to(dtype), "b h q l, b h l d -> b h q d").to(query.dtype)


def aligner_mse(
    features: Float[Tensor, "m c gy gx"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, ""] | Float[Tensor, " 1"],
    target: Float[Tensor, "m gy gx"],
    *,
    output: str = "minmax",
    valid: Bool[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Mean squared error between the Aligner's maps and their targets, over the cells of valid words.

    map = features · weight + bias; output "minmax" makes it (map - min) / (max - min + 1e-6), "none" leaves it.
    The gradient goes through min and max too; cells that tie for one share its gradient evenly. A constant map has no
    direction in which to stretch (and 1 / 1e-6 would drown the batch): it counts in the loss, with gradient 0.
    No valid word: exactly 0, with zero gradients.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    features, target = features[valid].to(dtype), target[valid].to(dtype)
    predicted = einsum(features, weight.to(dtype), "m c gy gx, c -> m gy gx") + bias.to(dtype)
    if output == "minmax":
        low, high = predicted.amin((1, 2), keepdim=True), predicted.amax((1, 2), keepdim=True)
        spread = torch.where(high > low, high - low + EPS, torch.inf)  # x / inf: value 0, gradient 0
        predicted = (predicted - low) / spread
    return (predicted - target).square().sum() / max(predicted.numel(), 1)
