"""One's own picture: what a model says about it, and where it looked for every word it said.

The model answers freely. Then its own answer is put back as text (teacher forcing), so that each of its words has rows
from which the attention can be read, just as in training.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lavender_min import data, draw, page
from lavender_min.data import Example
from lavender_min.evaluation import models
from lavender_min.evaluation.flags import Flags
from lavender_min.geometry import MAP_SIDE, contrast
from lavender_min.maps import StoredMaps, entropy
from lavender_min.words import Word, find_words

# Words in a line of the drawing.
COLUMNS = 6
# Tokens of an answer, at most.
LONGEST = 256
TITLES = {"own": "the model's attention", "aligned": "through the Aligner"}

ABOUT = (
    "An answer, and where the model looked for each of its words. Contrast: how sharp a map is, (largest − smallest) / mean. "
    "Entropy: how spread out it is, at most 6.93 nats. Maps of single layers and heads are coarser, 16 × 16 cells."
)


class Reply(NamedTuple):
    """An answer, its words, and each kind of map of every word (`Lavender.read`)."""

    text: str
    words: list[Word]
    maps: dict[str, Float[Tensor, "w g g"]]


def describe(flags: Flags, image: Image.Image) -> None:
    """Prints the answer to `flags.question` about a picture, and draws it into the folder `flags.out`."""
    vlm = flags.vlm if flags.vlm or flags.adapter else data.SOURCES[flags.data].vlm
    loaded = models.load_adapter(vlm, flags.adapter, models.half_of_gpu())
    reply = answer(loaded, image, flags.question)
    print(reply.text)
    if not reply.words:
        raise ValueError(f"the answer of {flags.adapter or vlm}, {reply.text!r}, has no words to draw")
    draw_reply(flags.drawing, image, reply)
    print(f"{flags.drawing} shows where it looked for each word")
    if flags.html:
        write_page(flags.page, loaded, image, flags.question, reply)
        print(f"{flags.page} is to be opened in a browser")


def answer(loaded: models.Loaded, image: Image.Image, question: str) -> Reply:
    """The model's answer. The question "" stands for a caption."""
    example = Example("picture", lambda: image, question, "")
    text = models.answer(loaded.model, loaded.processor, [example], 1, "answer", LONGEST)[0].strip()
    words = find_words({"answer": text})
    if not words:
        return Reply(text, [], {})
    return Reply(text, words, models.maps_of_batch(loaded.model, said(loaded, image, question, text, words)))


def said(loaded: models.Loaded, image: Image.Image, question: str, text: str, words: list[Word]) -> dict[str, Any]:
    """A batch in which the answer stands as text."""
    example = Example("picture", lambda: image, question, text)
    stored = StoredMaps(question, text, words, torch.zeros(len(words), MAP_SIDE, MAP_SIDE), 0.0)
    return models.collator(loaded, "whole")([(example, stored)])


def draw_reply(path: Path, image: Image.Image, reply: Reply) -> None:
    """A PNG of small pictures: one a word and kind of map, in reading order."""
    words, maps = reply.words, reply.maps
    lines = -(-len(words) // COLUMNS)
    width, high = min(len(words), COLUMNS), lines * len(maps)
    figure = Figure(figsize=(2.0 * width, (2.0 * image.height / image.width + 0.3) * high), layout="constrained")
    axes = figure.subplots(high, width, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for k, (kind, of) in enumerate(maps.items()):
        for i, word in enumerate(words):
            axis = axes[k * lines + i // COLUMNS, i % COLUMNS]
            axis.set_axis_on()
            draw.overlay(axis, image, of[i])
            axis.set_title(word.text, fontsize=9)
            axis.set_aspect(image.height / image.width)
        axes[k * lines, 0].set_ylabel(TITLES[kind], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def write_page(path: Path, loaded: models.Loaded, image: Image.Image, question: str, reply: Reply) -> None:
    """A page of this one picture, with the maps of single layers and heads to leaf through."""
    heads = models.heads_of_batch(loaded.model, said(loaded, image, question, reply.text, reply.words))
    sharp, spread = ([of(maps).tolist() for maps in reply.maps.values()] for of in (contrast, entropy))
    words = [
        page.WordMaps(
            word,
            torch.stack([of[i] for of in reply.maps.values()]),
            [{"contrast": f"{c[i]:.2f}", "entropy": f"{e[i]:.3f}"} for c, e in zip(sharp, spread, strict=True)],
            heads=heads[i],
        )
        for i, word in enumerate(reply.words)
    ]
    picture = page.Picture(path.stem, image, [page.Text(question, reply.text, words)])
    names = [TITLES[kind] for kind in reply.maps]
    page.write(path, page.Page("Where it looked for each word", ABOUT, names, [picture], loaded.model.layers))
