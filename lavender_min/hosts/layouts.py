"""Where a host's image tokens lie on the picture; for decoders, one small function a kind of processor.

A processor resizes a picture, may crop or pad it, may cut it into tiles, and puts a run of image tokens into the text. Which token
covers which ground follows from the picture's size alone. Each function says it for every look at the picture (`View`), with the
processor's own arithmetic wherever transformers has a function for it.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from lavender_min.geometry import MAP_SIDE, PatchLayout, resize_matrix
from lavender_min.hosts.base import Box

Size = tuple[int, int]  # width, height, in pixels


class View(NamedTuple):
    """One look at a picture. Lengths are in cells of `order`: cell (y, x) covers [y, y+1] × [x, x+1]."""

    order: Int[Tensor, "hc wc"]  # which of the picture's image tokens lies at (y, x), counted from 0
    # Where the whole picture lies. It reaches beyond the cells if it was cropped, and leaves some out if it was padded.
    top: float
    left: float
    high: float
    wide: float


class Looks(NamedTuple):
    views: list[View]
    tokens: int  # how many image tokens the picture has; some, such as newlines, may lie in no view


def layout(view: View, slots: Int[Tensor, " tokens"], box: Box) -> PatchLayout:
    """`slots` are the positions of the image tokens among the keys. The map covers `box`, a part of the picture."""
    hc, wc = view.order.shape
    top, bottom = (view.top + share * view.high for share in box[:2])
    left, right = (view.left + share * view.wide for share in box[2:])
    y, x = torch.arange(hc)[:, None], torch.arange(wc)[None]
    inside = (y + 1 > top) & (y < bottom) & (x + 1 > left) & (x < right)
    return PatchLayout(
        slots[view.order].where(inside, -1).int()[None],
        resize_matrix(hc, MAP_SIDE, top, bottom)[None],
        resize_matrix(wc, MAP_SIDE, left, right)[None],
    )


def grid(hc: int, wc: int, first: int = 0, stride: int | None = None) -> Int[Tensor, "hc wc"]:
    """Row after row, from token `first` on; rows are `stride` tokens apart (default: they follow one another)."""
    return first + torch.arange(hc)[:, None] * (wc if stride is None else stride) + torch.arange(wc)[None]


def squeezed(order: Int[Tensor, "hc wc"]) -> View:
    """The whole picture fills the whole grid."""
    hc, wc = order.shape
    return View(order, 0.0, 0.0, float(hc), float(wc))


def blank(size: Size) -> np.ndarray:
    """What transformers' functions take for a picture of this size: [3, height, width], no memory behind it."""
    return np.broadcast_to(np.uint8(0), (3, size[1], size[0]))


# ------------------------------------------------------------------------------------------------------- one grid


def whole(size: Size, processor: Any, config: Any) -> Looks:
    """Gemma 3 and PaliGemma squeeze the picture into one square."""
    tokens = processor.image_seq_length
    side = math.isqrt(tokens)
    return Looks([squeezed(grid(side, side))], tokens)


