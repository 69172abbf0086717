"""Stable Diffusion as a teacher: a picture and its text in, one 32×32 attention map a word out.

Stable Diffusion was trained to remove noise from a picture given its caption. To do so, every pixel of the UNet's
cross-attention asks every text token "are you about me?". Noise a real picture, let the UNet denoise it with its own
text, and average the answers: that is a word's map. From pixels to map:

    frame_image          picture ─► [3, S, S]                                      S = 512 for v1.4
    words.windows        text ─► token ids, and which tokens belong to which word
    RECIPES              how the picture is noised and how often the UNet is asked
    recording.recording  collects the maps of every cross-attention layer on the way, without changing the UNet's output
    word_maps            all of the above for a batch

Only the conditional branch is run: guidance doubles the cost and its other half never sees the words.

Shapes: b pictures; r rows, the windows of all texts of the batch (a text longer than the text encoder takes is run in
several); l tokens of a window; w words of a row; q pixels of a layer; g = 32.
"""
# ruff: noqa: E402 (imports below a statement)

import hashlib
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# diffusers imports bitsandbytes, which on some CPUs looks for a package named like our folder kernels/, and complains.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel
from einops import rearrange, reduce, repeat
from huggingface_hub import HfApi, try_to_load_from_cache
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lavender_min.recording import recording
from lavender_min.words import Word, find_words, join_fields, windows

FRAMES = ("whole", "crop")


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


def load(name: str, device: torch.device | str = "cpu") -> StableDiffusion:
    """A pipeline folder, or a model of huggingface.co by name; fp16 on a GPU, fp32 elsewhere."""
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    parts = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
    folder, local = Path(name), Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~"))
    missing = [part for part in parts if local and not (folder / part).is_dir()]
    if missing:
        there = f"lacks {', '.join(missing)}" if folder.is_dir() else "is not there"
        raise FileNotFoundError(f"--sd {name}: the pipeline folder {there}; it must hold {', '.join(parts)}")
    cached = local or isinstance(try_to_load_from_cache(name, "unet/diffusion_pytorch_model.safetensors"), str)
    try:
        if not cached:
            _ask_the_hub(name)  # fails at once; from_pretrained would first try for a minute
        # safetensors only: no pickle. What is in the cache is used as it is, with or without network.
        how: dict[str, Any] = {"use_safetensors": True, "local_files_only": cached}
        with warnings.catch_warnings(action="ignore"):
            text_encoder: Any = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=dtype, **how)
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", local_files_only=cached)
            if len(tokenizer) < 256:  # transformers makes an empty one, without a word, where there are no files
                raise OSError("the tokenizer's files are missing")
            noise_schedule = dict(DDIMScheduler.load_config(name, subfolder="scheduler", local_files_only=cached))
            vae = AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=dtype, **how)
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=dtype, **how)
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
    return StableDiffusion(tokenizer, text_encoder, vae, unet.to(memory_format=torch.channels_last), noise_schedule)


def _ask_the_hub(name: str) -> None:
    """Can this model be downloaded? Whatever the network or the hub says against it becomes an OSError."""
    try:
        HfApi().auth_check(name)
    except Exception as error:  # the HTTP library has its own kinds, which are no OSErrors
        raise OSError(f"huggingface.co says: {str(error).strip() or type(error).__name__}") from error


def frame_image(image: Image.Image, side: int, frame: str = "whole") -> Float[Tensor, "3 s s"]:
    """The picture as Stable Diffusion sees it, values −1…1.

    `whole` squeezes the whole picture into the square, so the map covers the ground the VLM sees; `crop` cuts the
    largest centred square, as the paper's released code does.
    """
    if frame == "crop":
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        image = image.crop((left, top, left + short, top + short))
    image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return rearrange(torch.from_numpy(np.array(image)), "y x c -> c y x").float() / 127.5 - 1


# ---- recipes: how the UNet is asked ---------------------------------------------------------------------------------


