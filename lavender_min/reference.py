"""The three ops in plain PyTorch: what the Triton kernels must equal, and what runs on a CPU.

Everything is computed in float32 (float64 for float64 inputs), whatever the inputs are stored in, because maps are small
numbers: one key out of 6,404 gets 0.00016 on average.
"""

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPS = 1e-6  # in the min-max normalisation, as in the paper's code


def word_attention(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b hkv p d"],
    tokens: Int[Tensor, "b n"],
    layout,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b n h gy gx"]:
    """Attention of picked text tokens over the picture, one map a head: out = resize_y · A[..., index] · resize_xᵀ.

    1. Rows first: only the n picked tokens are scored, so the largest tensor is [b, h, n, p], never [b, h, t, p].
    2. A is the softmax over all keys; query head i reads key head i // (h / hkv), so K is never repeated.
    3. The keys of `layout` are put in picture order (index −1: no patch, 0) and resampled to gy × gx.

    Rows of padding (token −1) and rows whose keys are all masked (False or −inf) are 0.
    """
    b, h, _, d = query.shape
    (hkv, p), n = key.shape[1:3], tokens.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    row = tokens.long().clamp(min=0)

    picked = query.gather(2, repeat(row, "b n -> b h n d", h=h, d=d)).to(dtype)
    picked = rearrange(picked, "b (hkv group) n d -> b hkv (group n) d", hkv=hkv, n=n)
    scores = (picked * (d**-0.5 if scale is None else scale)) @ key.to(dtype).mT
    scores = scores.view(b, h, n, p)  # heads (hkv group) again

    if is_causal:
        mask = rearrange(torch.arange(p, device=key.device) <= row[..., None], "b n p -> b 1 n p")
    elif attn_mask is not None:
        mask = attn_mask[(None,) * (4 - attn_mask.ndim)].expand(b, -1, -1, p)  # [b, 1|h, 1|t, p]
        if mask.shape[2] > 1:
            mask = mask.gather(2, repeat(row, "b n -> b heads n p", heads=mask.shape[1], p=p))
    nothing = rearrange(tokens < 0, "b n -> b 1 n 1")
    if is_causal or attn_mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        dead = scores.detach().amax(-1, keepdim=True) == -torch.inf  # softmax would give 0 / 0
        scores, nothing = scores.masked_fill(dead, 0), nothing | dead
    attention = scores.softmax(-1)

    cell = repeat(layout.index.long().clamp(min=0), "b y x -> b h n (y x)", h=h, n=n)
    canvas = attention.gather(-1, cell).unflatten(-1, layout.index.shape[1:])
    if (layout.index < 0).any():
        canvas = canvas.masked_fill(rearrange(layout.index < 0, "b y x -> b 1 1 y x"), 0)
    rows, cols = (rearrange(matrix.to(dtype), "b g c -> b 1 1 g c") for matrix in (layout.resize_y, layout.resize_x))
    out = rows @ canvas @ cols.mT
    return rearrange(out.masked_fill(nothing[..., None], 0), "b h n gy gx -> b n h gy gx")


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
