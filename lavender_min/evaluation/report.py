"""The report of a comparison: report.md for readers, report.json for programs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from lavender_min.evaluation.intervals import differences, interval
from lavender_min.evaluation.names import PLAIN, SPELLED, settings, spell, title
from lavender_min.evaluation.sheet import Sheet
from lavender_min.evaluation.tables import (
    Models,
    differences_table,
    keys_of,
    main_table,
    measure_table,
    table,
)


class Run(NamedTuple):
    """A folder that `train.py` left."""

    # PLAIN, or LAVENDER with the flags that tell its setting from others
    name: str
    folder: str
    flags: dict[str, Any]
    # What the Trainer logged (the log_history of trainer_state.json).
    history: list[dict[str, float]]


EXPLAINED = (
    "*Answers*: the whole greedy answer is right, but for case and spaces. *Pointing*: the map's largest of 32 × 32 cells "
    "lies on the thing the word names. *Mass*: the share of the map that does. *Entropy*: how spread out the map is, at "
    "most ln 1024 = 6.93. *MSE*: the squared error of the model's map against Stable Diffusion's of the same word, and "
    "against those of words for other things in the same picture (both maps stretched to 0 … 1; own below others: "
    "the map is this word's). Maps of a vision-language model are its own attention to the picture, mean over layers and heads; "
    "“through the Aligner” is what the training compares with Stable Diffusion, made by networks that are left "
    "behind after training (stretched to 0 … 1, which lifts its mass and lowers its entropy)."
)


def write(out: Path, sheet: Sheet, models: Models, runs: list[Run], about: dict[str, Any], pictures: list[str]) -> None:
    """report.md and report.json. `about`: commands, versions, recipe, host: what the reader needs to do it again."""
    found = {name: differences(models.get(PLAIN, []), models[name]) for name in settings(models)}
    content = {
        **about,
        "texts": len(sheet.examples),
        "words": {kind or "other": sheet.kinds.count(kind) for kind in sorted(set(sheet.kinds))},
        "models": {
            name: {
                "mean": {key: interval([run[key] for run in of]).mean for key in of[0]},
                "interval95": {key: interval([run[key] for run in of]).half for key in of[0]},
                "runs": of,
            }
            for name, of in models.items()
        },
        "minus_plain": {
            name: {key: difference._asdict() for key, difference in of.items()} for name, of in found.items()
        },
        "training": [run._asdict() for run in runs],
    }
    (out / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    (out / "report.md").write_text(as_markdown(content, models, runs, pictures))


def as_markdown(content: dict[str, Any], models: Models, runs: list[Run], pictures: list[str]) -> str:
    several = max(len(of) for of in models.values())
    spread = f"Mean ± 95 % interval (Student's t) over a model's runs, up to {several}; one run has no interval."
    words = ", ".join(f"{count} {SPELLED.get(kind, kind)}" for kind, count in content["words"].items())
    parts = [
        "# Report",
        f"{content['texts']} held-out texts, {sum(content['words'].values())} words of answers with a mask ({words}). "
        f"{spread if several > 1 else ''}",
        main_table(models),
        EXPLAINED,
    ]
    if found := differences_table(models):
        pairs = len(models[PLAIN])
        how = f"taken run by run, {pairs} pairs" if pairs > 1 else "one pair"
        parts += ["## Lavender against plain tuning", found]
        parts += [f"Differences are Lavender − plain tuning, {how}."]
    elif PLAIN in models and settings(models):
        counts = ", ".join(f"{len(models[name])} of {name}" for name in (PLAIN, *settings(models)))
        parts += [f"No differences are given: runs are compared in pairs, and there are {counts}."]
    headings = {
        "answers": "Answers by kind of question",
        "pointing": "Pointing game by kind of word",
        "mass": "Mass inside the mask by kind of word",
        "entropy": "Entropy by kind of word",
    }
    for measure, heading in headings.items():
        if keys_of(models, measure):
            parts += [f"## {heading}", measure_table(models, measure)]
    if pictures:
        parts += ["## Pictures", *(f"![{Path(name).stem}]({name})" for name in pictures)]
    if runs:
        parts += ["## Runs", runs_table(models, runs)]
    parts += ["## How this was made", "```\n" + "\n".join(content["commands"]) + "\n```"]
    parts += [f"Vision-language model, untuned and as the base of tuning: `{content['host']}`"]
    parts += ["Stable Diffusion's maps: `" + json.dumps(content["recipe"], ensure_ascii=False) + "`"]
    parts += ["Versions: " + ", ".join(f"{name} {version}" for name, version in content["versions"].items()) + "."]
    return "\n\n".join(parts) + "\n"


def runs_table(models: Models, runs: list[Run]) -> str:
    """A row a run: its steps, its last losses and its main numbers."""
    wanted = ("answers.all", *keys_of(models, "pointing")[:1], "mass.all", "mse.ratio")
    keys = [key for key in wanted if key in models[runs[0].name][0]]
    numbers_of = {name: iter(models[name]) for name in dict.fromkeys(run.name for run in runs)}
    rows = []
    for run in runs:
        numbers = next(numbers_of[run.name])
        losses = {name: [entry[name] for entry in run.history if name in entry] for name in ("loss_vlm", "loss_att")}
        last = [f"{values[-1]:.4f}" if values else "–" for values in losses.values()]
        steps = max((int(entry["step"]) for entry in run.history), default=0)
        rows.append([f"{run.name}: {run.folder}", str(steps), *last, *(spell(key, numbers[key], None) for key in keys)])
    return table(["run", "steps", "last loss_vlm", "last loss_att", *map(title, keys)], rows)
