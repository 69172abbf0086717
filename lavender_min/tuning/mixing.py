"""Several data sets as one, of which an epoch draws by weight.

An epoch takes as many examples as all sets have together. A weight is a set's share of them: of 30 and 70 examples with equal
weights, 50 are drawn from each, so that the first set's are seen once and 20 of them twice, and 20 of the second's not at all.
Which these are follows from the seed and stays so in every epoch. Without weights every example is taken once. (The paper
trains on RLAIF-V, Flickr30k and OCR-VQA together, 7, and does not say in which proportion.)

The draw is made once, as a list, and the Trainer shuffles that list as any data: resuming and several processes need nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lavender_min.data import Example
from lavender_min.maps import StoredMaps
from lavender_min.tuning.collator import MappedExamples


class Mixture(Dataset):
    """`places[i]` says which set stands at place i of an epoch, and which of its examples.

    Raises ValueError if the maps of the sets do not cover the same part of a picture, or if a set's share is no example.
    """

    def __init__(self, sets: Sequence[MappedExamples], weights: Sequence[float] | None, seed: int):
        frames = {one.frame: one.store.path for one in sets if one.store is not None}
        if len(frames) > 1:
            said = ", ".join(f"{frame} in {path}" for frame, path in frames.items())
            raise ValueError(
                f"the maps cover different parts of a picture ({said}): make some again by extract.py with one --frame for all"
            )
        self.sets = list(sets)
        sizes = [len(one) for one in sets]
        self.counts = shares(weights or sizes, sum(sizes))
        if not all(self.counts):
            raise ValueError(
                f"--data: the weights {weights} leave a data set none of {sum(sizes)} examples: raise its weight, or leave it out"
            )
        generator = torch.Generator().manual_seed(seed)
        drawn: list[tuple[int, int]] = []
        for which, (size, count) in enumerate(zip(sizes, self.counts, strict=True)):
            rest = torch.randperm(size, generator=generator)[: count % size].tolist()
            drawn += [(which, i) for i in [*range(size)] * (count // size) + rest]
        self.places = [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[Example, StoredMaps | None]:
        which, example = self.places[i]
        return self.sets[which][example]

    @property
    def frame(self) -> str:
        return self.sets[0].frame

    @property
    def unreadable(self) -> Tensor:
        return torch.cat([one.unreadable for one in self.sets])

    def recipe(self) -> dict[str, Any]:
        """Of every set, by its number."""
        return {
            f"{key} of data set {n}": value for n, one in enumerate(self.sets, 1) for key, value in one.recipe().items()
        }

    def lengths(self) -> list[int]:
        of_sets = [one.lengths() for one in self.sets]
        return [of_sets[which][example] for which, example in self.places]

    def digest(self) -> str:
        """Seed and weights, which decide the places, are compared under their own names."""
        return f"{len(self)} drawn from " + " and ".join(one.digest() for one in self.sets)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` dealt out by weight, in whole numbers: rounded down, and what is left to the largest remainders."""
    exact = [weight * total / sum(weights) for weight in weights]
    dealt = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: dealt[i] - exact[i])
    for i in order[: total - sum(dealt)]:
        dealt[i] += 1
    return dealt
