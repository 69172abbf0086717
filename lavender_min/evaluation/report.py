"""What the measures say: means with intervals, Lavender held against plain tuning, tables and pictures.

A model tuned several times (seeds) is a list of runs, each a {"what.of which words": number} of `measure`. Intervals are
Student's t at 95 %. Runs of plain tuning and of Lavender are compared in pairs, one seed each, since the seed decides
what both share: the order of the examples and the start of the adapters.
"""

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from jaxtyping import Float  # noqa: E402
from torch import Tensor  # noqa: E402

from lavender_min import draw  # noqa: E402
from lavender_min.evaluation.measures import Sheet, interval  # noqa: E402

Numbers = dict[str, float]
CHANCE, SD, UNTUNED, PLAIN, LAVENDER = "an even map (chance)", "Stable Diffusion", "untuned", "plain tuning", "Lavender"
ALIGNED = "Lavender, through the Aligner"
COLORS = {PLAIN: "#e3a04f", LAVENDER: "#7a5cc0"}


class Measure(NamedTuple):
    """How a family of numbers ("pointing" of "pointing.shape") is printed, and which way is better (0: neither)."""

    title: str
    unit: str
    scale: float
    digits: int
    better: int


MEASURES = {
    "answers": Measure("answers right", "%", 100, 1, 1),
    "pointing": Measure("pointing game", "%", 100, 1, 1),
    "mass": Measure("mass inside the mask", "%", 100, 1, 1),
    "entropy": Measure("entropy", "nats", 1, 3, 0),
    "mse": Measure("MSE", "", 1, 4, -1),
}
TITLES = {"mse.own": "MSE, own target", "mse.others": "MSE, others' targets", "mse.ratio": "own / others"}
MAIN = (
    "answers.all",
    "pointing.shape",
    "pointing.all",
    "mass.all",
    "entropy.all",
    "mse.own",
    "mse.others",
    "mse.ratio",
)
KINDS = {"color": "colour"}  # spelled for readers


class Difference(NamedTuple):
    """Lavender − plain tuning for one measure, over pairs of runs."""

    mean: float
    half: float | None
    excludes_zero: bool | None  # None: one pair, so no interval
    winner: str  # "" where the interval holds 0, or where neither direction is better


def differences(plain: list[Numbers], lavender: list[Numbers]) -> dict[str, Difference]:
    """Paired, run by run, for every number both have. Nothing if the numbers of runs differ."""
    if len(plain) != len(lavender) or not plain:
        return {}
    found = {}
    for key in lavender[0]:
        if key in plain[0] and key != "mse.others":
            mean, half = interval([b[key] - a[key] for a, b in zip(plain, lavender, strict=True)])
            excludes = None if half is None else abs(mean) > half
            way = MEASURES[key.split(".")[0]].better * mean
            winner = "" if not excludes or way == 0 else (LAVENDER if way > 0 else PLAIN)
            found[key] = Difference(mean, half, excludes, winner)
    return found


# -------------------------------------------------------------------------------------------------------- tables


def title(key: str) -> str:
    family, kind = key.split(".")
    return TITLES.get(key) or f"{MEASURES[family].title} ({KINDS.get(kind, kind)}), {MEASURES[family].unit}"


def spell(key: str, mean: float, half: float | None, sign: bool = False) -> str:
    """ "71.3 ± 2.1" in the measure's own unit."""
    measure = MEASURES[key.split(".")[0]]
    digits = 2 if key == "mse.ratio" else measure.digits
    value = round(mean * measure.scale, digits) + 0.0  # no "-0.0"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if half is None else f"{text} ± {half * measure.scale:.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well as plain text: the first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths))) + " |"  # noqa: B905

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def models_table(models: dict[str, list[Numbers]], keys: list[str], first: str, titles: list[str]) -> str:
    """One row a model; rows that have none of these numbers are left out."""
    rows = []
    for name, runs in models.items():
        if any(key in runs[0] for key in keys):
            cells = [spell(k, *interval([run[k] for run in runs])) if k in runs[0] else "–" for k in keys]
            rows.append([name, *cells])
    return table([first, *titles], rows)


def main_table(models: dict[str, list[Numbers]]) -> str:
    titles = ["answers, %", "pointing: shapes, %", "pointing: all, %", "mass inside, %", "entropy, nats"]
    return models_table(models, list(MAIN), "", [*titles, *TITLES.values()])


def family_table(models: dict[str, list[Numbers]], family: str) -> str:
    """Every kind of word (or question) of one family of measures."""
    keys = list(dict.fromkeys(key for runs in models.values() for key in runs[0] if key.startswith(family + ".")))
    keys.sort(key=lambda key: key.endswith(".all"))
    return models_table(
        models,
        keys,
        f"{MEASURES[family].title}, {MEASURES[family].unit}",
        [KINDS.get(k := key.split(".")[1], k) for key in keys],
    )


