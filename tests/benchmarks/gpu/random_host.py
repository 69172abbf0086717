"""A host with the architecture of a real one and random weights, and a batch for it: nothing is downloaded.

The model is made without memory; then each layer in turn gets its numbers on the device and is packed to NF4 (double quantisation)
before the next one comes, so that 22 GB never exist at once.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from measure import DEVICE
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForImageTextToText

from lavender_min.geometry import MAP_SIDE
from lavender_min.hosts.base import Family, collate_views
from lavender_min.hosts.reading import hook

HALF = torch.bfloat16


class Size(NamedTuple):
    b: int
    tokens: int
    answer: int  # tokens of the answer
    rank: int  # of the low-rank parallel projections


class Blueprint(NamedTuple):
    """What a host is made of, without weights."""

    config: Any
    family: Family


def random_host(blueprint: Blueprint, dtype: torch.dtype = HALF, quantize: bool = True) -> Any:
    """The hooked host with random weights on DEVICE; all linear layers but lm_head in NF4, packed one by one."""
    with init_empty_weights(include_buffers=False):
        host = AutoModelForImageTextToText.from_config(blueprint.config, dtype=dtype)
    for name, module in list(host.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.randn(parameter.shape, dtype=dtype, device=DEVICE).mul_(0.02)
            value += 1 if "norm" in name and key == "weight" else 0
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        if quantize and isinstance(module, nn.Linear) and name != "lm_head":
            host.set_submodule(name, packed(module, dtype))
    host.to(DEVICE)
    # PEFT goes by this.
    host.is_loaded_in_4bit = quantize
    hook(host, blueprint.family)
    return host


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


def real_batch(blueprint: Blueprint, size: Size) -> dict[str, Any]:
    """The planner's batch with numbers: the last tokens answer, each a word of its own; the picture fills all of its tiles."""
    b, tokens, answer, _ = size
    config, family = blueprint
    inputs = {name: torch.ones(x.shape, dtype=x.dtype) for name, x in family.imagine(config, b, tokens).inputs.items()}
    inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    # 6 is two by two tiles.
    inputs["aspect_ratio_ids"].fill_(6)
    ids = torch.randint(3, config.text_config.vocab_size, (b, tokens))
    processor = SimpleNamespace(image_processor=SimpleNamespace(max_image_tiles=4))
    side = 2 * config.vision_config.image_size
    views = [family.views((side, side), processor, config, own, (0.0, 1.0, 0.0, 1.0)) for own in ids]
    spoken = torch.arange(tokens - answer, tokens, dtype=torch.int32).repeat(b)
    words = {
        "rows": spoken - 1,
        "counts": [answer] * b,
        "texts": torch.arange(b).repeat_interleave(answer),
        "tokens": spoken,
        "lengths": torch.ones(b * answer, dtype=torch.long),
        "targets": torch.rand(b * answer, MAP_SIDE, MAP_SIDE),
        "trust": torch.ones(b * answer),
        "views": [list(view) for view in collate_views(views)],
    }
    labels = ids.where(torch.arange(tokens) >= tokens - answer, -100)
    batch = {"input_ids": ids, **inputs, "labels": labels, "words": words}
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), batch)


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
