"""RefCOCO, RefCOCO+ and RefCOCOg: expressions by which people told one thing in a photograph from the others, with its box.

They are read from Parquet copies as lmms-lab has them on the hub. A row is a thing: image {bytes, path}, answer [expressions],
bbox [x, y, width, height] in pixels, file_name. The splits are val and test, or val, testA (people) and testB (other things). A
split's files are named after it (val-00000-of-00004.parquet), or lie in a folder that is. A row's `segmentation` is not read: it is
one list of numbers, in which several polygons cannot be told apart.

An expression names its thing first: of "man in a red shirt" only "man" has the box as its region.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from typing_extensions import TypedDict

from lavender_min.data import Example, check_captions, parquet
from lavender_min.data.regions import LITTLE, Place, box, polygon_mask, regions
from lavender_min.data.texts import Text, keep
from lavender_min.failing import shaped
from lavender_min.words import find_words

# COCO_train2014_000000581857_16.jpg shows thing 16 in COCO's picture 581857: group 1 is the picture, whatever the thing.
PICTURE = re.compile(r"(COCO_\w+?_\d{12})_\d+")

# Words after which an expression speaks of another thing, or of a part of its own.
RELATIONS = frozenset(
    "in on at with without to by of from for near next beside behind under below over above between among against inside "
    "across beyond along around through off facing wearing holding carrying riding eating sitting standing who whose that "
    "which is has".split()
)


class Texts(TypedDict):
    answer: list[Text | None]
    bbox: list[float]
    file_name: Text


class Thing(NamedTuple):
    """A row, read through its shape."""

    # The row's number in its split, from 0.
    number: int
    row: parquet.Row
    texts: Texts

    @property
    def expressions(self) -> list[str]:
        """[""] if it has none: `data.load` counts examples without text, and leaves them out."""
        return [(text or "").strip() for text in self.texts["answer"]] or [""]


def load(root: Path, split: str = "val", captions: str = "first") -> list[Example]:
    """One example a thing (`captions="first"`) or an expression (`"all"`); its id is "<split>-<row>#<expression>"."""
    check_captions(captions)
    files = parquet.find(root)
    chosen = files if root.is_file() else [file for file in files if split in _splits(file)]
    if not chosen:
        there = f"; it has {', '.join(sorted({_splits(file)[0] for file in files}))}" if files else ""
        raise FileNotFoundError(
            f"no RefCOCO in {root}: looked for {split}-*.parquet{there}; pass --split and --data_root, a folder or a copy's hub "
            "id (--data_root lmms-lab/RefCOCO), or try --data toy"
        )
    rows = parquet.read(chosen, "image", tuple(Texts.__annotations__))
    things = keep(((row.where, (number, row)) for number, row in enumerate(rows)), _thing)
    return [
        Example(
            f"{split}-{thing.number:05d}#{number}",
            thing.row.image,
            "",
            text,
            picture=PICTURE.sub(r"\1", thing.texts["file_name"]),
            regions=partial(regions, {"answer": text}, _places(thing, text)),
            where=thing.row.where,
        )
        for thing in things
        for number, text in enumerate(thing.expressions[: 1 if captions == "first" else None])
    ]


def _splits(file: Path) -> tuple[str, str]:
    """The two names that may be its split's: the beginning of its own, and its folder's."""
    return file.name.partition("-")[0], file.parent.name


def _thing(numbered: tuple[int, parquet.Row], where: str) -> Thing:
    number, row = numbered
    texts: Any = shaped(row.texts, Texts, where)
    if len(texts["bbox"]) != 4:
        raise ValueError(f"{where}, bbox: expected [x, y, width, height]; got {texts['bbox']}")
    return Thing(number, row, texts)


def _places(thing: Thing, text: str) -> list[Place]:
    return [Place("answer", 0, head_end(text), "", partial(_box_mask, thing))]


def _box_mask(thing: Thing, side: int) -> Bool[np.ndarray, "side side"]:
    """The cells in the thing's box. The copy does not say how large the picture is, so this opens it."""
    x, y, width, height = thing.texts["bbox"]
    return polygon_mask([box(x, y, x + width, y + height)], thing.row.image().size, side)


def head_end(text: str) -> int:
    """The offset at which an expression has named its thing: that of the first of RELATIONS after a word that names something.

    It is the end of the expression if no relation follows such a word.

    >>> "man in a red shirt"[: head_end("man in a red shirt")], "on the left"[: head_end("on the left")]
    ('man ', 'on the left')
    """
    named = False
    for word in find_words({"text": text}):
        lower = word.text.lower()
        if named and lower in RELATIONS:
            return word.start
        named |= lower not in RELATIONS | LITTLE
    return len(text)
