"""The three ops of Lavender, each in Triton (`lavender_min.kernels`) and in plain PyTorch (`lavender_min.reference`).

`backend=None` takes Triton for CUDA tensors and PyTorch elsewhere. LAVENDER_BACKEND=triton|torch or the argument overrides it.
The choice is logged once. With TRITON_INTERPRET=1 the kernels also run on a CPU, slowly: for tests.

Shapes are checked here, for both backends. Of a PatchLayout, a key may stand in one cell at most.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from lavender_min import reference
from lavender_min.geometry import PatchLayout
from lavender_min.kernels import shapes

logger = logging.getLogger(__name__)
BACKENDS = ("triton", "torch")


@functools.cache
def _say(message: str) -> None:
    """Once a process."""
    logger.info(message)


def choose_backend(tensor: Tensor, backend: str | None = None) -> str:
    """ "triton" or "torch" for an op on `tensor`; a request that cannot be met is an error, never a silent fallback."""
    wish, source = (backend, "asked for") if backend else (os.environ.get("LAVENDER_BACKEND"), "LAVENDER_BACKEND")
    if not wish:
        on_cuda, has_triton = tensor.device.type == "cuda", importlib.util.find_spec("triton") is not None
        if on_cuda and not has_triton:
            source = "CUDA tensors, but the package triton is not installed"
        else:
            source = f"{tensor.device.type} tensors"
        wish = "triton" if on_cuda and has_triton else "torch"
    if wish not in BACKENDS:
        raise ValueError(f"the backend should be one of {', '.join(BACKENDS)}; got {wish!r} ({source})")
    if wish == "triton" and tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the Triton kernels need CUDA tensors; got {tensor.device.type} ({source}): use backend='torch', "
            "or set TRITON_INTERPRET=1 before starting to run them slowly on a CPU"
        )
    _say(f"attention ops run on {wish} ({source})")
    return wish


def _kernel(name: str):
    # imports triton only when it is used
    return getattr(importlib.import_module(f"lavender_min.kernels.{name}"), name)


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
    backend: str | None = None,
) -> Float[Tensor, "n h gy gx"]:
    """Attention of picked rows of the query over the picture, one map a head: resize_y · A[..., index] · resize_xᵀ, in float32.

    `rows` is one list for the whole batch: the first counts[0] are rows of query[0], the next counts[1] of query[1], and so on.
    A row of −1 gives 0. The softmax runs over all keys; the maps show those of the layout.
    Masks as in scaled_dot_product_attention; a row with no key left gives 0. Gradients reach query and key.
    """
    shapes.check_word_attention(query, key, rows, counts, layout, attn_mask, is_causal)
    run = reference.word_attention if choose_backend(query, backend) == "torch" else _kernel("word_attention")
    return run(query, key, rows, counts, layout, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def diffusion_attention(
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b h t d"],
    value: Float[Tensor, "b h t d"],
    word_weights: Float[Tensor, "b t w"],
    maps: Float[Tensor, "b w q"],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Tensor, "b h q d"]:
    """The UNet's cross-attention output; in the same pass, in place, maps += mean over heads of A · word_weights. No gradient."""
    shapes.check_diffusion_attention(query, key, value, word_weights, maps)
    run = reference.diffusion_attention if choose_backend(query, backend) == "torch" else _kernel("diffusion_attention")
    return run(query, key, value, word_weights, maps, scale=scale)


def aligner_mse(
    features: Float[Tensor, "m c gy gx"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, ""] | Float[Tensor, " 1"],
    target: Float[Tensor, "m gy gx"],
    *,
    output: str = "minmax",
    trust: Float[Tensor, " m"],
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """The Aligner's closing 1×1 convolution, the map normalisation and the squared error: mean over words, each
    weighted by its `trust` (0: it does not count; 1 for all: the plain mean), and over cells.

    No trust in any word gives exactly 0, with zero (not None) gradients to features, weight and bias.
    """
    shapes.check_aligner_mse(features, weight, bias, target, output, trust)
    run = reference.aligner_mse if choose_backend(features, backend) == "torch" else _kernel("aligner_mse")
    return run(features, weight, bias, target, output=output, trust=trust)
