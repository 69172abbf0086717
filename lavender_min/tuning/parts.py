"""The examples of a run: those that train, and a validation part that does not."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from lavender_min import data
from lavender_min.data import Example
from lavender_min.tuning.flags import Flags


class Parts(NamedTuple):
    train: list[Example]
    # For --eval_strategy; empty without --eval_share and --eval_split.
    held_out: list[Example]


def load(flags: Flags) -> Parts:
    """Reads the data. Raises OSError or ValueError, in one line, if it is not there, or if both parts show one picture."""
    examples = data.load(flags.data, flags.data_root, flags.split, flags.captions)[: flags.limit]
    if flags.eval_share is not None:
        return share_out(examples, flags.eval_share)
    if flags.eval_split is None:
        return Parts(examples, [])
    if "split" not in data.SOURCES[flags.data].options:
        raise ValueError(f"--data {flags.data} has no splits, so no --eval_split; take --eval_share 0.05")
    held_out = data.load(flags.data, flags.data_root, flags.eval_split, flags.captions)
    shared = {shown(example) for example in held_out} & {shown(example) for example in examples}
    if shared:
        raise ValueError(
            f"--eval_split {flags.eval_split} shares {len(shared)} pictures with those that train: take another"
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
