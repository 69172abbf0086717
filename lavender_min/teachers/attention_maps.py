"""Stable Diffusion as a teacher: a picture and its text in, one 32×32 attention map a word out.

Stable Diffusion was trained to remove noise from a picture given its caption. To do so, each pixel of the UNet's
cross-attention weighs every token of the text by how much it has to do with that pixel. Noise a real picture, let the UNet
denoise it with its own text, and average these weights: that is a word's map. From pixels to map:

    stable_diffusion.load  the model's parts
    frame_image            picture ─► [3, S, S]                                      S = 512 for v1.4
    words.windows          text ─► token ids, and which tokens belong to which word
    recipes.run            noises the picture and runs the UNet, as the recipe says
    recording.recording    sums the maps of the cross-attention layers meanwhile, without changing the UNet's output
    record                 all of the above for a batch: the maps by the side of their layers
    combine                these maps weighted, put together to words, and, if the recipe says so, content-normalised
    word_maps              record and combine

Shapes in this file: b pictures; r windows of their texts (a text longer than the text encoder takes is run in several), each run
with its picture; t tokens of a window; w words; g = 32.
"""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavender_min.teachers import RECIPES, Recipe, find_recipe, recipes
from lavender_min.teachers.recording import Recorder
from lavender_min.teachers.stable_diffusion import StableDiffusion
from lavender_min.words import Window, Word, find_words, join_fields, windows


def frame_image(image: Image.Image, side: int, frame: str = "whole") -> Float[Tensor, "3 {side} {side}"]:
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


def check_resolutions(sd: StableDiffusion, recipe: Recipe) -> None:
    """Raises ValueError if the recipe weights layers that this UNet does not have."""
    wanted = recipe.resolutions
    if wanted is not None and not (wanted and set(wanted) <= set(sd.map_sides)):
        raise ValueError(f"--resolutions: this UNet attends to text at {sd.map_sides}; got {sorted(wanted)}")


class Stopwatch:
    """Seconds by phase, a GPU's work included: `with watch("UNet"): …` adds to `watch.seconds["UNet"]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.add({phase: time.perf_counter() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


class CutTexts(NamedTuple):
    """The texts of b pictures, cut into the r windows that the text encoder takes."""

    # The words of each picture's text.
    words: list[list[Word]]
    windows: list[Window]

    # For each window, the picture it belongs to.
    owner: list[int]

    # For each picture, how many tokens each word has, over all its windows.
    lengths: list[Counter[int]]


class Recorded(NamedTuple):
    """What was recorded for a batch."""

    texts: CutTexts

    # By side of the layers, the mean over layers and passes: a map for SOS (word 0) and for each word of a window; fp32, on
    # the CPU.
    maps: dict[int, Float[Tensor, "r w g g"]]

    # By side, how many layers went into the mean, each as often as it ran.
    layers: Counter[int]

    # Seconds spent on text, VAE and UNet.
    seconds: dict[str, float]


class WordMaps(NamedTuple):
    """The maps of one picture's words."""

    words: list[Word]

    # Probabilities as the UNet gives them, unless they are content-normalised; fp32, on the CPU.
    maps: Float[Tensor, "w g g"]

    # The share of attention that went to the start-of-text token.
    sos: float


@torch.no_grad()
def record(
    sd: StableDiffusion,
    pixels: Float[Tensor, "b 3 side side"],
    texts: Sequence[Mapping[str, str]],
    ids: Sequence[str],
    recipe: Recipe = RECIPES["paper"],
    tell: Callable[[int, int], object] = lambda windows, of: None,
) -> Recorded:
    """Run a recipe on a batch of framed pictures and their texts, and record the layers that it gives a weight.

    At most b windows are run together, however long the texts: memory is bounded by the number of pictures. The maps of a
    window do not depend on the windows beside it. `tell` is called with the number of windows that are done, and of all.
    """
    check_resolutions(sd, recipe)
    sides = (
        sd.map_sides if recipe.resolutions is None else [s for s, weight in recipe.resolutions.items() if weight > 0]
    )
    device, watch = sd.unet.device, Stopwatch()
    cut = cut_texts(sd, texts)
    with watch("text"):
        ids_of = torch.tensor([window.ids for window in cut.windows], device=device).split(len(pixels))
        text = torch.cat([sd.text_encoder(some)[0] for some in ids_of])
    with watch("VAE"):
        latents = sd.vae.encode(pixels.to(device, sd.vae.dtype)).latent_dist.mode().float()[cut.owner]
        latents *= sd.vae.config.scaling_factor
    weights, found, done = word_weights(cut).to(device), defaultdict(list), 0
    with watch("UNet"):
        for some in torch.arange(len(cut.windows), device=device).split(len(pixels)):
            recorder = Recorder(weights[some], sides)
            inputs = recipes.Inputs(latents[some], text[some], [ids[cut.owner[r]] for r in some.tolist()])
            recipes.run(recipe, sd, inputs, recorder)
            for side, maps in recorder.means().items():
                found[side].append(maps.cpu())
            done += len(some)
            tell(done, len(cut.windows))
    return Recorded(cut, {side: torch.cat(maps) for side, maps in found.items()}, recorder.layers, watch.seconds)


