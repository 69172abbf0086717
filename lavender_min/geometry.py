"""Where patches lie, and how a patch map becomes a 32×32 map.

A model sees a picture as numbered patches: with class tokens between them, in several tiles, with padding. A map that
two models can be compared on is a small square in picture order. Two pieces of plain data lead from one to the other:
an index (which key is the patch at canvas row y, column x?) and one resampling matrix for rows and one for columns,

    map[gy, gx] = Σ_y Σ_x resize_y[gy, y] · attention[index[y, x]] · resize_x[gx, x]

Every host and every op shares this file, so a map means the same ground wherever it comes from. A picture that fills
only part of its canvas (padding right and below) is handled by the matrices: they resample only that part.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

MAP_SIDE = 32  # g: the side of every stored map; the paper's choice


class PatchLayout(NamedTuple):
    """How the keys of a batch lie on the canvas: data, not code, so one op serves every host."""

    index: Int32[Tensor, "b hc wc"]  # type: ignore[assignment]  # key of the patch at canvas (y, x); −1: none
    resize_y: Float[Tensor, "b gy hc"]  # resampling of canvas rows to output rows
    resize_x: Float[Tensor, "b gx wc"]  # resampling of canvas columns to output columns

    def to(self, device: torch.device | str) -> "PatchLayout":
        return PatchLayout(*(part.to(device, non_blocking=True) for part in self))


def resize_matrix(
    n_patches: int, g: int = MAP_SIDE, start: float = 0.0, stop: float | None = None
) -> Float[Tensor, "g n_patches"]:
    """The matrix that resamples the stretch [start, stop] of a line of `n_patches` cells to `g` cells.

    Lengths are in cells of the line: cell j covers [j, j+1]. Output cell i is centred in its share of the stretch and
    weighs the cells around by a triangle, one cell wide each way when enlarging and one *output* cell when shrinking:
    the antialiased linear filter, equal on the whole line to `F.interpolate(mode="bilinear", antialias=True)`. Cells
    wholly outside the stretch (padding) weigh nothing; every row sums to 1, so a flat map stays flat.

    The stretch may reach beyond the line, as a picture does that was cropped: what lies there was not seen, and counts as 0. So
    a row of an output cell that lies partly on the line sums to that part.
    """
    stop = float(n_patches) if stop is None else stop
    if not (g > 0 and start < stop and start < n_patches and stop > 0):
        raise ValueError(
            f"resize_matrix wants a stretch start < stop that meets the line [0, n_patches], and g > 0; "
            f"got start={start}, stop={stop}, n_patches={n_patches}, g={g}"
        )
    cell = torch.arange(n_patches, dtype=torch.float64)
    ratio = (stop - start) / g  # line cells per output cell
    centre = start + ratio * (torch.arange(g, dtype=torch.float64) + 0.5)
    distance = (centre[:, None] - (cell + 0.5)).abs()  # [g, n_patches]
    weight = (1 - distance / max(ratio, 1.0)).clamp(min=0)
    weight = weight * ((cell + 1 > start) & (cell < stop))
    low, high = ((centre + side * ratio / 2).clamp(0, n_patches) for side in (-1, 1))
    seen = (high - low) / ratio  # [g], the part of each output cell that lies on the line
    return (weight / weight.sum(1, keepdim=True).clamp(min=1e-12) * seen[:, None]).float()


def resize_map(map: Float[Tensor, "*lead y x"], g: int = MAP_SIDE) -> Float[Tensor, "*lead g g"]:
    """Resample whole maps, of any number of leading axes, to g×g."""
    resize_y = resize_matrix(map.shape[-2], g).to(map)
    resize_x = resize_matrix(map.shape[-1], g).to(map)
    return resize_y @ map @ resize_x.mT


def contrast(maps: Float[Tensor, "*lead y x"]) -> Float[Tensor, "*lead"]:
    """(largest − smallest) / mean of each map: 0 for a flat one. Of a raw map it tells how sure the teacher is of its place."""
    return (maps.amax((-2, -1)) - maps.amin((-2, -1))) / maps.mean((-2, -1)).clamp(min=torch.finfo(maps.dtype).tiny)


def minmax(maps: Float[Tensor, "*lead y x"], eps: float = 1e-6) -> Float[Tensor, "*lead y x"]:
    """Stretch each map to [0, 1]. A flat map becomes all zeros, not a division by zero."""
    low = maps.amin((-2, -1), keepdim=True)
    high = maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + eps)
