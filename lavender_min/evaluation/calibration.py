"""Does a map's contrast tell whether it is right? What `train.py --trust` builds on, measured where the truth is known.

    python -m lavender_min.evaluation.calibration --data toy --maps maps/toy maps/toy-paper
    python -m lavender_min.evaluation.calibration --data flickr30k --entities DIR

For each store of maps: over the words of answers that have a mask, how often the map's largest cell lies inside it, by fifths of
the words, from the flattest maps to the sharpest; and the AUC, how likely it is that of a right and a wrong map the right one has
the higher contrast (0.5: contrast tells nothing; 1: everything). A table, and a plot beside it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from lavender_min import cli, data
from lavender_min.cli import flag
from lavender_min.evaluation.flags import MeasuredData
from lavender_min.evaluation.metrics import pointing
from lavender_min.evaluation.sheet import make_sheet
from lavender_min.evaluation.tables import table
from lavender_min.geometry import contrast
from lavender_min.maps import MapStore

FIFTHS = 5


class Calibration(NamedTuple):
    words: int
    right: float  # share of all words
    auc: float
    by_fifth: list[float]  # share right, the flattest maps first


def auc(scores: Float[Tensor, " m"], right: Bool[Tensor, " m"]) -> float:
    """Mann and Whitney's: of all pairs of a right and a wrong word, the share in which the right one scores higher.

    A tie counts half. Not a number where no word is right, or none wrong.
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    # The mean rank, counted from 1, of the words that share a value.
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    n, m = int(right.sum()), int((~right).sum())
    if not n or not m:
        return float("nan")
    return float((ranks[right].sum() - n * (n + 1) / 2) / (n * m))


def calibrate(maps: Float[Tensor, "m g g"], masks: Bool[Tensor, "m g g"]) -> Calibration:
    """Raises ValueError for fewer words than fifths."""
    if len(maps) < FIFTHS:
        raise ValueError(f"{len(maps)} words with a mask cannot be cut into fifths")
    # A map whose largest value lies half inside is no more right than wrong.
    right, scores = pointing(maps, masks) > 0.5, contrast(maps.float())
    parts = right[scores.argsort(stable=True)].double().tensor_split(FIFTHS)
    return Calibration(len(maps), float(right.double().mean()), auc(scores, right), [float(p.mean()) for p in parts])


@dataclass
class Flags(MeasuredData):
    maps: list[str] = flag([], "stores that extract.py made, one a recipe (default: maps/<data>)", metavar="DIR")
    split: str | None = flag(None, "which part of the data the maps are of (default: what train.py takes)")
    out: str = flag("runs/calibration.png", "the plot")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("calibration", lambda: report(cli.parse(Flags, "calibration", __doc__, argv)))


def report(flags: Flags) -> None:
    examples = data.load(flags.data, flags.data_root, flags.split, entities=flags.entities)
    found = {}
    for folder in map(Path, flags.maps or [f"maps/{flags.data}"]):
        store = MapStore(folder)
        sheet = make_sheet([example for example in examples if example.id in store], store)
        found[str(folder)] = calibrate(sheet.maps, sheet.masks)
    header = ["maps", "words", "right, %", *(f"fifth {i + 1}, %" for i in range(FIFTHS)), "AUC"]
    rows = [
        [name, str(one.words), *(f"{100 * share:.1f}" for share in (one.right, *one.by_fifth)), f"{one.auc:.2f}"]
        for name, one in found.items()
    ]
    print(table(header, rows))
    draw(Path(flags.out), found)
    print(f"{flags.out} shows it")


def draw(path: Path, found: dict[str, Calibration]) -> None:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, one in found.items():
        axes.plot(range(1, FIFTHS + 1), [100 * s for s in one.by_fifth], marker="o", label=f"{name}, AUC {one.auc:.2f}")
    axes.set(xlabel="fifth of the words, by contrast", ylabel="maps that point right, %", ylim=(0, 100))
    axes.set_xticks(range(1, FIFTHS + 1))
    figure.legend(loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