def ask(sd: StableDiffusion, latents: Tensor, t: Tensor, text: Tensor) -> Float[Tensor, "r c y x"]:
    """One pass of the UNet. Latents stay fp32 between passes."""
    return sd.unet(latents.to(sd.unet.dtype), t, encoder_hidden_states=text, return_dict=False)[0].float()


@torch.no_grad()
def seconds_a_pass(sd: StableDiffusion, pictures: int) -> float:
    """How long the UNet takes for so many pictures at once: the second of two passes, as the first warms up."""
    unet, began = sd.unet, 0.0
    latents = torch.zeros(pictures, unet.config.in_channels, *[unet.config.sample_size] * 2, device=unet.device)
    text = latents.new_zeros(pictures, sd.tokenizer.model_max_length, unet.config.cross_attention_dim).to(unet.dtype)
    for _ in range(2):
        began = time.perf_counter()
        ask(sd, latents, torch.tensor(500), text).sum().item()  # .item() waits for the GPU
    return time.perf_counter() - began


# Both schedules are spaced from the end, so that inversion stops at the very time step (999) where denoising starts;
# with Stable Diffusion's own spacing it would stop at 801 and denoising start at 901.
DDIM = {"timestep_spacing": "trailing", "clip_sample": False}


def paper(sd, latents, text, word_weights, ids, resolutions, *, inversion_steps: int, denoising_steps: int):
    """The paper's: noise the picture by DDIM inversion, then record while it is denoised again."""
    latents = inverted(sd, latents, text, inversion_steps)
    down = DDIMScheduler.from_config(sd.noise_schedule, **DDIM)
    down.set_timesteps(denoising_steps, device=latents.device)
    with recording(sd.unet, word_weights, resolutions) as recorder:
        for t in down.timesteps:
            latents = down.step(ask(sd, latents, t, text), t, latents).prev_sample
    return recorder.mean()


def invert(sd, latents, text, word_weights, ids, resolutions, *, inversion_steps: int):
    """Record during the inversion alone: a third of the paper's passes, and no drift away from the picture."""
    with recording(sd.unet, word_weights, resolutions) as recorder:
        inverted(sd, latents, text, inversion_steps)
    return recorder.mean()


def inverted(sd: StableDiffusion, latents: Tensor, text: Tensor, steps: int) -> Float[Tensor, "r c y x"]:
    """The noise from which DDIM would make this picture: its steps, taken backwards."""
    # An inverse step pairs the UNet's answer at t with a picture still at the step before. The scheduler can do so with
    # a predicted noise, but not with a predicted velocity, whose meaning depends on t: turn that into noise here.
    up = DDIMInverseScheduler.from_config(sd.noise_schedule, **DDIM, prediction_type="epsilon")
    up.set_timesteps(steps, device=latents.device)
    for t in up.timesteps:
        eps = ask(sd, latents, t, text)
        if sd.noise_schedule.get("prediction_type") == "v_prediction":
            kept = up.alphas_cumprod[t]
            eps = kept.sqrt() * eps + (1 - kept).sqrt() * latents
        latents = up.step(eps, t, latents).prev_sample
    return latents


def noise(sd, latents, text, word_weights, ids, resolutions, *, timesteps: Sequence[int], draws: int, seed: int):
    """Plain noise: `draws` noisy copies of the picture at each time step, all in one pass. Cheap.

    The noise of a picture depends on its id alone, not on what else is in the batch, nor on a run's interruptions.
    """
    scheduler = DDIMScheduler.from_config(sd.noise_schedule)
    n = len(timesteps) * draws
    eps = torch.stack([seeded_noise(f"{seed} {id}", (n, *latents.shape[1:])) for id in ids], 1).to(latents)
    latents, text, word_weights = (repeat(x, "r ... -> (n r) ...", n=n) for x in (latents, text, word_weights))
    t = repeat(torch.tensor(timesteps, device=latents.device), "s -> (s m)", m=draws * len(ids))
    noisy = scheduler.add_noise(latents, rearrange(eps, "n r ... -> (n r) ..."), t)
    with recording(sd.unet, word_weights, resolutions) as recorder:
        ask(sd, noisy, t, text)
    return reduce(recorder.mean(), "(n r) w y x -> r w y x", "mean", n=n)