def cropped(size: Size, processor: Any, config: Any) -> Looks:
    """LLaVA 1.5 scales the shorter side to the tower's and cuts off what is then too much of the longer one."""
    images, vision = processor.image_processor, config.vision_config
    side = vision.image_size // vision.patch_size
    if not images.do_center_crop:
        return Looks([squeezed(grid(side, side))], side * side)
    high, wide = get_resize_output_image_size(
        blank(size), images.size["shortest_edge"], default_to_square=False, input_data_format="channels_first"
    )
    top, left = ((n - images.crop_size[name]) // 2 for n, name in ((high, "height"), (wide, "width")))
    cell = vision.patch_size
    return Looks([View(grid(side, side), -top / cell, -left / cell, high / cell, wide / cell)], side * side)


def native(size: Size, processor: Any, config: Any) -> Looks:
    """The Qwens keep the picture's shape, and merge 2 × 2 patches into one token."""
    images = processor.image_processor
    cell = images.patch_size * images.merge_size
    limits = images.size["shortest_edge"], images.size["longest_edge"]
    hc, wc = (n // cell for n in smart_resize(size[1], size[0], cell, *limits))
    return Looks([squeezed(grid(hc, wc))], hc * wc)


# ------------------------------------------------------------------------------------------- tiles and a thumbnail


def tiles_then_thumbnail(rows: int, columns: int, side: int) -> Looks:
    """Tiles of side × side tokens, row-major, then the whole picture as one more. A picture of one tile has no thumbnail."""
    a_tile, tiles = side * side, rows * columns
    if tiles <= 1:
        return Looks([squeezed(grid(side, side))], a_tile)
    y, x = torch.arange(rows * side)[:, None], torch.arange(columns * side)[None]
    order = (y // side * columns + x // side) * a_tile + y % side * side + x % side
    return Looks([squeezed(grid(side, side, tiles * a_tile)), squeezed(order)], (tiles + 1) * a_tile)


def idefics3(size: Size, processor: Any, config: Any) -> Looks:
    """Idefics 3 and SmolVLM stretch the picture to whole tiles."""
    _, rows, columns = processor.image_processor.get_number_of_image_patches(size[1], size[0], {})
    vision = config.vision_config
    return tiles_then_thumbnail(rows, columns, vision.image_size // vision.patch_size // config.scale_factor)


def internvl(size: Size, processor: Any, config: Any) -> Looks:
    """InternVL stretches the picture to the tiling whose shape is nearest."""
    images, side = processor.image_processor, math.isqrt(processor.image_seq_length)
    tile = images.size["height"], images.size["width"]
    columns, rows = get_optimal_tiled_canvas((size[1], size[0]), tile, images.min_patches, images.max_patches)
    return tiles_then_thumbnail(rows, columns, side)


# -------------------------------------------------------------------------------------------- thumbnail, then tiles


def anyres(size: Size, processor: Any, config: Any, most: float = math.inf) -> Looks:
    """LLaVA-NeXT: a thumbnail, then all tiles as one canvas, which ends every row with a newline token.

    The picture is fitted into the canvas and padded on both sides. The model then cuts off the cells of the padding, in whole
    cells, so a part of one may stay. A canvas of over `most` tiles' cells is shrunk. Where patches do not fill a tile (SigLIP: 27
    of 14 px in 384), a cell is taken as a 27th of the tile.
    """
    tile, side = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
    fitted = select_best_resolution((size[1], size[0]), [list(point) for point in config.image_grid_pinpoints])
    picture = get_patch_output_size(blank(size), fitted, input_data_format="channels_first")
    # The model's own function, on cells that hold their own number, says which it keeps.
    columns = fitted[1] // tile * side
    kept = unpad_image(grid(fitted[0] // tile * side, columns)[None], (size[1], size[0]))[0]
    hc, wc = kept.shape
    if not kept.numel():
        # Of a picture seventy times as long as high no cell of the tiles is left.
        return Looks([squeezed(grid(side, side))], side * side + hc * (wc + 1))
    cut_y, cut_x = divmod(int(kept[0, 0]), columns)
    ratio = math.sqrt(hc * wc / (most * side * side))
    high, wide = (int(hc // ratio), int(wc // ratio)) if ratio > 1.1 else (hc, wc)
    # Cells of the kept canvas to a pixel.
    per_y, per_x = side / tile * high / hc, side / tile * wide / wc
    view = View(
        grid(high, wide, side * side, wide + 1),
        (fitted[0] - picture[0]) // 2 * per_y - cut_y * high / hc,
        (fitted[1] - picture[1]) // 2 * per_x - cut_x * wide / wc,
        picture[0] * per_y,
        picture[1] * per_x,
    )
    return Looks([squeezed(grid(side, side)), view], side * side + high * (wide + 1))


def anyres_max(size: Size, processor: Any, config: Any) -> Looks:
    """LLaVA-OneVision: the same with a limit, "anyres_max_9" for one."""
    return anyres(size, processor, config, int(config.vision_aspect_ratio.removeprefix("anyres_max_")))
