"""The pictures of the report: where the models looked for some words, and the losses of the runs. And its page."""

import statistics
import textwrap
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lavender_min import draw, page
from lavender_min.evaluation.metrics import mass_inside, pointing
from lavender_min.evaluation.names import COLORS, LAVENDER, PLAIN, SD, settings, spell
from lavender_min.evaluation.report import Run
from lavender_min.evaluation.sheet import Sheet
from lavender_min.geometry import contrast
from lavender_min.maps import entropy

# Of the curves of several settings.
SETTINGS = (COLORS[LAVENDER], "#2f8f83", "#b2487a", "#5b6b7f")
# A page of so many pictures stays below 5 MB.
PAGE_PICTURES = 24
ABOUT = (
    "Where each model looked for words of the answers. Trust: how sharp Stable Diffusion's map is, (largest − smallest) / mean. "
    "Entropy: how spread out a map is, at most 6.93 nats. Pointing, %: whether its largest cell lies on the thing. Mass, %: "
    "the share of the map that does."
)


def choose(sheet: Sheet, count: int = 5) -> list[int]:
    """Words to show, one a picture from the first on, so that nobody picks them by how they look.

    Every other word is of the first kind ("shape"); between them the other kinds take turns.
    """
    first, others = sheet.kind_order[:1], sheet.kind_order[1:]
    chosen: list[int] = []
    for picture in dict.fromkeys(sheet.pictures):
        turn, odd = divmod(len(chosen), 2)
        kinds = [others[turn % len(others)]] if odd and others else first
        shown = {sheet.texts[i] for i in chosen}
        here = [i for i, p in enumerate(sheet.pictures) if p == picture and (not kinds or sheet.kinds[i] in kinds)]
        fresh = [i for i in here if sheet.texts[i] not in shown] or here
        chosen += fresh[:1]
        if len(chosen) == count:
            break
    return chosen


def draw_maps(path: Path, sheet: Sheet, chosen: list[int], maps: dict[str, Float[Tensor, "m g g"]]) -> None:
    """One row a word: the picture, then each model's map over it. A line surrounds the mask, a ring the largest cell."""
    columns = 1 + len(maps)
    figure = Figure(figsize=(1.9 * columns, 2.0 * len(chosen) + 0.35), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for number, (row, i) in enumerate(zip(axes, chosen, strict=True)):
        example = sheet.examples[sheet.place[i][0]]
        picture = example.image()
        # left, right, bottom, top
        row[0].imshow(picture, extent=(0, 1, 1, 0))
        text = "\n".join(textwrap.wrap(f"{example.question} {example.answer}".strip(), 30))
        row[0].set_xlabel(text, fontsize=6.5, color="#444444")
        row[0].set_ylabel(sheet.texts[i], fontsize=10, fontweight="bold")
        for axis, (name, of) in zip(row[1:], maps.items(), strict=True):
            side = draw.overlay(axis, picture, of[i]).shape[0]
            centres = (np.arange(side) + 0.5) / side
            axis.contour(centres, centres, sheet.masks[i].numpy(), [0.5], colors="white", linewidths=0.9)
            if number == 0:
                axis.set_title("\n".join(textwrap.wrap(name, 24)), fontsize=9, color=COLORS.get(name, "black"))
        row[0].set(xticks=[], yticks=[])
        row[0].spines[:].set_visible(False)
    figure.savefig(path, dpi=150)


def write_page(path: Path, sheet: Sheet, maps: dict[str, Float[Tensor, "m g g"]], frame: str) -> None:
    """The sheet's first pictures, and over them each model's map of the word that one points at."""
    numbers = [numbers_of(name, of, sheet) for name, of in maps.items()]
    # Picture ─► example ─► its words on the sheet.
    words: dict[str, dict[int, list[int]]] = {}
    for i, (picture, (e, _)) in enumerate(zip(sheet.pictures, sheet.place, strict=True)):
        words.setdefault(picture, {}).setdefault(e, []).append(i)
    pictures = []
    for name, texts in list(words.items())[:PAGE_PICTURES]:
        shown = [page.Text(*sheet.examples[e][2:4], [page_word(i, sheet, maps, numbers) for i in of])
                 for e, of in texts.items()]  # fmt: skip
        image = sheet.examples[next(iter(texts))].image()
        pictures.append(page.Picture(name, draw.framed(image, frame), shown))
    page.write(path, page.Page("Where the models look", ABOUT, list(maps), pictures))


def page_word(
    i: int, sheet: Sheet, maps: dict[str, Float[Tensor, "m g g"]], numbers: list[list[dict[str, str]]]
) -> page.WordMaps:
    e, w = sheet.place[i]
    word = [word for word in sheet.stored[e].words if word.field == "answer"][w]
    return page.WordMaps(word, torch.stack([of[i] for of in maps.values()]), [of[i] for of in numbers], sheet.masks[i])


def numbers_of(name: str, maps: Float[Tensor, "m g g"], sheet: Sheet) -> list[dict[str, str]]:
    """What a page says of each map: as in the tables, but of one word."""
    values = {
        "entropy": entropy(maps),
        "pointing": pointing(maps, sheet.masks),
        "mass": mass_inside(maps, sheet.masks),
    }
    trust = contrast(maps.float())
    return [
        ({"trust": f"{trust[i]:.2f}"} if name == SD else {})
        | {key: spell(key, of[i].item(), None) for key, of in values.items()}
        for i in range(len(maps))
    ]


def draw_curves(path: Path, runs: list[Run]) -> bool:
    """The two losses over the steps, a thin line a run and a thick one for their mean. False if no run logged any."""
    titles = {"loss_vlm": "cross entropy per token", "loss_att": "alignment loss (MSE)"}
    logged = [name for name in titles if any(name in entry for run in runs for entry in run.history)]
    if not logged:
        return False
    figure = Figure(figsize=(4.6 * len(logged), 3.1), layout="constrained")
    axes = figure.subplots(1, len(logged), squeeze=False)[0]
    for axis, name in zip(axes, logged, strict=True):
        for kind in dict.fromkeys(run.name for run in runs):
            lines = [{int(entry["step"]): entry[name] for entry in run.history if name in entry}
                     for run in runs if run.name == kind]  # fmt: skip
            draw_losses(axis, kind, color_of(kind, runs), [line for line in lines if line])
        axis.set_xlabel("step")
        axis.set_title(titles[name], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True


def color_of(kind: str, runs: list[Run]) -> str:
    """Its own, and of several settings of Lavender one each."""
    kinds = settings(dict.fromkeys(run.name for run in runs))
    return COLORS[PLAIN] if kind == PLAIN else SETTINGS[kinds.index(kind) % len(SETTINGS)]


def draw_losses(axis: Axes, kind: str, color: str, lines: list[dict[int, float]]) -> None:
    """Each run's {step: loss} of one kind of runs, and their mean over the steps that all have."""
    if not lines:
        return
    if len(lines) > 1:
        for line in lines:
            axis.plot(list(line), list(line.values()), color=color, lw=0.7, alpha=0.4)
    steps = sorted(set.intersection(*(set(line) for line in lines)))
    mean = [statistics.fmean(line[step] for line in lines) for step in steps]
    # Plain tuning is the broader line and lies below, so that both are seen where they coincide.
    lw, zorder = (3.2, 2) if kind == PLAIN else (1.6, 3)
    axis.plot(steps, mean, color=color, lw=lw, zorder=zorder, label=kind)
