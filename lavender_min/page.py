"""A page to look at: pictures beside their texts, and, for the word that one points at, each model's map over the picture.

One HTML file that asks for nothing outside itself. This module knows no model. It takes plain data, writes it as JSON into
`page.html`, which lies beside it, and what that file's script makes of it is all that a reader sees.

Maps travel as pictures that the browser scales. A text has one PNG, a row a word and a column a map. Each map is stretched to
0 … 1 as in `draw`, so a page shows where a map is large, and its numbers say how large.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from lavender_min.geometry import minmax, resize_map
from lavender_min.words import Word

TEMPLATE = Path(__file__).with_name("page.html")
# Where the template takes the data.
MARK = "{{data}}"
# Pixels of a picture's longer side, at most.
PICTURE_SIDE = 448
# There are hundreds of maps a word if each layer and head has its own, so these are smaller than others.
HEAD_SIDE = 16
HEAD_LEVELS = 16
# So many shades are enough for a map that the browser smooths, and take a quarter less than 256.
LEVELS = 64


class WordMaps(NamedTuple):
    """A word that can be pointed at."""

    word: Word
    # One for each of `Page.names`.
    maps: Float[Tensor, "names g g"]
    # Below each map, {what: how much}, as it is to be read.
    numbers: Sequence[dict[str, str]]
    # Where the thing lies that the word names, if that is known.
    mask: Bool[Tensor, "g g"] | None = None
    # The maps of single layers and heads, if they are to be leafed through.
    heads: Float[Tensor, "l h g g"] | None = None


class Text(NamedTuple):
    """A bare caption (`question` is "") or a question and its answer. Words that have no maps are only read."""

    question: str
    answer: str
    words: Sequence[WordMaps]


class Picture(NamedTuple):
    name: str
    # None where it is not at hand: maps are then shown alone, as squares.
    image: Image.Image | None
    texts: Sequence[Text]


class Page(NamedTuple):
    title: str
    # What one sees here, in a sentence or two.
    about: str
    # Whose maps stand side by side.
    names: Sequence[str]
    pictures: Sequence[Picture]
    # The layers of `WordMaps.heads`, by the host's own count.
    layers: Sequence[int] = ()


def write(path: Path, page: Page) -> None:
    content = {
        "title": page.title,
        "about": page.about,
        "names": list(page.names),
        "layers": list(page.layers),
        "pictures": [picture_data(picture) for picture in page.pictures],
    }
    # In a script, "</script>" would end it wherever it stands. All else that is not ASCII is escaped too.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace(MARK, data), encoding="utf-8")


def picture_data(picture: Picture) -> dict[str, Any]:
    found: dict[str, Any] = {"name": picture.name, "image": "", "width": 1, "height": 1}
    if picture.image is not None:
        small = picture.image.convert("RGB")
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        found |= {"image": as_url(small, "JPEG", quality=85), "width": small.width, "height": small.height}
    return found | {"texts": [text_data(text) for text in picture.texts]}


def text_data(text: Text) -> dict[str, Any]:
    words = [word_data(of) for of in text.words]
    fields = {
        name: pieces(value, [(i, of.word) for i, of in enumerate(text.words) if of.word.field == name])
        for name, value in (("question", text.question), ("answer", text.answer))
    }
    return {**fields, "words": words, "maps": sprite(torch.stack([of.maps for of in text.words])) if words else ""}


def pieces(text: str, words: Sequence[tuple[int, Word]]) -> list[str | int]:
    """A text cut at its words, which are in reading order and stand there by their number.

    Offsets would not do: JavaScript counts some characters as two.
    """
    found: list[str | int] = []
    at = 0
    for number, word in words:
        found += [text[at : word.start], number]
        at = word.end
    return [piece for piece in [*found, text[at:]] if piece != ""]


def word_data(of: WordMaps) -> dict[str, Any]:
    side = of.maps.shape[-1]
    peaks = of.maps.flatten(1).argmax(1).tolist()
    found: dict[str, Any] = {
        "text": of.word.text,
        "numbers": list(of.numbers),
        # (x, y) of the largest cell's centre, as shares of the picture.
        "peaks": [[(peak % side + 0.5) / side, (peak // side + 0.5) / side] for peak in peaks],
    }
    if of.mask is not None:
        found["outline"] = outline(of.mask)
    if of.heads is not None:
        found["heads"] = sprite(resize_map(with_means(of.heads.float()), HEAD_SIDE), levels=HEAD_LEVELS)
    return found


def outline(mask: Bool[Tensor, "g g"]) -> str:
    """The line around a mask as the path of an SVG whose unit is a cell."""
    cells = np.pad(mask.numpy(), 1)
    across = np.argwhere(cells[1:, 1:-1] != cells[:-1, 1:-1])
    down = np.argwhere(cells[1:-1, 1:] != cells[1:-1, :-1])
    return "".join([f"M{x} {y}h1" for y, x in across] + [f"M{x} {y}v1" for y, x in down])


def with_means(heads: Float[Tensor, "l h g g"]) -> Float[Tensor, "rows columns g g"]:
    """Before the layers their mean, before the heads theirs."""
    layers = torch.cat([reduce(heads, "l h y x -> 1 h y x", "mean"), heads])
    return torch.cat([reduce(layers, "l h y x -> l 1 y x", "mean"), layers], 1)


def sprite(maps: Float[Tensor, "rows columns side side"], levels: int = LEVELS) -> str:
    """All maps in one PNG, each stretched to 0 … 1. Its palette gives a value its colour, and more opacity the larger it is."""
    cells = (minmax(maps.float()) * (levels - 1)).round().to(torch.uint8).cpu()
    image = Image.fromarray(rearrange(cells, "r c y x -> (r y) (c x)").numpy(), "P")
    values = np.linspace(0, 1, levels)
    colors = as_bytes(matplotlib.colormaps["inferno"](values)[:, :3])
    image.putpalette(colors.tobytes())
    bits = {"bits": 4} if levels <= 16 else {}
    return as_url(image, "PNG", optimize=True, transparency=as_bytes(0.35 + 0.5 * values).tobytes(), **bits)


def as_bytes(shares: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    return (shares * 255).round().astype(np.uint8)


def as_url(image: Image.Image, format: str, **how: Any) -> str:
    """A picture as text that stands in for its address."""
    file = io.BytesIO()
    image.save(file, format, **how)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
