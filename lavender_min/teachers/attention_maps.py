"""Stable Diffusion as a teacher: a picture and its text in, one 32×32 attention map a word out.

Stable Diffusion was trained to remove noise from a picture given its caption. To do so, every pixel of the UNet's
cross-attention asks every text token "are you about me?". Noise a real picture, let the UNet denoise it with its own
text, and average the answers: that is a word's map. From pixels to map:

    stable_diffusion.load  the model's parts
    frame_image            picture ─► [3, S, S]                                      S = 512 for v1.4
    words.windows          text ─► token ids, and which tokens belong to which word
    recipes.RECIPES        how the picture is noised and how often the UNet is asked
    recording.recording    collects the maps of every cross-attention layer on the way, without changing the UNet's output
    record                 all of the above for a batch; what was seen, by the side of the layers
    read                   the layers' answers weighted, put together to words, and, if asked for, content-normalised
    word_maps              record and read

Shapes: b pictures; r rows, the windows of all texts of the batch (a text longer than the text encoder takes is run in
several); l tokens of a window; w words; g = 32.
"""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavender_min.teachers.recipes import RECIPES
from lavender_min.teachers.recording import Recorder
from lavender_min.teachers.stable_diffusion import StableDiffusion, load
from lavender_min.words import Window, Word, find_words, join_fields, windows

__all__ = ["FRAMES", "RECIPES", "StableDiffusion", "frame_image", "load", "read", "record", "timed", "word_maps"]
FRAMES = ("whole", "crop")


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


def check_resolutions(sd: StableDiffusion, resolutions: Mapping[int, float] | None) -> None:
    if resolutions is not None and not (resolutions and set(resolutions) <= set(sd.map_sides)):
        raise ValueError(f"--resolutions: this UNet attends to text at {sd.map_sides}; got {sorted(resolutions)}")


