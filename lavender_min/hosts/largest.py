"""The largest picture that a decoder's processor makes, for the planner of memory: no processor, no picture, only a config.

Numbers are those of the published processors' settings, which no config holds.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavender_min.hosts.layouts import Looks, anyres, anyres_max, grid, squeezed, tiles_then_thumbnail

# Idefics 3 and SmolVLM scale the longer side to four tiles; InternVL makes at most twelve.
IDEFICS_TILES, INTERNVL_TILES = (4, 4), (3, 4)
# Image tokens of a Qwen: a megapixel. Its processors allow 16,384, which photographs of the usual data sets never reach.
QWEN_TOKENS = (32, 40)


class Largest(NamedTuple):
    inputs: dict[str, Tensor]  # of the tower, for one picture
    looks: Looks
    about: str


def square(config: Any) -> Largest:
    size = config.vision_config.image_size
    side = math.isqrt(getattr(config, "mm_tokens_per_image", 0)) or size // config.vision_config.patch_size
    return Largest(
        {"pixel_values": torch.ones(1, 3, size, size)},
        Looks([squeezed(grid(side, side))], side * side),
        f"a square of {size} px",
    )


def canvas(config: Any, looks: Callable[..., Looks] = anyres) -> Largest:
    size = config.vision_config.image_size
    height, width = max(config.image_grid_pinpoints, key=math.prod)
    rows, columns = height // size, width // size
    inputs = {"pixel_values": torch.ones(1, rows * columns + 1, 3, size, size)}
    inputs["image_sizes"] = torch.tensor([[height, width]])
    return Largest(inputs, looks((width, height), None, config), tiled(rows, columns, size))


def canvas_max(config: Any) -> Largest:
    return canvas(config, anyres_max)


def megapixel(config: Any) -> Largest:
    vision = config.vision_config
    merged, cell = vision.spatial_merge_size, vision.spatial_merge_size * vision.patch_size
    rows, columns = QWEN_TOKENS
    inputs = {
        "pixel_values": torch.ones(rows * columns * merged**2, 3 * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, rows * merged, columns * merged]]),
    }
    looks = Looks([squeezed(grid(rows, columns))], rows * columns)
    return Largest(inputs, looks, f"{columns * cell} × {rows * cell} px")


def idefics3(config: Any) -> Largest:
    size = config.vision_config.image_size
    rows, columns = IDEFICS_TILES
    side = size // config.vision_config.patch_size // config.scale_factor
    inputs = {
        "pixel_values": torch.ones(1, rows * columns + 1, 3, size, size),
        "pixel_attention_mask": torch.ones(1, rows * columns + 1, size, size, dtype=torch.bool),
    }
    return Largest(inputs, tiles_then_thumbnail(rows, columns, side), tiled(rows, columns, size))


def internvl(config: Any) -> Largest:
    size = config.vision_config.image_size[0]
    rows, columns = INTERNVL_TILES
    looks = tiles_then_thumbnail(rows, columns, math.isqrt(config.image_seq_length))
    return Largest({"pixel_values": torch.ones(rows * columns + 1, 3, size, size)}, looks, tiled(rows, columns, size))


def tiled(rows: int, columns: int, size: int) -> str:
    return f"{rows} × {columns} tiles of {size} px and a thumbnail"
