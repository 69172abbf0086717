"""Finished runs against each other, the untuned host and Stable Diffusion: everything on one sheet, then the report.

What is missing is made first by the other stages, each in a process of its own: Stable Diffusion's maps of the held-out
pictures, and, with --seeds, the runs.
"""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from lavender_min import data
from lavender_min.data import Example
from lavender_min.evaluation import figures, metrics, models, report, tables
from lavender_min.evaluation.flags import Flags, split_flags
from lavender_min.evaluation.names import ALIGNED, CHANCE, LAVENDER, PLAIN, SD, UNTUNED, Numbers
from lavender_min.evaluation.sheet import Sheet, first_pictures, make_sheet
from lavender_min.failing import read_json, say, shaped
from lavender_min.maps import MapStore
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags

# The modules behind the other stages' scripts: an installed package has the modules only.
STAGES = {"extract.py": "lavender_min.teachers.command", "train.py": "lavender_min.tuning.command"}
# What differs between runs of one setting.
SEEDS = ("--seed", "--data_seed")
RECIPE = "the maps' recipe"
# The folder the package lies in.
ROOT = Path(data.__file__).parents[2]


def compare(flags: Flags, command: str) -> None:
    """Writes the report. `command` is the command line of this comparison, for the reader."""
    out = Path(flags.out)
    examples = first_pictures(flags.examples(), flags.scenes)
    check_pairs(flags, out)
    finished = recall_all(flags.plain, flags.lavender)
    store, commands = held_out_maps(flags, examples)
    sheet = make_sheet(with_maps(examples, store), store)
    if flags.seeds:
        made = train_pairs(flags, out)
        commands += made.commands
        finished = recall_all(made.plain, made.lavender)

    base = base_of(finished) or ModelFlags(data.SOURCES[flags.data].vlm)
    dtype = models.half_of_gpu()
    found = measure_all(base, finished, sheet, store.recipe["frame"], flags.batch_size)
    about = {
        "commands": [*(shlex.join(["python", *words]) for words in commands), command],
        "versions": versions(),
        "recipe": store.recipe,
        "host": f"{near(base.vlm)}, {'NF4, ' if base.mode == 'qlora' else ''}{str(dtype).removeprefix('torch.')}",
        "scenes": flags.scenes,
    }
    out.mkdir(parents=True, exist_ok=True)
    folders = [run.report for run in finished]
    figures.draw_maps(out / "maps.png", sheet, figures.choose(sheet), found.maps)
    pictures = ["maps.png", *(["curves.png"] if figures.draw_curves(out / "curves.png", folders) else [])]
    report.write(out, sheet, found.numbers, folders, about, pictures)
    if flags.html:
        figures.write_page(flags.page, sheet, found.maps, store.recipe["frame"])
    main = tables.main_table(found.numbers)
    differences = tables.differences_table(found.numbers, tuple(tables.main_columns(found.numbers)))
    print("\n\n".join(filter(None, [main, differences])))
    print(f"{out / 'report.md'}, report.json and {' and '.join(pictures)} are written")
    if flags.html:
        print(f"{flags.page} is to be opened in a browser")


def versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "diffusers")}
    return {"python": ".".join(map(str, sys.version_info[:3])), **libraries}


# ------------------------------------------------------------------------------------------------- the other stages


def call(script: str, words: list[str]) -> None:
    """Runs another stage with these words of a command line, its progress on our own terminal."""
    print("── " + shlex.join(["python", script, *words]), flush=True)
    code = subprocess.run([sys.executable, "-m", STAGES[script], *words]).returncode
    if code:
        raise ValueError(f"stopped, because {script} ended with exit code {code}; its flags were: {shlex.join(words)}")


def held_out_maps(flags: Flags, examples: list[Example]) -> tuple[MapStore, list[list[str]]]:
    """The store, made or completed where it must be, and the commands that did it."""
    maps = Path(flags.maps or f"maps/{flags.data}-heldout")
    wanted = [*(["--sd", flags.sd] if flags.sd else []), *split_flags("--extract", flags.extract)]
    split = flags.split or data.measured_split(flags.data, flags.entities)
    part = [*(["--split", split] if split else []), *root_flags(flags)]
    words = ["--data", flags.data, *part, "--limit", str(len(examples)), "--maps", str(maps), *wanted]
    there = set(MapStore(maps).ids) if (maps / "recipe.json").exists() else set()
    # With flags of its own extract.py runs even if all is there: it checks that they are those the store was made with.
    if wanted or any(example.id not in there for example in examples):
        call("extract.py", words)
        return MapStore(maps), [["extract.py", *words]]
    return MapStore(maps), []