def seeded_noise(name: str, shape: Sequence[int]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recipe(NamedTuple):
    run: Callable[..., Float[Tensor, "r w g g"]]
    settings: dict[str, Any]
    passes: Callable[[dict[str, Any]], int]  # UNet passes a picture


RECIPES = {
    "paper": Recipe(paper, {"inversion_steps": 5, "denoising_steps": 10}, lambda s: sum(s.values())),
    "invert": Recipe(invert, {"inversion_steps": 5}, lambda s: sum(s.values())),
    "noise": Recipe(
        noise, {"timesteps": [51, 151, 301], "draws": 1, "seed": 0}, lambda s: len(s["timesteps"]) * s["draws"]
    ),
}


# ---- the whole ------------------------------------------------------------------------------------------------------


def check_resolutions(sd: StableDiffusion, resolutions: Mapping[int, float] | None) -> None:
    if resolutions is not None and not (resolutions and set(resolutions) <= set(sd.map_sides)):
        raise ValueError(f"--resolutions: this UNet attends to text at {sd.map_sides}; got {sorted(resolutions)}")


class WordMaps(NamedTuple):
    words: list[Word]
    maps: Float[Tensor, "w g g"]  # raw probabilities, fp32, on the CPU
    sos: float  # the share of attention that went to the start-of-text token


@torch.no_grad()
def word_maps(
    sd: StableDiffusion,
    pixels: Float[Tensor, "b 3 s s"],
    texts: Sequence[Mapping[str, str]],
    ids: Sequence[str],
    recipe: str = "paper",
    settings: Mapping[str, Any] | None = None,
    resolutions: Mapping[int, float] | None = None,
) -> list[WordMaps]:
    """Maps for every word of every text of a batch. A row's maps do not depend on the rows beside it."""
    check_resolutions(sd, resolutions)
    device, dtype = sd.unet.device, sd.unet.dtype
    words = [find_words(fields) for fields in texts]
    cut = [windows(sd.tokenizer, *join_fields(*pair)) for pair in zip(texts, words, strict=True)]
    owner = [i for i, example in enumerate(cut) for _ in example]  # [r]: which picture a row belongs to
    rows = [window for example in cut for window in example]
    lengths: list[Counter[int]] = [Counter() for _ in cut]  # tokens of each word, over all its windows
    for i, row in zip(owner, rows, strict=True):
        lengths[i].update({word: len(positions) for word, positions in row.words.items()})

    # Word 0 of each row is the start-of-text token, whose share says how much of the attention the words did not get.
    weights = torch.zeros(len(rows), sd.tokenizer.model_max_length, 1 + max(len(row.words) for row in rows))
    weights[:, 0, 0] = 1
    for r, (i, row) in enumerate(zip(owner, rows, strict=True)):
        for column, (word, positions) in enumerate(row.words.items(), start=1):
            weights[r, positions, column] = 1 / lengths[i][word]

    text = sd.text_encoder(torch.tensor([row.ids for row in rows], device=device))[0]
    latents = sd.vae.encode(pixels.to(device, dtype)).latent_dist.mode().float() * sd.vae.config.scaling_factor
    how = RECIPES[recipe]
    maps = how.run(
        sd, latents[owner], text, weights.to(device), [ids[i] for i in owner], resolutions,
        **(how.settings | dict(settings or {})),
    ).cpu()  # fmt: skip

    found = []
    for i, example_words in enumerate(words):
        whole = torch.zeros(len(example_words), *maps.shape[-2:])
        mine = [r for r in range(len(rows)) if owner[r] == i]
        for r in mine:
            whole[list(rows[r].words)] += maps[r, 1 : 1 + len(rows[r].words)]
        kept = [word for word in range(len(example_words)) if lengths[i][word]]  # a word may have no token at all
        found.append(WordMaps([example_words[k] for k in kept], whole[kept], maps[mine, 0].mean().item()))
    return found
