"""Figures of the paper, drawn again from what the ledger holds. A figure whose runs are missing is left out.

The first line of a figure's docstring is also its caption on the page.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lavender_min import data, draw
from lavender_min.evaluation import calibration
from lavender_min.evaluation import figures as shared
from lavender_min.evaluation.intervals import Interval, interval
from lavender_min.evaluation.sheet import Sheet, make_sheet
from lavender_min.failing import read_json
from lavender_min.ledger import measures, stores
from lavender_min.ledger.plan import is_there
from lavender_min.ledger.runs import Ledger
from lavender_min.maps import MapStore
from lavender_min.toy import data as toy

ANSWERS = "crowd_test/answers.all"
# The checkpoints of a training.
QUARTERS = (1, 2, 3, 4)
# {number of scenes: how the names of the arms that were tuned on so many end}
SIZES = {64: "_64", 256: "_256", 1024: "", 4096: "_4096"}
# {--aggregate: the arm that was tuned with it}
AGGREGATIONS = {
    "learn": "learn_256",
    "layer-mean": "layer_mean",
    "max-max": "max_max",
    "flow-sum": "flow_sum",
    "flow-mul": "flow_mul",
}
COLORS = {
    "untuned": "#c04f6e",
    "plain": "#e3a04f",
    "learn": "#7a5cc0",
    "direct": "#3f8fc0",
    "oracle": "#4a9a5b",
    "masks": "#4a9a5b",
    "teacher": "#555555",
}


class Data(NamedTuple):
    """What the figures of one host are drawn from.

    An arm without a run is a KeyError, by which `draw_all` knows that it is too early for a figure. Seeds may still be missing.
    """

    ledger: Ledger
    host: str

    def numbers(self, *arms: str) -> dict[str, list[dict[str, float]]]:
        """{arm: its numbers, by seed}"""
        found = self.ledger.numbers(self.host, arms)
        return {arm: found[arm] for arm in arms}

    def files(self, *arms: str) -> dict[str, list[Path]]:
        """{arm: the files of its results, by seed}"""
        found = self.ledger.files(self.host, arms)
        return {arm: found[arm] for arm in arms}

    def sheet(self) -> Sheet:
        """The words whose maps were read when runs ended. Its first scenes are those that checkpoints were measured on."""
        split = next(iter(self.ledger.setup.measured))
        store = stores.folder(self.ledger.out, split, "sd")
        return measures.sheet_of(store, split, self.ledger.setup.measured[split])


def entropies(of: Data) -> Figure:
    """Figure 7: over what share of the picture words' maps are spread, by their entropy; all seeds together.

    `measures.extent` says how a share follows from an entropy.
    """
    # {arm: the kind of its maps}
    kinds = {"masks": "masks", "teacher": "sd", "untuned": "own", "plain": "own", "learn": "own"}
    figure, axes = one_axes()
    edges = np.linspace(0, 100, measures.BINS + 1)
    for arm, files in of.files(*kinds).items():
        counts = np.sum([read_json(file, dict)["extents"][kinds[arm]] for file in files], 0)
        axes.stairs(counts / counts.sum(), edges, label=about(of, arm), lw=1.6, color=COLORS[arm])
    axes.set(xlabel="exp(entropy) of a word's map, % of the picture's cells", ylabel="share of words")
    axes.legend(fontsize=7)
    return figure


def word_over_training(of: Data) -> Figure:
    """Figure 8: one word's map at each quarter of the training, own (above) and behind the Aligner (below); and its target."""
    (file, *_) = of.files("learn")["learn"]
    shown, sheet = load_file(file.with_suffix(".safetensors")), of.sheet()
    # The first word that is chosen is the same on the fewer scenes of the checkpoints.
    word = shared.choose(sheet)[0]
    columns = {f"{quarter}/4": f"curve{quarter}/" for quarter in QUARTERS}
    figure = Figure(figsize=(1.6 * (1 + len(columns)), 3.5), layout="constrained")
    picture = picture_of(sheet, word)
    for row, kind in zip(figure.subplots(2, 1 + len(columns)), ("own", "aligned"), strict=True):
        for axis, (title, prefix) in zip(row, columns.items(), strict=False):
            draw.overlay(axis, picture, shown[prefix + kind][0])
            axis.set_title(title, fontsize=8)
        draw.overlay(row[-1], picture, sheet.maps[word])
        row[-1].set_title("Stable Diffusion", fontsize=8)
        row[0].set_ylabel(f"{sheet.texts[word]}, {kind}", fontsize=8)
    return figure


def error_and_answers(of: Data) -> Figure:
    """Figure 9: the error of maps against the share of right answers; a point is one checkpoint of one seed."""
    figure, axes = one_axes()
    for arm, runs in of.numbers("plain", "learn", "direct").items():
        points = [(run[f"curve{q}/mse.own"], 100 * run[f"curve{q}/answers.all"]) for run in runs for q in QUARTERS]
        errors, answers = zip(*points, strict=True)
        axes.scatter(errors, answers, s=14, label=about(of, arm), color=COLORS[arm])
    axes.set(xlabel="alignment error (MSE) of own maps", ylabel="answers right, %")
    axes.legend(fontsize=7)
    return figure


def improvements(of: Data) -> Figure:
    """Figure 15: by how much more answers are right than after plain tuning, relative to plain tuning, on each split."""
    splits = list(of.ledger.setup.measured)
    found = of.numbers("plain", "learn", "direct", "oracle")
    figure, axes = one_axes(width=7)
    for k, arm in enumerate(("learn", "direct", "oracle")):
        gains = [interval(relative(found["plain"], found[arm], f"{split}/answers.all")) for split in splits]
        at = np.arange(len(splits)) + (k - 1) * 0.27
        halves = [gain.half or 0 for gain in gains]
        axes.bar(at, [gain.mean for gain in gains], 0.25, yerr=halves, label=about(of, arm), color=COLORS[arm])
    axes.set_xticks(range(len(splits)), splits, fontsize=7)
    axes.axhline(0, color="black", lw=0.7)
    axes.set_ylabel("answers over plain tuning, %")
    axes.legend(fontsize=7)
    return figure