def cut_texts(sd: StableDiffusion, texts: Sequence[Mapping[str, str]]) -> CutTexts:
    """Find the words of each text, and cut it into windows."""
    words = [find_words(fields) for fields in texts]
    cut = [windows(sd.tokenizer, *join_fields(*pair)) for pair in zip(texts, words, strict=True)]
    lengths: list[Counter[int]] = [Counter() for _ in cut]
    for i, own in enumerate(cut):
        for window in own:
            lengths[i].update({word: len(positions) for word, positions in window.words.items()})
    owner = [i for i, own in enumerate(cut) for _ in own]
    return CutTexts(words, [window for own in cut for window in own], owner, lengths)


def word_weights(cut: CutTexts) -> Float[Tensor, "r t w"]:
    """How much each token counts for each word of a window: a word is the mean of its tokens, in whatever windows they are.

    Word 0 is the start-of-text token, whose share says how much of the attention the words did not get. A window's own words
    follow in reading order; windows with fewer words than others have zeros behind.
    """
    columns = 1 + max(len(window.words) for window in cut.windows)
    weights = torch.zeros(len(cut.windows), len(cut.windows[0].ids), columns)
    weights[:, 0, 0] = 1
    for r, (i, window) in enumerate(zip(cut.owner, cut.windows, strict=True)):
        for column, (word, positions) in enumerate(window.words.items(), start=1):
            weights[r, positions, column] = 1 / cut.lengths[i][word]
    return weights


def combine(recorded: Recorded, recipe: Recipe = RECIPES["paper"]) -> list[WordMaps]:
    """For each picture the map of every word: layers weighted by the recipe's resolutions, windows put together.

    One recording can be combined in several ways, if the recipe it was recorded with gave every layer a weight.
    """
    texts, layers = recorded.texts, recorded.layers
    wanted = {side: 1.0 if recipe.resolutions is None else recipe.resolutions.get(side, 0.0) for side in recorded.maps}
    weights = {side: weight * layers[side] for side, weight in wanted.items()}
    total = sum(weights.values())
    maps = torch.stack([weights[side] / total * recorded.maps[side] for side in weights]).sum(0)
    found = []
    for i, (words, lengths) in enumerate(zip(texts.words, texts.lengths, strict=True)):
        whole = torch.zeros(len(words), *maps.shape[-2:])
        own = [r for r, owner in enumerate(texts.owner) if owner == i]
        for r in own:
            placed = list(texts.windows[r].words)
            whole[placed] += maps[r, 1 : 1 + len(placed)]
        if recipe.content_norm:
            whole = normalised(whole, torch.tensor([float(lengths[word]) for word in range(len(words))]))
        # A word may have no token at all, and then has no map.
        kept = [word for word in range(len(words)) if lengths[word]]
        found.append(WordMaps([words[word] for word in kept], whole[kept], maps[own, 0].mean().item()))
    return found


def normalised(maps: Float[Tensor, "w g g"], tokens: Float[Tensor, " w"]) -> Float[Tensor, "w g g"]:
    """Each pixel divided by what the tokens of all words get there together; a word's map is the mean of its `tokens`.

    So words compete, and a pixel that gives nearly all to SOS counts as much as any other. This is the per-pixel
    rescaling of GoCA (arXiv 2603.06178) and what DAAM calls `normalize`.
    """
    return maps / einsum(maps, tokens, "w y x, w -> y x").clamp(min=1e-30)


def word_maps(
    sd: StableDiffusion,
    pixels: Float[Tensor, "b 3 side side"],
    texts: Sequence[Mapping[str, str]],
    ids: Sequence[str],
    recipe: Recipe = RECIPES["paper"],
) -> list[WordMaps]:
    """For each picture of a batch the maps of its words."""
    return combine(record(sd, pixels, texts, ids, recipe), recipe)


def try_out(sd: StableDiffusion) -> None:
    """Run everything once, on a black picture: parts that do not fit together, or have odd settings, raise something here."""
    recipe = find_recipe("noise", timesteps=[1])
    word_maps(sd, torch.zeros(1, 3, sd.side, sd.side), [{"answer": "a"}], [""], recipe)