def differences_table(models: dict[str, list[Numbers]], only: tuple[str, ...] = ()) -> str:
    """Lavender − plain tuning, for all measures or `only` some; "" where there are no pairs to compare."""
    rows = []
    for key, d in differences(models.get(PLAIN, []), models.get(LAVENDER, [])).items():
        if key in only or not only:
            both = [spell(key, *interval([run[key] for run in models[name]])) for name in (PLAIN, LAVENDER)]
            excludes = "one pair" if d.excludes_zero is None else "yes" if d.excludes_zero else "no"
            rows.append([title(key), *both, spell(key, d.mean, d.half, sign=True), excludes, d.winner or "–"])
    return table(["", PLAIN, LAVENDER, "difference", "interval excludes 0", "better"], rows) if rows else ""


# --------------------------------------------------------------------------------------------------------- files


class Run(NamedTuple):
    """A folder that `train.py` left, for the report."""

    name: str  # PLAIN or LAVENDER
    folder: str
    flags: dict[str, Any]
    history: list[dict[str, float]]  # of trainer_state.json


def write(
    out: Path,
    sheet: Sheet,
    models: dict[str, list[Numbers]],
    runs: list[Run],
    about: dict[str, Any],
    pictures: list[str],
) -> None:
    """report.md and report.json. `about`: command, versions, recipe and whatever else the reader needs to do it again."""
    found = differences(models.get(PLAIN, []), models.get(LAVENDER, []))
    kinds = {kind or "other": sheet.kinds.count(kind) for kind in sorted(set(sheet.kinds))}
    content = {
        **about,
        "texts": len(sheet.examples),
        "words": kinds,
        "models": {
            name: {
                "mean": {key: interval([run[key] for run in of])[0] for key in of[0]},
                "interval95": {key: interval([run[key] for run in of])[1] for key in of[0]},
                "runs": of,
            }
            for name, of in models.items()
        },
        "lavender_minus_plain": {key: d._asdict() for key, d in found.items()},
        "training": [run._asdict() for run in runs],
    }
    (out / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    (out / "report.md").write_text(as_markdown(content, models, runs, found, pictures))


def as_markdown(
    content: dict[str, Any],
    models: dict[str, list[Numbers]],
    runs: list[Run],
    found: dict[str, Difference],
    pictures: list[str],
) -> str:
    several = max(len(of) for of in models.values())
    spread = (
        f"Mean ± 95 % interval (Student's t) over a model's runs, up to {several}; one run has no interval."
        if several > 1
        else ""
    )
    words = ", ".join(f"{count} {KINDS.get(kind, kind)}" for kind, count in content["words"].items())
    parts = [
        "# Report",
        f"{content['texts']} held-out texts, {sum(content['words'].values())} words of answers with a mask ({words}). {spread}",
        main_table(models),
        "*Answers*: the whole greedy answer is right, but for case and spaces. *Pointing*: the map's largest of 32 × 32 cells "
        "lies on the thing the word names. *Mass*: the share of the map that does. *Entropy*: how spread out the map is, at "
        "most ln 1024 = 6.93. *MSE*: the squared error of the model's map against Stable Diffusion's of the same word, and "
        "against those of words for other things in the same picture (both maps stretched to 0 … 1; own below others: "
        "the map is this word's). Maps of a vision-language model are its own cross-attention, mean over layers and heads; "
        "“through the Aligner” is what the training compares with Stable Diffusion, made by networks that are left "
        "behind after training (stretched to 0 … 1, which lifts its mass and lowers its entropy).",
    ]
    if found:
        pairs = len(models[PLAIN])
        parts += ["## Lavender against plain tuning", differences_table(models)]
        parts += [
            f"Differences are Lavender − plain tuning, {f'taken run by run, {pairs} pairs' if pairs > 1 else 'one pair'}."
        ]
    elif PLAIN in models and LAVENDER in models:
        counts = f"{len(models[PLAIN])} of plain tuning, {len(models[LAVENDER])} of Lavender"
        parts += [f"No differences are given: runs are compared in pairs, and there are {counts}."]
    for family, heading in (("answers", "Answers by kind of question"), ("pointing", "Pointing game by kind of word")):
        parts += [f"## {heading}", family_table(models, family)]
    for family, heading in (("mass", "Mass inside the mask"), ("entropy", "Entropy")):
        parts += [f"## {heading} by kind of word", family_table(models, family)]
    if pictures:
        parts += ["## Pictures", *(f"![{Path(name).stem}]({name})" for name in pictures)]
    if runs:
        parts += ["## Runs", runs_table(models, runs)]
    parts += ["## How this was made", "```\n" + "\n".join(content["commands"]) + "\n```"]
    parts += [f"Vision-language model, untuned and as the base of tuning: `{content['host']}`"]
    parts += ["Stable Diffusion's maps: `" + json.dumps(content["recipe"], ensure_ascii=False) + "`"]
    parts += ["Versions: " + ", ".join(f"{name} {version}" for name, version in content["versions"].items()) + "."]
    return "\n\n".join(parts) + "\n"


def runs_table(models: dict[str, list[Numbers]], runs: list[Run]) -> str:
    keys = [key for key in ("answers.all", "pointing.shape", "mass.all", "mse.ratio") if key in models[runs[0].name][0]]
    rows, count = [], {PLAIN: 0, LAVENDER: 0}
    for run in runs:
        numbers = models[run.name][count[run.name]]
        count[run.name] += 1
        losses = {name: [x[name] for x in run.history if name in x] for name in ("loss_vlm", "loss_att")}
        last = [f"{values[-1]:.4f}" if values else "–" for values in losses.values()]
        steps = max((int(x["step"]) for x in run.history), default=0)
        rows.append([f"{run.name}: {run.folder}", str(steps), *last, *(spell(key, numbers[key], None) for key in keys)])
    return table(["run", "steps", "last loss_vlm", "last loss_att", *map(title, keys)], rows)


# ------------------------------------------------------------------------------------------------------ pictures


def choose(sheet: Sheet, count: int = 5) -> list[int]:
    """Words to show, not picked by how they look: from the first pictures in turn a shape, a colour, a shape, a size, …"""
    wanted = ("shape", "color", "shape", "size", "shape")
    chosen: list[int] = []
    for picture in dict.fromkeys(sheet.pictures):
        kind = wanted[len(chosen) % len(wanted)]
        shown = {sheet.texts[i] for i in chosen}
        here = [i for i, p in enumerate(sheet.pictures) if p == picture and sheet.kinds[i] == kind]
        fresh = [i for i in here if sheet.texts[i] not in shown] or here
        chosen += fresh[:1]
        if len(chosen) == count:
            break
    return chosen


def draw_maps(path: Path, sheet: Sheet, chosen: list[int], maps: dict[str, Float[Tensor, "n g g"]]) -> None:
    """One row a word: the picture, then each model's map over it; the outline is the true mask, the ring the largest cell."""
    columns = ["", *maps]
    width, high = 1.9, 2.0
    figure, axes = plt.subplots(
        len(chosen),
        len(columns),
        figsize=(width * len(columns), high * len(chosen) + 0.35),
        squeeze=False,
        layout="constrained",
    )
    for number, (row, i) in enumerate(zip(axes, chosen, strict=True)):
        example, stored = sheet.examples[sheet.place[i][0]], sheet.stored[sheet.place[i][0]]
        picture = example.image()
        row[0].imshow(picture, extent=(0, 1, 1, 0))  # left, right, bottom, top
        text = "\n".join(textwrap.wrap(f"{example.question} {stored.answer}".strip(), 30))
        row[0].set_xlabel(text, fontsize=6.5, color="#444444")
        row[0].set_ylabel(sheet.texts[i], fontsize=10, fontweight="bold")
        for axis, (name, of) in zip(row[1:], maps.items(), strict=True):
            side = draw.overlay(axis, picture, of[i]).shape[0]
            at = (np.arange(side) + 0.5) / side
            axis.contour(at, at, sheet.masks[i].numpy(), [0.5], colors="white", linewidths=0.9)
            if number == 0:
                axis.set_title(name, fontsize=9, color=COLORS.get(name, "black"))
        row[0].set(xticks=[], yticks=[])
        row[0].spines[:].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(path: Path, runs: list[Run]) -> bool:
    """The two losses over the steps, a thin line a run and a thick one for their mean. False if no run logged any."""
    losses = {"loss_vlm": "cross entropy per token", "loss_att": "alignment loss (MSE)"}
    losses = {name: label for name, label in losses.items() if any(name in x for run in runs for x in run.history)}
    if not losses:
        return False
    figure, axes = plt.subplots(1, len(losses), figsize=(4.6 * len(losses), 3.1), squeeze=False, layout="constrained")
    for axis, (name, label) in zip(axes[0], losses.items(), strict=True):
        for kind in (PLAIN, LAVENDER):
            lines = [{int(x["step"]): x[name] for x in run.history if name in x} for run in runs if run.name == kind]
            lines = [line for line in lines if line]
            if not lines:
                continue
            steps = sorted(set.intersection(*(set(line) for line in lines)))
            if len(lines) > 1:
                for line in lines:
                    axis.plot(list(line), list(line.values()), color=COLORS[kind], lw=0.7, alpha=0.4)
            lw, zorder = (3.2, 2) if kind == PLAIN else (1.6, 3)  # where the two coincide both are seen
            mean = [statistics.fmean(line[step] for line in lines) for step in steps]
            axis.plot(steps, mean, color=COLORS[kind], lw=lw, zorder=zorder, label=kind)
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