def root_flags(flags: Flags) -> list[str]:
    """Where the data lies, for another stage's command line."""
    return ["--data_root", flags.data_root] if flags.data_root else []


def with_maps(examples: list[Example], store: MapStore) -> list[Example]:
    """Without those whose pictures extract.py could not read and has listed."""
    kept = [example for example in examples if example.id in store]
    if len(kept) < len(examples):
        say(
            f"{len(examples) - len(kept):,} of {len(examples):,} examples have no maps in {store.path} and are left out"
        )
    return kept


def check_pairs(flags: Flags, out: Path) -> None:
    """Whether --seeds can make its runs in `out`, or go on with those that are there."""
    if not flags.seeds:
        return
    note = out / "seeds.json"
    if note.exists() and (before := read_json(note, list)) != split_flags("--train", flags.train):
        raise ValueError(f'{out} holds runs made with --train "{shlex.join(before)}": take another --out, or delete it')
    if not note.exists() and any(out.glob("*-*/trainer_state.json")):
        raise ValueError(f"{out} holds runs that --seeds did not make: give them as --plain and --lavender")


class Made(NamedTuple):
    """The folders of the runs that --seeds wants, and the commands that made them."""

    plain: list[str]
    lavender: list[str]
    commands: list[list[str]]


def train_pairs(flags: Flags, out: Path) -> Made:
    """Makes the runs that are missing. Lavender comes first: if its maps are missing, that shows at once."""
    more = split_flags("--train", flags.train)
    out.mkdir(parents=True, exist_ok=True)
    (out / "seeds.json").write_text(json.dumps(more) + "\n")
    made = Made([], [], [])
    for seed in range(flags.seeds or 0):
        for kind, folders in (("lavender", made.lavender), ("plain", made.plain)):
            folder = out / f"{kind}-{seed}"
            plain = ["--plain"] if kind == "plain" else []
            words = ["--data", flags.data, *root_flags(flags), *plain, "--seed", str(seed)]
            words += ["--output_dir", str(folder), *more]
            if not (folder / "trainer_state.json").exists():
                call("train.py", words)
            folders.append(str(folder))
            made.commands.append(["train.py", *words])
    return made


# ------------------------------------------------------------------------------------------------------------- runs


class Finished(NamedTuple):
    """A finished run: as the report shows it, and the flags that build its model."""

    report: report.Run
    flags: ModelFlags


def recall(name: str, folder: str) -> Finished:
    """What a finished run was made with. Raises, in one line, what stands against using it as PLAIN or LAVENDER."""
    flags = runs.recall(folder)
    state = Path(folder) / "trainer_state.json"
    if not state.exists():
        raise FileNotFoundError(
            f"{folder} is not finished (no trainer_state.json): start its train.py again, it goes on"
        )
    if flags.plain != (name == PLAIN):
        raise ValueError(
            f"{folder} was tuned {'without' if flags.plain else 'with'} alignment: give it as "
            f"--{'plain' if flags.plain else 'lavender'}"
        )
    shown = asdict(flags) | {"vlm": near(flags.vlm)}
    history = shaped(read_json(state, dict).get("log_history"), list, f"{state}, log_history")
    return Finished(report.Run(name, folder, shown, history), flags)


def recall_all(plain: list[str], lavender: list[str]) -> list[Finished]:
    return [recall(PLAIN, folder) for folder in plain] + by_setting([recall(LAVENDER, folder) for folder in lavender])


def by_setting(finished: list[Finished]) -> list[Finished]:
    """Runs of several settings are told apart by that in which they differ.

    These are flags of ours where they are not at their default, flags of the Trainer, and the recipe of the maps.
    """
    settings = [setting_of(run) for run in finished]
    names = dict.fromkeys(name for setting in settings for name in setting)
    differing = [name for name in names if len({str(setting.get(name)) for setting in settings}) > 1]
    defaults = {f"--{field.name}": field.default for field in fields(ModelFlags)}
    named = []
    for run, setting in zip(finished, settings, strict=True):
        said = {name: setting[name] for name in differing if name in setting}
        words = [f"{name} {value}" for name, value in said.items() if name not in defaults or value != defaults[name]]
        named.append(run._replace(report=run.report._replace(name=" ".join([LAVENDER, *words]))))
    return named


