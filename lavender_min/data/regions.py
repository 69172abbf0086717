"""What readers share whose data says where things lie: boxes, polygons or mask pictures become the regions of words.

A mask here has side × side cells, which cover the whole picture. One rule makes it, whatever the data holds: a cell belongs to the
thing if the cell's centre lies inside. A thing thinner than a cell may hold no centre; its words then have no region.

Coordinates are in pixels from the picture's upper left corner, so that pixel 0 covers 0 to 1. A polygon is a flat list of them,
x, y, x, y, …, as in COCO.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from lavender_min.data import Region
from lavender_min.words import find_words

# Words that name no thing. In "a group of people" the thing is named by "group" and "people".
LITTLE = frozenset(
    "a an the this that these those some any another each my your his her its our their "
    "of and or in on at to by for with from as".split()
)


class Place(NamedTuple):
    """A phrase, which is fields[field][start:end] of an example, and where the thing lies that it names."""

    field: str
    start: int
    end: int
    # As `Region.kind`.
    kind: str
    # mask(side): the cells that the thing covers.
    mask: Callable[[int], Bool[np.ndarray, "side side"]]


def regions(fields: Mapping[str, str], places: Iterable[Place], side: int) -> list[Region]:
    """A region for each word that names a thing. `partial(regions, fields, places)` is the `regions` of an `Example`.

    A word may stand in several phrases, and a phrase may name several things. The word's mask is then all of them together, and its
    kind that of the first.
    """
    found: dict[tuple[str, int, int], Region] = {}
    for place in places:
        mask = place.mask(side)
        for start, end in naming_words(fields[place.field], place.start, place.end) if mask.any() else []:
            before = found.get((place.field, start, end))
            region = Region(place.field, start, end, place.kind, mask)
            found[place.field, start, end] = before._replace(mask=before.mask | mask) if before else region
    return list(found.values())


def naming_words(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """(start, end) of the words in text[start:end] that name its thing: all but the LITTLE ones, or all where it has no others.

    >>> naming_words("A man with his dog.", 11, 18)
    [(15, 18)]
    """
    words = [word for word in find_words({"text": text}) if start <= word.start and word.end <= end]
    naming = [word for word in words if word.text.lower() not in LITTLE]
    return [(word.start, word.end) for word in naming or words]


def find_label(text: str, label: str) -> list[tuple[int, int]]:
    """(start, end) wherever a label stands in a text: as whole words, in upper or lower case, or with a plural's s or es.

    >>> find_label("A bus stop without buses", "bus")
    [(2, 5), (19, 24)]
    """
    words = r"\s+".join(map(re.escape, label.split()))
    return [match.span() for match in re.finditer(rf"(?<!\w){words}(?:e?s)?(?!\w)", text, re.IGNORECASE)]


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    """A box as a polygon."""
    return [left, top, right, top, right, bottom, left, bottom]


def polygon_mask(
    polygons: Sequence[Sequence[float]], size: tuple[int, int], side: int
) -> Bool[np.ndarray, "side side"]:
    """The cells that at least one of the polygons covers. `size` is the picture's width and height in pixels.

    A point lies inside a polygon if a line from it to the right crosses the border an odd number of times (even–odd rule).
    """
    # The pixel coordinates of the centres of columns and of rows.
    x, y = ((np.arange(side) + 0.5) * length / side for length in size)
    covered = np.zeros((side, side), dtype=bool)
    for polygon in polygons:
        corners = np.reshape(np.asarray(polygon, dtype=float), (-1, 2))
        inside = np.zeros((side, side), dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            # The rows of the grid whose line of centres crosses this edge. A level edge is crossed by none.
            met = (y0 <= y) != (y1 <= y)
            crossing = x0 + (y[met] - y0) / (y1 - y0) * (x1 - x0) if met.any() else np.zeros(0)
            inside[met] ^= x < crossing[:, None]
        covered |= inside
    return covered


def pixel_mask(pixels: Bool[np.ndarray, "height width"], side: int) -> Bool[np.ndarray, "side side"]:
    """A mask of any size, with one value a pixel. A cell takes the value of the pixel in which its centre lies."""
    # Whole numbers round nothing, so a centre on the border of two pixels always falls into the second.
    rows, columns = ((2 * np.arange(side) + 1) * length // (2 * side) for length in pixels.shape)
    return pixels[np.ix_(rows, columns)]
