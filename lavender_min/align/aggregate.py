"""Many layers and heads ─► the channels that the Aligner takes (paper, 4.2).

Heads are pooled layer by layer while the host runs, layers at the end. Which pools go together is a row of `AGGREGATIONS`.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lavender_min.align import AGGREGATIONS, Aggregation

# What a factor of a product is at least: attention that is exactly 0 has no logarithm.
LEAST = 1e-6


def product(maps: Float[Tensor, "*lead g g"], axis: int, keepdim: bool) -> Float[Tensor, "*rest g g"]:
    """Cell by cell, up to a factor: each map is scaled so that its largest cell is 1 (Eq. 41, in log space).

    The product of thirty layers would leave the range of float32. The normalisation before the loss undoes any factor.
    """
    logs = maps.clamp(min=LEAST).log().sum(axis, keepdim=keepdim)
    return (logs - logs.amax((-2, -1), keepdim=True)).exp()


# Of a tensor, along one axis that is kept (heads) or goes (layers).
POOLS = {
    "keep": lambda maps, axis, keepdim: maps,
    "mean": lambda maps, axis, keepdim: maps.mean(axis, keepdim=keepdim),
    "max": lambda maps, axis, keepdim: maps.amax(axis, keepdim=keepdim),
    "sum": lambda maps, axis, keepdim: maps.sum(axis, keepdim=keepdim),
    "product": product,
}


def aggregation(name: str) -> Aggregation:
    if name not in AGGREGATIONS:
        raise ValueError(f"--aggregate is one of {', '.join(AGGREGATIONS)}; got {name!r}")
    return AGGREGATIONS[name]


def channels(how: Aggregation, heads: int) -> int:
    return heads if how.heads == "keep" else 1


def pool_heads(how: Aggregation, maps: Float[Tensor, "n h g g"]) -> Float[Tensor, "n c g g"]:
    return POOLS[how.heads](maps, 1, True)


def pool_layers(how: Aggregation, maps: Mapping[int, Float[Tensor, "n c g g"]]) -> Float[Tensor, "n c g g"]:
    """`maps` by layer index, from the first layer to the last."""
    if not maps:
        raise RuntimeError("no attention was read: was the host hooked, and did the batch hold a picture?")
    return POOLS[how.layers](torch.stack(list(maps.values())), 0, False)
