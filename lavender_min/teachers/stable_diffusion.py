"""Stable Diffusion's parts, loaded without the pipeline around them, and one question to its UNet.

Everything runs in one number format, `dtype`: fp16 on a GPU, fp32 elsewhere, unless asked otherwise. What the recipes
carry from pass to pass (latents, maps) stays fp32.
"""
# ruff: noqa: E402 (imports below a statement)

import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# diffusers imports bitsandbytes, which on some CPUs looks for a package named like our folder kernels/, and complains.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import torch
import transformers
from accelerate.utils import find_executable_batch_size
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lavender_min import hub

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class StableDiffusion(NamedTuple):
    """The parts of a pipeline that are needed to read its maps. No safety checker, no pipeline."""

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    noise_schedule: dict[str, Any]  # the pipeline's scheduler config: betas and what the UNet predicts

    @property
    def side(self) -> int:
        """Pixels a side of the picture the UNet was trained on."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def map_sides(self) -> list[int]:
        """The sides at which this UNet attends to text: 64, 32, 16 and 8 for v1.4."""
        config = self.unet.config
        levels = {i for i, block in enumerate(config.down_block_types) if block.startswith("CrossAttn")}
        levels |= {len(config.down_block_types) - 1}  # the middle block
        return [config.sample_size >> level for level in sorted(levels)]


def load(name: str, device: torch.device | str = "cpu", dtype: str | None = None) -> StableDiffusion:
    """A pipeline folder, or a model of huggingface.co by name; fp16 on a GPU, fp32 elsewhere, or one of DTYPES."""
    number = DTYPES[dtype or ("fp16" if torch.device(device).type == "cuda" else "fp32")]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    parts = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
    folder, local = Path(name), Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~"))
    missing = [part for part in parts if local and not (folder / part).is_dir()]
    if missing:
        there = f"lacks {', '.join(missing)}" if folder.is_dir() else "is not there"
        raise FileNotFoundError(f"--sd {name}: the pipeline folder {there}; it must hold {', '.join(parts)}")
    weights = "unet/diffusion_pytorch_model.safetensors"
    cached = local or isinstance(try_to_load_from_cache(name, weights), str)
    try:
        hub.ask(name, weights)
        # safetensors only: no pickle. What is in the cache is used as it is, with or without network.
        how: dict[str, Any] = {"use_safetensors": True, "local_files_only": cached}
        with warnings.catch_warnings(action="ignore"):
            text_encoder: Any = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=number, **how)
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", local_files_only=cached)
            if len(tokenizer) < 256:  # transformers makes an empty one, without a word, where there are no files
                raise OSError("the tokenizer's files are missing")
            noise_schedule = dict(DDIMScheduler.load_config(name, subfolder="scheduler", local_files_only=cached))
            vae = AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=number, **how)
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=number, **how)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if local:
            raise OSError(f"cannot load Stable Diffusion {name}: {reason}") from error
        raise OSError(
            f"cannot load Stable Diffusion {name}: {reason}. To get it, accept its licence at https://huggingface.co/{name}"
            " if it has one (then `hf auth login`), and run this once where there is network. "
            "Or, without any download: python extract.py --data toy"
        ) from error
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    for part in (text_encoder, vae, unet):
        part.to(device).eval().requires_grad_(False)
    for part in (vae, unet):  # the layout in which convolutions are fastest
        part.to(memory_format=torch.channels_last)
    vae.enable_slicing()  # a picture at a time: one of 512 px fills a GPU, and a batch would need more memory than the UNet
    return StableDiffusion(tokenizer, text_encoder, vae, unet, noise_schedule)


def ask(sd: StableDiffusion, latents: Tensor, t: Tensor, text: Tensor) -> Float[Tensor, "r c y x"]:
    """One pass of the UNet: what noise (or velocity) it sees at time step t, in fp32.

    t is one number on the CPU, so that nobody waits for the GPU to read it, or one number a row.
    """
    unet = sd.unet
    return unet(latents.to(unet.dtype), t, encoder_hidden_states=text.to(unet.dtype), return_dict=False)[0].float()


@torch.no_grad()
def seconds_a_pass(sd: StableDiffusion, pictures: int) -> float:
    """How long the UNet takes for so many pictures at once: the second of two passes, as the first warms up."""
    unet, began = sd.unet, 0.0
    latents = torch.zeros(pictures, unet.config.in_channels, *[unet.config.sample_size] * 2, device=unet.device)
    text = latents.new_zeros(pictures, sd.tokenizer.model_max_length, unet.config.cross_attention_dim)
    for _ in range(2):
        began = time.perf_counter()
        ask(sd, latents, torch.tensor(500), text).sum().item()  # .item() waits for the GPU
    return time.perf_counter() - began


def fitting_batch(trial: Callable[[int], object], most: int = 64) -> int:
    """The largest number of pictures at once for which `trial(number)` fits the GPU's memory, less a tenth for gaps."""

    @find_executable_batch_size(starting_batch_size=most)
    def fits(batch_size: int) -> int:
        trial(batch_size)
        return batch_size

    return max(1, int(0.9 * fits()))
