"""The vision-language models that can be tuned, one file a family, found by the `model_type` in their config.

A host's file says six things of its family, and nothing else in the package knows them:

    hook(vlm)                       make its attention report word maps into a `Sink`
    layers(vlm)                     the layers whose attention is read, by index: {index: attention module}
    layout(processor, config, ...)  where the patches of one picture lie among the keys
    vision(vlm)                     the modules that turn pictures into keys
    picture_states(vlm, inputs)     what comes out of them, given the inputs named in PICTURE_INPUTS
    LORA_TARGETS                    named regular expressions for adapters
"""

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from lavender_min import hub, ops
from lavender_min.geometry import PatchLayout

FAMILIES = {"mllama": "lavender_min.hosts.mllama"}


class Sink:
    """Handed to the host with a batch: which rows to read, and where each layer leaves its maps.

    A plain object on purpose: FSDP copies dicts and dataclasses that pass through it, and a copy would come back empty.
    Under activation checkpointing a layer runs twice and must do the same work both times, so `read` always computes
    and only the first value is kept.
    """

    def __init__(self, tokens: Int[Tensor, "b n"], layout: PatchLayout, own: bool, parallel: nn.ModuleDict | None):
        self.tokens, self.layout = tokens, layout
        self.own, self.parallel = own, parallel  # read the host's attention; and that of the parallel projections
        self.own_maps: dict[int, Tensor] = {}  # layer -> [b, n, h, g, g], probabilities
        self.parallel_maps: dict[int, Tensor] = {}

    def read(self, kept: dict[int, Tensor], layer: int, query, key, tokens, mask, scale) -> None:
        with torch.autocast(query.device.type, enabled=False):  # it would round the plain PyTorch op's scores
            maps = ops.word_attention(query, key, tokens, self.layout, attn_mask=mask, scale=scale)
        kept.setdefault(layer, maps)


def collate_layouts(layouts: list[PatchLayout]) -> PatchLayout:
    """One batch of layouts whose canvases differ: smaller ones get empty cells (index −1) on the right and below."""
    height, width = (max(layout.index.shape[axis] for layout in layouts) for axis in (1, 2))
    pad = nn.functional.pad
    right, below = ([n - x.index.shape[a] for x in layouts] for n, a in ((width, 2), (height, 1)))
    return PatchLayout(
        torch.cat([pad(x.index, (0, r, 0, d), value=-1) for x, r, d in zip(layouts, right, below, strict=True)]),
        torch.cat([pad(x.resize_y, (0, d)) for x, d in zip(layouts, below, strict=True)]),
        torch.cat([pad(x.resize_x, (0, r)) for x, r in zip(layouts, right, strict=True)]),
    )


def patch_count(layout: PatchLayout) -> Float[Tensor, " b"]:
    """How many patches hold the picture: attention times this is 1 where it is spread evenly over the canvas."""
    return (layout.index >= 0).sum((1, 2)).float()


def load(name: str, quantize: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, ModuleType]:
    """(model, processor, host module) of a hub id or folder; `quantize` holds every linear layer but lm_head in NF4.

    Raises ValueError, in one line, for a family without a host file, and OSError for weights that cannot be had.
    """
    try:
        hub.ask(name, "config.json")
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in FAMILIES:
            raise ValueError(f"--vlm {name} is a {config.model_type}; this package tunes {', '.join(FAMILIES)}")
        processor = AutoProcessor.from_pretrained(name)
        extra = {}
        if quantize:
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",  # the library's default is fp4
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=["lm_head"],  # the vision tower too is held in 4 bits
            )
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # then each card is to get its part only
        device = {"": torch.cuda.current_device()} if torch.cuda.is_available() and not sharded else None
        vlm = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, device_map=device, **extra)
    except OSError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise OSError(
            f"--vlm {name} could not be loaded ({reason}). Give a folder with the weights, or, with a network, accept the "
            f"licence on the model's page and run `hf auth login`; the toy world (--data toy) needs neither"
        ) from error
    if quantize:
        # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights once outside training, which rounds to bf16 and
        # fails for widths that are no multiple of 64.
        module: Any
        for module in vlm.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    host = importlib.import_module(FAMILIES[config.model_type])
    host.hook(vlm)
    return vlm, processor, host
