"""Does a map's contrast tell whether it is right? `train.py --trust` relies on that, and here it is measured.

    python -m lavender_min.evaluation.calibration --data toy --maps maps/toy maps/toy-paper
    python -m lavender_min.evaluation.calibration --data flickr30k --entities DIR

A map is right if its largest cell lies inside its word's mask; words of answers that have a mask are measured. For each store, its
maps are sorted by contrast and cut into fifths, from the flattest to the sharpest. The table says which share of each fifth is
right. It also gives the AUC: the probability that, of one right and one wrong map, the right one has the higher contrast. At 0.5
contrast tells nothing, at 1 everything. A plot shows the same.
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
    """What is measured of one store."""

    words: int
    # Share of all words whose map is right.
    right: float
    auc: float
    # The same share in each fifth, the flattest maps first.
    by_fifth: list[float]


def auc(scores: Float[Tensor, " m"], right: Bool[Tensor, " m"]) -> float:
    """Mann and Whitney's statistic: of all pairs of a right and a wrong word, the share in which the right one scores higher.

    A tie counts half. The result is NaN if no word is right, or none is wrong.
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    # The mean rank, counted from 1, of the words that share a value.
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    rights, wrongs = int(right.sum()), int((~right).sum())
    if not rights or not wrongs:
        return float("nan")
    # If every right word scored lowest, their ranks would sum to rights · (rights + 1) / 2. Each pair that is won adds 1.
    return float((ranks[right].sum() - rights * (rights + 1) / 2) / (rights * wrongs))


def calibrate(maps: Float[Tensor, "m g g"], masks: Bool[Tensor, "m g g"]) -> Calibration:
    """How right the maps are, by their contrast. Raises ValueError for fewer than five words."""
    if len(maps) < FIFTHS:
        raise ValueError(f"{len(maps)} words with a mask cannot be cut into fifths")
    # Several cells may be equally large. The map is right if more than half of them lie inside.
    right, scores = pointing(maps, masks) > 0.5, contrast(maps.float())
    parts = right[scores.argsort(stable=True)].double().tensor_split(FIFTHS)
    return Calibration(len(maps), float(right.double().mean()), auc(scores, right), [float(of.mean()) for of in parts])


@dataclass
class Flags(MeasuredData):
    maps: list[str] = flag([], "stores that extract.py made, one a recipe (default: maps/<data>)", metavar="DIR")
    split: str | None = flag(None, "which part of the data the maps are of (default: what train.py takes)")
    out: str = flag("runs/calibration.png", "the plot")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("calibration", lambda: report(cli.parse(Flags, "calibration", __doc__, argv)))


def report(flags: Flags) -> None:
    """Measures every store, prints the table, and draws the plot."""
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
    """A line for each store: the share of right maps in each fifth."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, one in found.items():
        percent = [100 * share for share in one.by_fifth]
        axes.plot(range(1, FIFTHS + 1), percent, marker="o", label=f"{name}, AUC {one.auc:.2f}")
    axes.set(xlabel="fifth of the words, by contrast", ylabel="maps that point right, %", ylim=(0, 100))
    axes.set_xticks(range(1, FIFTHS + 1))
    figure.legend(loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
