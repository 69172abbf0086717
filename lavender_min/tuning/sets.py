"""The data sets of a run as train.py's flags name them: one, or several that are mixed.

    --data flickr30k:0.7 ocrvqa30k:0.3
    --data folder:0.7 folder:0.3 --data_root mine yours --maps maps/mine maps/yours

What else is said of data sets is said of each, in their order; "" leaves one its default. Nothing heavy is imported here.
"""

import math
import shlex
from typing import NamedTuple

from lavender_min.data import SOURCES


class DataSet(NamedTuple):
    name: str
    # Beside the others' weights, its share of the examples of an epoch; None if every example of every set is taken once.
    weight: float | None
    # The store of its maps.
    maps: str
    root: str | None
    split: str | None
    captions: str | None
    # What is held out of it; None where nothing is.
    eval_split: str | None

    @property
    def extract_command(self) -> str:
        """What makes its maps."""
        given = {"data_root": self.root, "split": self.split, "captions": self.captions, "maps": self.maps}
        words = [f"--{flag} {shlex.quote(value)}" for flag, value in given.items() if value]
        return " ".join([f"python extract.py --data {self.name}", *words])


def read_sets(data: list[str], **of_each: list[str] | None) -> list[DataSet]:
    """The values of --data as sets. `of_each` are the other flags that have one value for each, by name; None if not given.

    Raises ValueError, in one line that names the flag, for what cannot be.
    """
    names = [word.partition(":")[0] for word in data]
    for name in names:
        if name not in SOURCES:
            raise ValueError(f"--data must be one of {', '.join(SOURCES)}; got {name!r}")
    for flag, values in of_each.items():
        if values and len(values) != len(data):
            raise ValueError(
                f"--{flag} wants one value for each of {len(data)} data sets, in the order of --data ('' is a set's "
                f"default); got {len(values)}: {' '.join(values)}"
            )
    given = {flag: [value or None for value in values or [""] * len(data)] for flag, values in of_each.items()}
    stores = [maps or f"maps/{name}" for maps, name in zip(given["maps"], names, strict=True)]
    double = {maps for maps in stores if stores.count(maps) > 1}
    if double:
        raise ValueError(f"--maps: {len(stores)} data sets cannot share a store, {min(double)}; give each its own")
    rows = zip(
        names,
        weights(data),
        stores,
        *(given[flag] for flag in ("data_root", "split", "captions", "eval_split")),
        strict=True,
    )
    return [DataSet(*row) for row in rows]


def weights(data: list[str]) -> list[float | None]:
    """What stands behind the colons of --data: of each set, or of none."""
    weighted = [word for word in data if ":" in word]
    if len(data) == 1 and weighted:
        raise ValueError(f"--data {data[0]}: a weight is a share among several data sets, and this is the only one")
    if weighted and len(weighted) < len(data):
        raise ValueError(f"--data {' '.join(data)}: give each of them a weight, such as {data[0]}:0.5, or none")
    found: list[float | None] = [None for _ in data if not weighted]
    for word in weighted:
        try:
            weight = float(word.partition(":")[2])
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(f"--data {word}: a weight is a number above 0, such as 0.7")
        found.append(weight)
    return found
