"""Word maps over their picture, drawn the same wherever they are shown."""

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from lavender_min.geometry import minmax


def framed(picture: Image.Image, frame: str) -> Image.Image:
    """What the maps of a store cover: the whole picture, or, where its frame is "crop", the square in the middle."""
    side = min(picture.size)
    return ImageOps.fit(picture, (side, side)) if frame == "crop" else picture


def overlay(axis: Axes, picture: Image.Image, word_map: Float[Tensor, "g g"]) -> Float[np.ndarray, "g g"]:
    """One map, stretched to 0 … 1, over the darkened picture; a ring marks its largest cell. Returns the stretched map."""
    # The axes go from 0 to 1 and downwards: left, right, bottom, top.
    box = (0, 1, 1, 0)
    grey = np.asarray(picture.convert("L"), float)[..., None].repeat(3, 2) / 255 * 0.75
    one = minmax(word_map.float()).cpu().numpy()
    axis.imshow(grey, extent=box)
    axis.imshow(one, extent=box, cmap="inferno", alpha=0.35 + 0.5 * one, interpolation="bilinear", vmin=0, vmax=1)
    y, x = np.unravel_index(one.argmax(), one.shape)
    axis.plot((x + 0.5) / one.shape[1], (y + 0.5) / one.shape[0], "o", ms=6, mfc="none", mec="#39ff88", mew=1.3)
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    axis.spines[:].set_visible(False)
    return one


def word_maps(picture: Image.Image, words: list[str], maps: dict[str, Float[Tensor, "w g g"]]) -> Figure:
    """One picture's words: a row for each kind of map, a column for each word."""
    figure = Figure(figsize=(1.6 * len(words), 1.75 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), len(words), squeeze=False)
    for row, (kind, of) in zip(axes, maps.items(), strict=True):
        for axis, word_map in zip(row, of, strict=True):
            overlay(axis, picture, word_map)
        row[0].set_ylabel(kind, fontsize=8)
    for axis, word in zip(axes[0], words, strict=True):
        axis.set_title(word, fontsize=8)
    return figure
