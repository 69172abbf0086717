"""What the three ops accept, checked by `ops` before any work. An error is one line: what was wanted, what came, what to do."""

from collections.abc import Sequence

import torch
from torch import Tensor

HALF_OR_FULL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_shapes(op: str, **named: tuple[Tensor, str]) -> dict[str, int]:
    """Bind axis names to sizes, in the order given: `check_shapes("op", query=(query, "b h t d"), key=(key, "b hkv p d"))`.

    The first tensor that has an axis fixes its size; a later one that disagrees is a ValueError. Returns name -> size.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    first_name, first = next(iter((name, tensor) for name, (tensor, _) in named.items()))
    for name, (tensor, axes) in named.items():
        wanted = axes.split()
        got = list(tensor.shape)
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, but {first_name} is on {first.device}; move one to the other"
            )
        known = ", ".join(f"{axis}={sizes[axis]} (from {origin[axis]})" for axis in wanted if axis in sizes)
        message = f"{op}: {name} should be [{', '.join(wanted)}]" + (f" with {known}" if known else "") + f"; got {got}"
        if len(wanted) != len(got):
            raise ValueError(message)
        for axis, size in zip(wanted, got, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(message)
            origin.setdefault(axis, name)
    return sizes


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{op}: {name} should be {names}; got {str(tensor.dtype).removeprefix('torch.')}")


def strides(name: str, axes: str, x: Tensor) -> dict[str, int]:
    """A kernel's arguments for the strides of x: `strides("q", "bh", query)` is {"s_qb": …, "s_qh": …}."""
    return {f"s_{name}{axis}": stride for axis, stride in zip(axes, x.stride(), strict=False)}


def check_word_attention(query, key, rows, counts: Sequence[int], layout, attn_mask, is_causal) -> None:
    """No value of a tensor is read, so nothing waits for the GPU."""
    op = "word_attention"
    sizes = check_shapes(
        op, query=(query, "b h t d"), key=(key, "b hkv p d"), rows=(rows, "n"),
        **{"layout.index": (layout.index, "b hc wc")},
        **{"layout.resize_y": (layout.resize_y, "b gy hc"), "layout.resize_x": (layout.resize_x, "b gx wc")},
    )  # fmt: skip
    check_dtype(op, "query", query, HALF_OR_FULL)
    check_dtype(op, "key", key, (query.dtype,))
    check_dtype(op, "rows", rows, (torch.int32, torch.int64))
    check_dtype(op, "layout.index", layout.index, (torch.int32, torch.int64))
    whole = all(isinstance(count, int) and count >= 0 for count in counts)
    if not whole or len(counts) != sizes["b"] or sum(counts) != sizes["n"]:
        raise ValueError(
            f"{op}: counts should be {sizes['b']} whole numbers (the rows of each picture) that add up to n={sizes['n']} "
            f"(from rows); got {list(counts)}"
        )
    if sizes["h"] % sizes["hkv"]:
        raise ValueError(
            f"{op}: {sizes['h']} query heads cannot be shared out over {sizes['hkv']} key heads; h must be a multiple of hkv"
        )
    if attn_mask is not None:
        full = [sizes[axis] for axis in "bhtp"]
        shape = list(attn_mask.shape)
        if len(shape) > 4 or any(
            have not in (1, want) for have, want in zip(reversed(shape), reversed(full), strict=False)
        ):
            raise ValueError(f"{op}: attn_mask should broadcast to [b, h, t, p] = {full}; got {shape}")
        check_dtype(op, "attn_mask", attn_mask, (torch.bool, *HALF_OR_FULL))
        if is_causal:
            raise ValueError(f"{op}: give attn_mask or is_causal=True, not both (as in scaled_dot_product_attention)")
        if attn_mask.requires_grad:
            raise ValueError(f"{op}: attn_mask gets no gradient here; pass attn_mask.detach()")


def check_diffusion_attention(query, key, value, word_weights, maps) -> None:
    op = "diffusion_attention"
    check_shapes(
        op, query=(query, "b h q d"), key=(key, "b h t d"), value=(value, "b h t d"),
        word_weights=(word_weights, "b t w"), maps=(maps, "b w q"),
    )  # fmt: skip
    check_dtype(op, "query", query, HALF_OR_FULL)
    check_dtype(op, "key", key, (query.dtype,))
    check_dtype(op, "value", value, (query.dtype,))
    check_dtype(op, "maps", maps, (torch.float64,) if query.dtype == torch.float64 else (torch.float32,))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, word_weights, maps)):
        raise ValueError(f"{op}: has no gradient (Stable Diffusion is frozen here); call it under torch.no_grad()")


def check_aligner_mse(features, weight, bias, target, output, trust) -> None:
    op = "aligner_mse"
    check_shapes(
        op, features=(features, "m c gy gx"), weight=(weight, "c"), target=(target, "m gy gx"), trust=(trust, "m")
    )
    if bias.numel() != 1 or bias.device != features.device:
        raise ValueError(
            f"{op}: bias should be one number on {features.device}; got {list(bias.shape)} on {bias.device}"
        )
    check_dtype(op, "features", features, HALF_OR_FULL)
    check_dtype(op, "trust", trust, (torch.float32,))
    if output not in ("minmax", "none"):
        raise ValueError(f'{op}: output should be "minmax" or "none"; got {output!r}')
