"""A host with the architecture of a real one and random weights in 4 bits, and a batch for it: nothing is downloaded.

The model is made without memory; then each layer in turn gets its numbers on the device and is packed to NF4 (double quantisation)
before the next one comes, so that 22 GB never exist at once.
"""

from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from measure import DEVICE
from torch import nn
from transformers import AutoModelForImageTextToText

from lavender_min.geometry import MAP_SIDE, resize_matrix
from lavender_min.tuning import memory

HALF = torch.bfloat16


class Size(NamedTuple):
    b: int
    tokens: int
    answer: int  # tokens of the answer
    rank: int  # of the low-rank parallel projections


class Host(NamedTuple):
    config: Any
    family: Any


def random_host(host: Host, dtype: torch.dtype = HALF) -> Any:
    """The hooked host with random weights on DEVICE, all linear layers but lm_head in NF4, packed one by one."""
    with init_empty_weights(include_buffers=False):
        vlm = AutoModelForImageTextToText.from_config(host.config, dtype=dtype)
    for name, module in list(vlm.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.randn(parameter.shape, dtype=dtype, device=DEVICE).mul_(0.02)
            value += 1 if "norm" in name and key == "weight" else 0
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        if isinstance(module, nn.Linear) and name != "lm_head":
            vlm.set_submodule(name, packed(module, dtype))
    vlm.to(DEVICE)
    # PEFT goes by this.
    vlm.is_loaded_in_4bit = True
    host.family.hook(vlm)
    return vlm


def packed(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """In NF4, the scales of 64 numbers once more in 8 bits."""
    import bitsandbytes as bnb

    layer: Any = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        compute_dtype=dtype, quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(DEVICE)
    layer.bias = linear.bias
    # On some CPUs bitsandbytes would repack the weights, and takes widths of 64 only.
    layer.support_avx512bf16_for_cpu = False
    return layer


def real_batch(config: Any, size: Size) -> dict[str, Any]:
    """`memory.make_batch` with numbers: the last tokens answer, the picture fills four tiles."""
    b, tokens, answer, _ = size
    pixels = config.vision_config.image_size
    side = pixels // config.vision_config.patch_size
    ids = torch.randint(3, config.text_config.vocab_size, (b, tokens))
    word_tokens = torch.arange(tokens - answer, tokens, dtype=torch.int32).expand(b, -1)[..., None].contiguous()
    y, x = torch.arange(2 * side)[:, None], torch.arange(2 * side)[None]
    index = (y // side * 2 + x // side) * (side * side + 1) + 1 + y % side * side + x % side
    matrix = resize_matrix(2 * side).expand(b, -1, -1).contiguous()
    batch = {
        name: torch.ones(value.shape, dtype=value.dtype)
        for name, value in memory.make_batch(config, b, tokens, answer).items()
        if name != "layout"
    } | {
        "input_ids": ids,
        "pixel_values": torch.randn(b, 1, 4, 3, pixels, pixels),
        # two by two
        "aspect_ratio_ids": torch.full((b, 1), 6),
        "labels": ids.where(torch.arange(tokens) >= tokens - answer, -100),
        "word_tokens": word_tokens,
        "word_rows": word_tokens - 1,
        "targets": torch.rand(b, answer, MAP_SIDE, MAP_SIDE),
        "layout": [index.int().expand(b, -1, -1).contiguous(), matrix, matrix.clone()],
    }
    return {k: [x.to(DEVICE) for x in v] if isinstance(v, list) else v.to(DEVICE) for k, v in batch.items()}


def held_bytes(module: nn.Module) -> int:
    """Weights, and what 4-bit ones need beside their codes."""
    tensors: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        tensors[id(tensor)] = tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            tensors |= {id(part): part for part in parts}
    return sum(tensor.nbytes for tensor in tensors.values())
