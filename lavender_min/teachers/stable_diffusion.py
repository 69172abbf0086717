"""Stable Diffusion's parts, loaded without the pipeline around them, and one pass of its UNet.

Everything runs in one number format, `dtype`: fp16 on a GPU, fp32 elsewhere, unless the caller chooses. What the recipes
carry from pass to pass (latents, maps) stays fp32.

Shapes in this file: r windows of text, each with its picture's latents [c, y, x]; t tokens of a window; e channels of a token.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from accelerate.utils import find_executable_batch_size
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lavender_min import hub
from lavender_min.failing import one_line
from lavender_min.teachers import DTYPES

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")

# What a UNet may predict, by the name that schedulers give it.
PREDICTIONS = ("epsilon", "v_prediction")


class StableDiffusion(NamedTuple):
    """The parts of a pipeline that are needed to record its maps. No safety checker, no pipeline.

    They are a CLIPTokenizer, a CLIPTextModel, an AutoencoderKL and a UNet2DConditionModel. (diffusers loads its classes in a
    way in which type checkers see none of their attributes.)
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any

    # The configuration of the pipeline's scheduler: betas, and what the UNet predicts.
    noise_schedule: dict[str, Any]

    @property
    def side(self) -> int:
        """The side in pixels of the pictures the UNet was trained on: 512 for v1.4."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def map_sides(self) -> list[int]:
        """The sides of the feature maps that attend to text: 64, 32, 16 and 8 for v1.4."""
        config = self.unet.config
        levels = {i for i, block in enumerate(config.down_block_types) if block.startswith("CrossAttn")}
        # The middle block is as small as the last of these levels.
        levels |= {len(config.down_block_types) - 1}
        return [config.sample_size >> level for level in sorted(levels)]


def load(name: str, device: torch.device | str = "cpu", dtype: str | None = None) -> StableDiffusion:
    """A pipeline folder, or a model of huggingface.co by name; `dtype` is one of DTYPES.

    What is in the hub's cache is used as it is, with or without a network. Only safetensors are loaded, no pickle. Raises
    OSError, in one line that says how to get the model, if it cannot be had.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    folder, local = Path(name), Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~"))
    missing = [part for part in PARTS if local and not (folder / part).is_dir()]
    if missing:
        there = f"lacks {', '.join(missing)}" if folder.is_dir() else "is not there"
        raise FileNotFoundError(f"--sd {name}: the pipeline folder {there}; it must hold {', '.join(PARTS)}")
    weights = "unet/diffusion_pytorch_model.safetensors"
    cached = local or isinstance(try_to_load_from_cache(name, weights), str)
    on_gpu = torch.device(device).type == "cuda"
    try:
        hub.ask(name, weights)
        sd = _load_parts(name, cached, getattr(torch, DTYPES[dtype or ("fp16" if on_gpu else "fp32")]))
        longest = sd.text_encoder.config.max_position_embeddings
        sd.tokenizer.model_max_length = min(sd.tokenizer.model_max_length, longest)
    except MemoryError:
        raise
    except Exception as error:
        # Files that are cut short or of other shapes, settings of another type: each library has errors of its own.
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        reason = kind + one_line(error).rstrip(".")
        if local:
            raise OSError(f"cannot load Stable Diffusion {name}: {reason}") from error
        raise OSError(
            f"cannot load Stable Diffusion {name}: {reason}. To get it, accept its licence at https://huggingface.co/{name}"
            " if it has one (then `hf auth login`), and run this once where there is network. "
            "Or, without any download: python extract.py --data toy"
        ) from error
    for part in (sd.text_encoder, sd.vae, sd.unet):
        part.to(device).eval().requires_grad_(False)
    # The layout in which convolutions are fastest.
    for part in (sd.vae, sd.unet):
        part.to(memory_format=torch.channels_last)
    # A picture at a time: one of 512 px fills a GPU, and a batch would need more memory than the UNet.
    sd.vae.enable_slicing()
    return sd


def _load_parts(name: str, cached: bool, dtype: torch.dtype) -> StableDiffusion:
    files: dict[str, Any] = {"local_files_only": cached, "trust_remote_code": False}
    with warnings.catch_warnings(action="ignore"):
        text_encoder = _whole(CLIPTextModel, name, "text_encoder", dtype=dtype, **files)
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **files)
        # Where there are no files, transformers makes an empty one and says nothing.
        if len(tokenizer) < 256:
            raise OSError("the tokenizer's files are missing")
        noise_schedule = dict(DDIMScheduler.load_config(name, subfolder="scheduler", local_files_only=cached))
        if (predicts := noise_schedule.get("prediction_type", "epsilon")) not in PREDICTIONS:
            raise ValueError(f"the scheduler's prediction_type must be {' or '.join(PREDICTIONS)}; got {predicts!r}")
        # A value of the wrong kind shows here, where the folder has a name, and not in the first pass.
        DDIMScheduler.from_config(noise_schedule)
        vae = _whole(AutoencoderKL, name, "vae", torch_dtype=dtype, **files)
        unet = _whole(UNet2DConditionModel, name, "unet", torch_dtype=dtype, **files)
    return StableDiffusion(tokenizer, text_encoder, vae, unet, noise_schedule)


def _whole(kind: Any, name: str, part: str, **options: Any) -> Any:
    """A model with all its weights from the files: of those that are missing, the libraries would make random ones."""
    model, found = kind.from_pretrained(name, subfolder=part, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{part} lacks {len(missing)} weights, {missing[0]} for one")
    return model


def predict(
    sd: StableDiffusion,
    latents: Float[Tensor, "r c y x"],
    timestep: Int[Tensor, ""] | Int[Tensor, " r"],
    text: Float[Tensor, "r t e"],
) -> Float[Tensor, "r c y x"]:
    """One pass of the UNet: the noise (or the velocity) that it predicts, in fp32.

    `timestep` is one number on the CPU, so that nobody waits for the GPU to read it, or one number for each window.
    """
    unet = sd.unet
    return unet(latents.to(unet.dtype), timestep, encoder_hidden_states=text.to(unet.dtype), return_dict=False)[
        0
    ].float()


@torch.no_grad()
def seconds_a_pass(sd: StableDiffusion, pictures: int) -> float:
    """How long the UNet takes for so many pictures at once: the second of two passes, as the first warms up."""
    unet, began = sd.unet, 0.0
    latents = torch.zeros(pictures, unet.config.in_channels, *[unet.config.sample_size] * 2, device=unet.device)
    text = latents.new_zeros(pictures, sd.tokenizer.model_max_length, unet.config.cross_attention_dim)
    for _ in range(2):
        began = time.perf_counter()
        # .item() waits for the GPU.
        predict(sd, latents, torch.tensor(500), text).sum().item()
    return time.perf_counter() - began


def fitting_batch(trial: Callable[[int], object], most: int = 64) -> int:
    """The largest number of pictures at once for which `trial(number)` fits the GPU's memory, less a tenth for gaps."""

    @find_executable_batch_size(starting_batch_size=most)
    def fits(batch_size: int) -> int:
        trial(batch_size)
        return batch_size

    return max(1, int(0.9 * fits()))