def setting_of(run: Finished) -> dict[str, Any]:
    """All that decides a run's result, but for its seed and data, by the names of flags; and "maps" for their recipe."""
    found = {f"--{name}": value for name, value in asdict(run.flags).items()}
    decides = read_json(Path(run.report.folder) / runs.FLAGS_FILE, dict).get(runs.DECIDES, {})
    found |= {name: value for name, value in decides.items() if name.startswith("--") and name not in SEEDS}
    return found | ({"maps": decides[RECIPE]} if RECIPE in decides else {})


def base_of(finished: list[Finished]) -> ModelFlags | None:
    """The flags of the first run, None if there is no run; all runs must have tuned its host in its way,
    and must be read in its layers.
    """
    for run in finished:
        first = finished[0]
        # A folder may be named in several ways.
        here, there = ((os.path.realpath(one.flags.vlm), one.flags.mode) for one in (run, first))
        if here != there:
            raise ValueError(
                f"{run.report.folder} tuned {run.flags.vlm} by {run.flags.mode}, "
                f"{first.report.folder} {first.flags.vlm} by {first.flags.mode}"
            )
        if run.flags.align_layers != first.flags.align_layers:
            raise ValueError(
                f"{run.report.folder} has --align_layers {run.flags.align_layers!r}, {first.report.folder} has "
                f"{first.flags.align_layers!r}: compared models must be read in the same layers"
            )
    return finished[0].flags if finished else None


def near(name: str) -> str:
    """A model that ships with this repository is named by its place in it, wherever the repository lies."""
    return str(Path(name).relative_to(ROOT)) if Path(name).is_relative_to(ROOT) else name


# -------------------------------------------------------------------------------------------------------- measuring


class Measured(NamedTuple):
    """By name of a model: the numbers of each of its runs, and the maps of the first, for the drawing."""

    numbers: tables.Models
    maps: dict[str, Float[Tensor, "m g g"]]


def measure_all(base: ModelFlags, finished: list[Finished], sheet: Sheet, frame: str, batch_size: int) -> Measured:
    """An even map, Stable Diffusion, the host that `base` names as it is, and the finished runs."""
    numbers: tables.Models = {CHANCE: [metrics.chance_numbers(sheet)], SD: [metrics.map_numbers(sheet.maps, sheet)]}
    shown = {SD: sheet.maps}
    # (name, label of the progress bar, flags, folder of the weights)
    subjects: list[tuple[str, str, ModelFlags, str | None]] = [(UNTUNED, UNTUNED, base, None)]
    for run in finished:
        label = f"{run.report.name} {Path(run.report.folder).name}"
        subjects.append((run.report.name, label, run.flags, run.report.folder))
    for name, label, flags, folder in subjects:
        # The model has no name here, so that it is gone before the next one is loaded.
        found, maps = measure(models.load(flags, models.half_of_gpu(), folder), sheet, frame, batch_size, label)
        numbers.setdefault(name, []).append(found["own"])
        shown.setdefault(name, maps["own"])
        # Without an Aligner these are the own maps once more.
        if "aligned" in found and flags.aligner != "none":
            numbers.setdefault(name + ALIGNED, []).append(found["aligned"])
    return Measured(numbers, shown)


def measure(
    loaded: models.Loaded, sheet: Sheet, frame: str, batch_size: int, label: str
) -> tuple[dict[str, Numbers], dict[str, Float[Tensor, "m g g"]]]:
    """The numbers and the maps, "own" and, with an Aligner, "aligned". The answers' numbers stand beside the own maps'."""
    collate = models.collator(loaded, frame)
    maps = models.read_maps(loaded.model, collate, sheet, batch_size, f"{label}: maps")
    questions = [example for example in sheet.examples if example.question]
    replies = models.answer(loaded.model, loaded.processor, questions, batch_size, f"{label}: answers")
    numbers = {name: metrics.map_numbers(of, sheet) for name, of in maps.items()}
    return numbers | {"own": metrics.answer_numbers(questions, replies) | numbers["own"]}, maps
