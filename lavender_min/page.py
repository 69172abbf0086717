"""A page to look at: pictures beside their texts, and, for the word that one points at, each model's map over the picture.

A page is one HTML file that loads nothing from elsewhere. This module knows no model: it takes plain data (`Page`) and writes it
as JSON into a copy of `page.html`, the template beside this file. The script in that template draws all that a reader sees.

Maps are stored as images that the browser scales. Each text has one PNG, a *sprite*: row i holds the maps of word i, column j
those of model j. Each map is stretched to 0 … 1 as in `draw`, so its colours show where it is large, not how large. The numbers
below it (`WordMaps.numbers`) say how large.
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
# What stands in the template where the data goes.
MARK = "{{data}}"
# Pixels of a picture's longer side, at most.
PICTURE_SIDE = 448
# Shades of a map. The browser smooths it, so 64 are enough, and the file is a quarter smaller than with 256.
LEVELS = 64
# Cells of a side and shades of the map of one layer and head. There are hundreds of these a word, so they are kept small.
HEAD_SIDE = 16
HEAD_LEVELS = 16


class WordMaps(NamedTuple):
    """A word that can be pointed at."""

    word: Word
    # One map for each of `Page.names`, in their order.
    maps: Float[Tensor, "names g g"]
    # What is printed below each map: {measure: its value as text}.
    numbers: Sequence[dict[str, str]]
    # Where the thing lies that the word names, if that is known.
    mask: Bool[Tensor, "g g"] | None = None
    # The maps of single layers and heads, where the page lets one step through them.
    heads: Float[Tensor, "l h g g"] | None = None


class Text(NamedTuple):
    """A bare caption (`question` is "") or a question and its answer.

    `words` are those that can be pointed at, in reading order. All other words are plain text.
    """

    question: str
    answer: str
    words: Sequence[WordMaps]


class Picture(NamedTuple):
    name: str
    # None where the picture is not at hand: its maps are then shown as squares, with nothing under them.
    image: Image.Image | None
    texts: Sequence[Text]


class Page(NamedTuple):
    title: str
    # What the page shows, in a sentence or two.
    about: str
    # The models whose maps stand side by side.
    names: Sequence[str]
    pictures: Sequence[Picture]
    # The layers of `WordMaps.heads`, as the host numbers them; empty where words have no such maps.
    layers: Sequence[int] = ()


def write(path: Path, page: Page) -> None:
    """Writes the page as one HTML file, and makes its folder if it is missing."""
    content = {
        "title": page.title,
        "about": page.about,
        "names": list(page.names),
        "layers": list(page.layers),
        "pictures": [picture_data(picture) for picture in page.pictures],
    }
    # A browser ends a script at the first "</script>", even inside a string, so no "<" may stand in the data.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace(MARK, data), encoding="utf-8")


def picture_data(picture: Picture) -> dict[str, Any]:
    """What the script reads of a picture: its name, image (a data URL, or ""), width and height in pixels, and texts."""
    found: dict[str, Any] = {"name": picture.name, "image": "", "width": 1, "height": 1}
    if picture.image is not None:
        small = picture.image.convert("RGB")
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        found |= {"image": as_url(small, "JPEG", quality=85), "width": small.width, "height": small.height}
    return found | {"texts": [text_data(text) for text in picture.texts]}


def text_data(text: Text) -> dict[str, Any]:
    """What the script reads of a text: question and answer as `pieces`, the words by number, and the sprite of their maps."""
    words = [word_data(of) for of in text.words]
    fields = {
        name: pieces(value, [(i, of.word) for i, of in enumerate(text.words) if of.word.field == name])
        for name, value in (("question", text.question), ("answer", text.answer))
    }
    return {**fields, "words": words, "maps": sprite(torch.stack([of.maps for of in text.words])) if words else ""}


def pieces(text: str, words: Sequence[tuple[int, Word]]) -> list[str | int]:
    """A text cut into plain text (str) and words that can be pointed at (int: the word's number). `words` are in reading order.

    >>> pieces("A dog runs.", [(0, Word("dog", "answer", 2, 5))])
    ['A ', 0, ' runs.']

    The text is cut here because Python's offsets would be wrong in JavaScript, which counts some characters as two.
    """
    found: list[str | int] = []
    at = 0
    for number, word in words:
        found += [text[at : word.start], number]
        at = word.end
    return [piece for piece in [*found, text[at:]] if piece != ""]


def word_data(of: WordMaps) -> dict[str, Any]:
    """What the script reads of a word: all but its maps, which stand in the text's sprite."""
    side = of.maps.shape[-1]
    peaks = of.maps.flatten(1).argmax(1).tolist()
    found: dict[str, Any] = {
        "text": of.word.text,
        "numbers": list(of.numbers),
        # (x, y) of each map's largest cell, at its centre, as shares of the picture's width and height.
        "peaks": [[(peak % side + 0.5) / side, (peak // side + 0.5) / side] for peak in peaks],
    }
    if of.mask is not None:
        found["outline"] = outline(of.mask)
    if of.heads is not None:
        found["heads"] = sprite(resize_map(with_means(of.heads.float()), HEAD_SIDE), levels=HEAD_LEVELS)
    return found


def outline(mask: Bool[Tensor, "g g"]) -> str:
    """The line around a mask as an SVG path, in units of one cell: an edge wherever a cell and its neighbour differ."""
    cells = np.pad(mask.numpy(), 1)
    across = np.argwhere(cells[1:, 1:-1] != cells[:-1, 1:-1])
    down = np.argwhere(cells[1:-1, 1:] != cells[1:-1, :-1])
    return "".join([f"M{x} {y}h1" for y, x in across] + [f"M{x} {y}v1" for y, x in down])


def with_means(heads: Float[Tensor, "l h g g"]) -> Float[Tensor, "rows columns g g"]:
    """Puts means first: row 0 is the mean over layers, column 0 the mean over heads. Row 1 + i, column 1 + j is layer i, head j."""
    layers = torch.cat([reduce(heads, "l h y x -> 1 h y x", "mean"), heads])
    return torch.cat([reduce(layers, "l h y x -> l 1 y x", "mean"), layers], 1)


def sprite(maps: Float[Tensor, "rows columns side side"], levels: int = LEVELS) -> str:
    """All maps in one PNG, as a data URL. Each is stretched to 0 … 1; the larger a value, the brighter and the less transparent."""
    cells = (minmax(maps.float()) * (levels - 1)).round().to(torch.uint8).cpu()
    image = Image.fromarray(rearrange(cells, "r c y x -> (r y) (c x)").numpy(), "P")
    values = np.linspace(0, 1, levels)
    colors = as_bytes(matplotlib.colormaps["inferno"](values)[:, :3])
    image.putpalette(colors.tobytes())
    # Pillow writes 8 bits a pixel unless it is told that 4 will do.
    bits = {"bits": 4} if levels <= 16 else {}
    return as_url(image, "PNG", optimize=True, transparency=as_bytes(0.35 + 0.5 * values).tobytes(), **bits)


def as_bytes(shares: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    return (shares * 255).round().astype(np.uint8)


def as_url(image: Image.Image, format: str, **how: Any) -> str:
    """A picture as a data URL: text that stands where the picture's address would, and holds the whole of it."""
    file = io.BytesIO()
    image.save(file, format, **how)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
