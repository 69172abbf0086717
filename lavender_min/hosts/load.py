"""A hub id or folder ─► a host that can be read: model, processor, family."""

import importlib
import os
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

# For what it registers: folders of our own two models then load as all others do.
import lavender_min.hosts.architectures  # noqa: F401
from lavender_min import hub
from lavender_min.failing import naming
from lavender_min.hosts import FAMILIES, processors
from lavender_min.hosts.base import Family
from lavender_min.hosts.reading import hook


class Host(NamedTuple):
    model: Any
    processor: Any
    family: Family


def family_of(name: str, model_type: str) -> Family:
    """Raises ValueError, in one line, for a `model_type` without a family."""
    if model_type not in FAMILIES:
        raise ValueError(f"--vlm {name} is a {model_type}; this package tunes {', '.join(FAMILIES)}")
    module, _, family = FAMILIES[model_type].where.partition(":")
    return getattr(importlib.import_module(module), family)(model_type)


def load(name: str, quantize: bool = False, dtype: torch.dtype = torch.float32) -> Host:
    """The host, hooked (see `reading`); `quantize` holds every linear layer but lm_head in NF4.

    Raises ValueError, in one line, for a family that is not known or files that are not as they should be, and OSError for
    weights that cannot be had.
    """
    with naming(f"--vlm {name}"):
        host = read(name, quantize, dtype)
        host.processor.chat_template = host.processor.chat_template or host.family.chat_template
        try_out(host)
        hook(host.model, host.family)
    return host


def try_out(host: Host) -> None:
    """Encodes one turn about a picture: a tokenizer or processor whose files do not go together shows itself here."""
    said = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = host.processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)
    host.family.encode(host.processor, [text], [Image.new("RGB", (64, 48))])


def read(name: str, quantize: bool, dtype: torch.dtype) -> Host:
    """The host as transformers loads it. No code of a model's folder is run."""
    try:
        hub.ask(name, "config.json")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        family = family_of(name, config.model_type)
        processor = processors.load(name)
        extra = {}
        if quantize:
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                # The library's default is fp4.
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                # So the vision tower too is held in 4 bits.
                llm_int8_skip_modules=["lm_head"],
            )
        # Under FSDP each card is to get its part only.
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        device = {"": torch.cuda.current_device()} if torch.cuda.is_available() and not sharded else None
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, device_map=device, trust_remote_code=False, output_loading_info=True, **extra
        )
        model, found = loaded
    except OSError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise OSError(
            f"--vlm {name} could not be loaded ({reason}). Give a folder with the weights, or, with a network, accept the "
            f"licence on the model's page and run `hf auth login`; the toy world (--data toy) needs neither"
        ) from error
    if missing := sorted(found["missing_keys"]):
        # The library only warns, and draws them at random.
        raise ValueError(
            f"its files lack {len(missing)} of its weights, the first {missing[0]}: copy or download all of them again"
        )
    if quantize:
        # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights once outside training, which rounds to bf16 and
        # fails for widths that are no multiple of 64.
        module: Any
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return Host(model, processor, family)