def relative(plain: Sequence[dict[str, float]], other: Sequence[dict[str, float]], name: str) -> list[float]:
    """other − plain for each seed, in percent of the mean of plain over seeds."""
    base = max(statistics.fmean(run[name] for run in plain), 1e-9)
    return [100 * (b[name] - a[name]) / base for a, b in zip(plain, other, strict=True)]


def scaling(of: Data) -> Figure:
    """Figure 14: answers by the number of scenes, steps being equal."""
    figure, axes = one_axes()
    for arm in ("plain", "learn", "oracle"):
        found = of.numbers(*(arm + end for end in SIZES.values()))
        curve = [interval([100 * run[ANSWERS] for run in runs]) for runs in found.values()]
        error_line(axes, list(SIZES), curve, about(of, arm), COLORS[arm])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="scenes", ylabel="answers right, %")
    axes.legend(fontsize=7)
    return figure


def aggregations(of: Data) -> Figure:
    """Figure 20: answers by the length of training, for each aggregation."""
    figure, axes = one_axes()
    found = of.numbers(*AGGREGATIONS.values())
    for name, arm in AGGREGATIONS.items():
        curve = [interval([100 * run[f"curve{q}/answers.all"] for run in found[arm]]) for q in QUARTERS]
        error_line(axes, [25 * q for q in QUARTERS], curve, name, None)
    axes.set(xlabel="steps done, %", ylabel="answers right, %")
    axes.legend(fontsize=7)
    return figure


def aligned_maps(of: Data) -> Figure:
    """Figure 17: some words, and where models of the first seed look for them; before these, the picture and the target."""
    columns = [("plain", "own"), ("learn", "own"), ("learn", "aligned"), ("direct", "own"), ("oracle", "own")]
    files = of.files(*dict.fromkeys(arm for arm, _ in columns))
    shown = {arm: load_file(found[0].with_suffix(".safetensors")) for arm, found in files.items()}
    sheet = of.sheet()
    words = shared.choose(sheet)
    figure = Figure(figsize=(1.7 * (2 + len(columns)), 1.9 * len(words)), layout="constrained")
    for i, row in enumerate(figure.subplots(len(words), 2 + len(columns), squeeze=False)):
        picture = picture_of(sheet, words[i])
        row[0].imshow(picture)
        row[0].set(xticks=[], yticks=[])
        row[0].set_ylabel(sheet.texts[words[i]], fontsize=9)
        maps: list[tuple[str, Tensor]] = [("Stable Diffusion", sheet.maps[words[i]])]
        maps += [(f"{arm}, {kind}", shown[arm][kind][i]) for arm, kind in columns]
        for axis, (title, one) in zip(row[1:], maps, strict=True):
            draw.overlay(axis, picture, one)
            axis.set_title(title if i == 0 else "", fontsize=8)
    return figure


def trust(of: Data) -> Figure:
    """How often Stable Diffusion's maps of the first tuning scenes are right, by fifths of their contrast."""
    split = str(of.ledger.setup.common["split"])
    store = MapStore(stores.folder(of.ledger.out, split, "sd"))
    examples = [example for example in data.load("toy", split=split) if example.id in store]
    sheet = make_sheet(examples[: toy.TUNING_SCENES], store)
    found = calibration.calibrate(sheet.maps, sheet.masks)
    figure, axes = one_axes()
    fifths = range(1, len(found.by_fifth) + 1)
    axes.plot(fifths, [100 * share for share in found.by_fifth], marker="o", label=f"AUC {found.auc:.2f}")
    axes.set(xlabel="fifth of the words, by contrast", ylabel="maps that point right, %", ylim=(0, 100))
    axes.legend()
    return figure


FIGURES: dict[str, Callable[[Data], Figure]] = {
    "entropies": entropies,
    "word_over_training": word_over_training,
    "error_and_answers": error_and_answers,
    "improvements": improvements,
    "scaling": scaling,
    "aggregations": aggregations,
    "aligned_maps": aligned_maps,
}


def draw_all(ledger: Ledger, folder: Path) -> dict[Path, str]:
    """Draws every figure whose runs are there, for every host that is shipped. Returns {file: caption}."""
    drawn = {}
    hosts = list(filter(is_there, ledger.setup.hosts))
    wanted = [
        (f"{name}_{host}", figure_of, host, f" (`{host}`)") for name, figure_of in FIGURES.items() for host in hosts
    ]
    # The teacher is the same for all hosts.
    for name, figure_of, host, of_host in [*wanted, ("trust", trust, hosts[0], "")]:
        try:
            figure = figure_of(Data(ledger, host))
        except (KeyError, FileNotFoundError):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=80)
        drawn[file] = f"{(figure_of.__doc__ or '').splitlines()[0].removesuffix('.')}{of_host}."
    return drawn


def one_axes(width: float = 5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def error_line(axes: Axes, x: Sequence[float], curve: Sequence[Interval], label: str, color: str | None) -> None:
    """A line through the means, with half an interval as the whiskers."""
    halves = [point.half or 0 for point in curve]
    axes.errorbar(x, [point.mean for point in curve], halves, marker="o", capsize=3, label=label, color=color)


def about(of: Data, arm: str) -> str:
    """An arm's name in legends."""
    return of.ledger.setup.arms[arm].about


def picture_of(sheet: Sheet, word: int) -> Image.Image:
    return sheet.examples[sheet.place[word][0]].image()
