"""A training step on torch's device `meta` that counts as one on a GPU: what `memory` runs inside `pretend`.

scaled_dot_product_attention keeps there what its memory-efficient kernel keeps. Triton kernels are not launched. Autocast does not
know `meta`, so float32 linear layers are cast to half precision here.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fake_numbers
from torch.overrides import TorchFunctionMode

from lavender_min import ops
from lavender_min.tuning.model import Lavender


class TakeRows(torch.autograd.Function):
    """x[mask] for a mask whose `count` of True nobody knows on `meta`. It saves for the backward what the real one saves."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = x.shape
        return x.new_empty(count, *x.shape[mask.ndim :])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.new_empty(ctx.shape), None, None


def cpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=rest.get("scale"))[0]


def gpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
    """Flash attention; with a mask the memory-efficient kernel, which copies a mask whose rows are not a multiple of 8 long."""
    aten = torch.ops.aten
    # As autocast does.
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=rest.get("scale")
        )[0]
    p = attn_mask.shape[-1]
    if p % 8:
        attn_mask = nn.functional.pad(attn_mask, (0, -p % 8))[..., :p]
    attn_mask = attn_mask.expand(*query.shape[:3], p)
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=rest.get("scale"))[
        0
    ]


def is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


class InPlaceOf(TorchFunctionMode):
    """Inside this `with`, methods of tensors are stood in for by functions.

    They are not patched: a Tensor whose `__getitem__` was once set counts as a sequence for ever, and torch.tensor([x]) then fails.
    """

    def __init__(self, methods: dict[Any, Callable[..., Any]]):
        super().__init__()
        self.methods = methods

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.methods.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def pretend(text: torch.Size, rows: int, half: torch.dtype | None) -> Iterator[None]:
    """Inside this `with`, a step counts as one in `half` precision on a GPU, with autocast and Triton; with None, as one in
    float32 on a CPU.

    Some lines of a step depend on numbers, which are not there. So a mask over the text selects `rows` rows, a mask over words
    selects all, and every condition holds. What does have numbers keeps them.
    """
    functional, take, put, linear = nn.functional, Tensor.__getitem__, Tensor.__setitem__, nn.functional.linear
    holds = Tensor.__bool__

    def take_rows(x: Tensor, index: Any) -> Tensor:
        mask = index[0] if isinstance(index, tuple) and index[1:] == (slice(None),) else index
        if not is_mask(mask) or not x.is_meta:
            return take(x, index)
        if not mask.is_meta:
            return TakeRows.apply(x, mask, int(mask.sum()))
        return TakeRows.apply(x, mask, rows if mask.shape == text else mask.numel())

    def put_rows(x: Tensor, index: Any, value: Any) -> None:
        mask = index[0] if isinstance(index, tuple) else index
        if not is_mask(mask) or not x.is_meta:
            put(x, index, value)

    def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype == torch.float32:
            x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
        return linear(x, weight, bias)

    with contextlib.ExitStack() as stack:
        fake: list[tuple[Any, str, Any]] = [
            (Tensor, "__bool__", lambda x: x.is_meta or holds(x)),
            # Flamingo's embedding looks for tokens beyond its vocabulary.
            (fake_numbers, "meta_nonzero_assume_all_nonzero", True),
            (functional, "scaled_dot_product_attention", gpu_attention if half else cpu_attention),
            (ops, "choose_backend", lambda *_: "triton" if half else "torch"),
            # How transformers asserts that there are as many image tokens as picture states.
            (torch, "_check_tensor_all_with", lambda *_: None),
            (torch, "is_autocast_enabled", lambda device="cuda": bool(half) and device == "cuda"),
            (torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()),
            (Lavender, "matched", lambda self, predicted, ids, words: words.lengths > 0),
        ]
        if half:
            from triton.runtime.jit import KernelInterface

            fake.append((functional, "linear", autocast_linear))
            fake.append((KernelInterface, "__getitem__", lambda *_: lambda *args, **kwargs: None))
        for owner, name, stand_in in fake:
            stack.enter_context(patch.object(owner, name, stand_in))
        methods: dict[Any, Callable[..., Any]] = {take: take_rows, put: put_rows}
        with InPlaceOf(methods):
            yield