@contextlib.contextmanager
def timed(times: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds of this `with` to times[phase], a GPU's work included."""
    began = time.perf_counter()
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    times[phase] = times.get(phase, 0.0) + time.perf_counter() - began


class Recorded(NamedTuple):
    """What the UNet answered for a batch: by side of the layers, a map for SOS (word 0) and for every word of a row."""

    words: list[list[Word]]  # of every picture
    rows: list[Window]
    owner: list[int]  # [r]: which picture a row belongs to
    lengths: list[Counter[int]]  # of every picture: how many tokens a word has, over all its rows
    maps: dict[int, Float[Tensor, "r w g g"]]  # mean over layers and passes; fp32, on the CPU
    layers: Counter[int]  # how many layers of that side, times passes, went into it


class WordMaps(NamedTuple):
    words: list[Word]
    maps: Float[Tensor, "w g g"]  # probabilities as the UNet gives them unless content-normalised, fp32, on the CPU
    sos: float  # the share of attention that went to the start-of-text token


@torch.no_grad()
def record(
    sd: StableDiffusion,
    pixels: Float[Tensor, "b 3 s s"],
    texts: Sequence[Mapping[str, str]],
    ids: Sequence[str],
    recipe: str = "paper",
    settings: Mapping[str, Any] | None = None,
    sides: Sequence[int] | None = None,
    times: dict[str, float] | None = None,
) -> Recorded:
    """Run a recipe on a batch. A row's maps do not depend on the rows beside it.

    At most b rows are run together, however long the texts: memory is bounded by the number of pictures. `sides`: the
    layers to record, None for all. `times` gets the seconds spent on text, VAE and UNet.
    """
    device, times = sd.unet.device, {} if times is None else times
    words = [find_words(fields) for fields in texts]
    cut = [windows(sd.tokenizer, *join_fields(*pair)) for pair in zip(texts, words, strict=True)]
    owner = [i for i, example in enumerate(cut) for _ in example]
    rows = [window for example in cut for window in example]
    lengths: list[Counter[int]] = [Counter() for _ in cut]
    for i, row in zip(owner, rows, strict=True):
        lengths[i].update({word: len(positions) for word, positions in row.words.items()})

    # Word 0 of each row is the start-of-text token, whose share says how much of the attention the words did not get.
    weights = torch.zeros(len(rows), sd.tokenizer.model_max_length, 1 + max(len(row.words) for row in rows))
    weights[:, 0, 0] = 1
    for r, (i, row) in enumerate(zip(owner, rows, strict=True)):
        for column, (word, positions) in enumerate(row.words.items(), start=1):
            weights[r, positions, column] = 1 / lengths[i][word]

    with timed(times, "text"):
        text = sd.text_encoder(torch.tensor([row.ids for row in rows], device=device))[0]
    with timed(times, "VAE"):
        latents = sd.vae.encode(pixels.to(device, sd.vae.dtype)).latent_dist.mode().float()[owner]
        latents *= sd.vae.config.scaling_factor
    how, found, weights = RECIPES[recipe], defaultdict(list), weights.to(device)
    with timed(times, "UNet"):
        for some in torch.arange(len(rows), device=device).split(len(pixels)):
            recorder = Recorder(weights[some], sides or sd.map_sides)
            names = [ids[owner[r]] for r in some.tolist()]
            how.run(sd, latents[some], text[some], recorder, names, **(how.settings | dict(settings or {})))
            for side, maps in recorder.means().items():
                found[side].append(maps.cpu())
    return Recorded(
        words, rows, owner, lengths, {side: torch.cat(maps) for side, maps in found.items()}, recorder.layers
    )


def read(
    recorded: Recorded, resolutions: Mapping[int, float] | None = None, content_norm: bool = False
) -> list[WordMaps]:
    """The map of every word of every picture. `resolutions` {side: weight}: a layer of that side counts that much."""
    words, rows, owner, lengths, sides, layers = recorded
    weights = {side: (1.0 if resolutions is None else resolutions.get(side, 0.0)) * layers[side] for side in sides}
    maps = torch.stack([weights[side] / sum(weights.values()) * sides[side] for side in sides]).sum(0)
    found = []
    for i, example_words in enumerate(words):
        whole = torch.zeros(len(example_words), *maps.shape[-2:])
        mine = [r for r in range(len(rows)) if owner[r] == i]
        for r in mine:
            whole[list(rows[r].words)] += maps[r, 1 : 1 + len(rows[r].words)]
        if content_norm:
            whole = normalised(whole, torch.tensor([float(lengths[i][word]) for word in range(len(example_words))]))
        kept = [word for word in range(len(example_words)) if lengths[i][word]]  # a word may have no token at all
        found.append(WordMaps([example_words[k] for k in kept], whole[kept], maps[mine, 0].mean().item()))
    return found


def normalised(maps: Float[Tensor, "w g g"], tokens: Float[Tensor, " w"]) -> Float[Tensor, "w g g"]:
    """Each pixel divided by what the tokens of all words get there together; a word's map is the mean of its `tokens`.

    So words compete, and a pixel that gives nearly all to SOS counts as much as any other. This is the per-pixel
    rescaling of GoCA (arXiv 2603.06178) and what DAAM calls `normalize`.
    """
    return maps / einsum(maps, tokens, "w y x, w -> y x").clamp(min=1e-30)


def word_maps(
    sd: StableDiffusion,
    pixels: Float[Tensor, "b 3 s s"],
    texts: Sequence[Mapping[str, str]],
    ids: Sequence[str],
    recipe: str = "paper",
    settings: Mapping[str, Any] | None = None,
    resolutions: Mapping[int, float] | None = None,
    content_norm: bool = False,
    times: dict[str, float] | None = None,
) -> list[WordMaps]:
    """Maps for every word of every text of a batch, from the layers that `resolutions` gives a weight."""
    check_resolutions(sd, resolutions)
    sides = None if resolutions is None else [side for side, weight in resolutions.items() if weight > 0]
    recorded = record(sd, pixels, texts, ids, recipe, settings, sides, times)
    with timed({} if times is None else times, "reading"):
        return read(recorded, resolutions, content_norm)
