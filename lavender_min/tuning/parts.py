"""The examples of a run: of each data set those that train, and a validation part that does not."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from lavender_min import data
from lavender_min.data import Example
from lavender_min.tuning.flags import Flags
from lavender_min.tuning.sets import DataSet


class Parts(NamedTuple):
    train: list[Example]
    # For --eval_strategy; empty without --eval_share and --eval_split.
    held_out: list[Example]


def load(flags: Flags) -> list[Parts]:
    """Reads the data. Raises OSError or ValueError, in one line, if it is not there, or if both parts of a set show one picture."""
    return [load_set(one, flags.limit, flags.eval_share) for one in flags.sets]


def load_set(one: DataSet, limit: int | None, eval_share: float | None) -> Parts:
    examples = data.load(one.name, one.root, one.split, one.captions)[:limit]
    if eval_share is not None:
        return share_out(examples, eval_share)
    if one.eval_split is None:
        return Parts(examples, [])
    if "split" not in data.SOURCES[one.name].options:
        raise ValueError(f"--data {one.name} has no splits, so no --eval_split; take --eval_share 0.05")
    held_out = data.load(one.name, one.root, one.eval_split, one.captions)
    shared = {shown(example) for example in held_out} & {shown(example) for example in examples}
    if shared:
        raise ValueError(
            f"--eval_split {one.eval_split} shares {len(shared)} pictures with those that train: take another"
        )
    return Parts(examples, held_out)


def share_out(examples: Sequence[Example], share: float) -> Parts:
    """Holds out this share of the pictures, with all their examples: texts of one picture are too alike to be parted.

    Which pictures follows from their names alone, so it is the same for every seed.
    """
    pictures = {shown(example) for example in examples}
    order = sorted(pictures, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(order[: math.ceil(share * len(order))])
    if len(chosen) == len(pictures):
        raise ValueError(f"--eval_share {share} of {len(pictures)} pictures leaves none to train on")
    return Parts(
        [example for example in examples if shown(example) not in chosen],
        [example for example in examples if shown(example) in chosen],
    )


def shown(example: Example) -> str:
    """The picture's name, which several examples may share."""
    return example.picture or example.id
