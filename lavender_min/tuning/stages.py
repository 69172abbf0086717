"""A host trained in stages, each of which goes on with what the one before it left: first the new projector alone, later all of it.

    python -m lavender_min.tuning.stages configs/four_stages.yaml --vlm runs/siglip-qwen2 --output_dir runs/four

The schedule is a YAML file. A stage is a run of train.py, and its entries are flags of train.py, with every check those have;
what all stages share stands once:

    shared: {full: true, plain: true, num_train_epochs: 1}
    stages:
      projector: {train_only: projector, data: folder, data_root: data/blip558k, learning_rate: 1e-3}
      whole: {data: folder, data_root: data/llava-next, learning_rate: 2e-5, plain: false, maps: maps/llava-next}

All stages are looked through before the first begins: their flags, data and maps. Stage 2 lies in OUT/2-whole. What was stopped or
killed goes on when the same command is given again: finished stages stay as they are, the one that was at work goes on from its
last checkpoint. The last stage's folder is the trained host.
"""

import contextlib
import gc
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lavender_min import cli
from lavender_min.failing import naming, say, shaped
from lavender_min.tuning import command
from lavender_min.tuning.flags import Flags

PROG = "stages"
Values = dict[str, Any]
# What a stage cannot say, because it follows from its place, or because it would not train.
DECIDED = ("output_dir", "plan", "help_training", "resume_from_checkpoint")
# In a stage's folder: an adapter's host with the adapter merged into it, for the next stage.
MERGED = "merged"


class Schedule(NamedTuple):
    """The file: flags of train.py, by stage, and those that all stages share unless they say otherwise."""

    stages: dict[str, Values]
    shared: Values = {}


class Stage(NamedTuple):
    where: str  # the file and the stage's name, for errors
    folder: Path
    argv: list[str]  # flags of train.py


def read(file: Path, vlm: str, out: Path) -> list[Stage]:
    """The stages of a schedule, in order. `vlm`, if given, is the host that the first of them trains.

    Raises ValueError, in one line that names the file, for what cannot be a schedule.
    """
    with naming(file):
        schedule = shaped(yaml.safe_load(file.read_text(encoding="utf-8")), Schedule, file)
        if not schedule.stages:
            raise ValueError("a schedule has at least one stage")
    found: list[Stage] = []
    for number, (name, own) in enumerate(schedule.stages.items(), 1):
        where = f"{file}, stage {name}"
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{where}: a stage's name becomes a folder's; letters, digits, dots and dashes will do")
        values = {**schedule.shared, **own}
        check_names(where, values)
        folder = out / f"{number}-{name}"
        if found:
            if "vlm" in own:
                raise ValueError(f"{where}: its vlm is what the stage before it leaves; only the first has one")
            values["vlm"] = str(result(found[-1]))
        elif vlm:
            values["vlm"] = vlm
        values["output_dir"] = str(folder)
        found.append(Stage(where, folder, [word for pair in values.items() for word in as_flag(*pair)]))
    return found


def check_names(where: str, values: Values) -> None:
    known = {field.name for field in fields(Flags)} | {flag.removeprefix("--") for flag in command.trainer_flags()}
    for name in values:
        if name in DECIDED:
            raise ValueError(f"{where}: {name} is not for a schedule to say")
        if name not in known:
            raise ValueError(f"{where}: train.py has no flag {name}")


def as_flag(name: str, value: Any) -> list[str]:
    """A YAML value as words of a command line. Nothing (`null`) leaves the flag's default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, bool | dict):
        value = json.dumps(value)
    return [f"--{name}={value}"]


def flags_of(stage: Stage) -> Flags:
    """The stage's own flags. Raises ValueError, with the file's name, for a value that cannot be, of the Trainer's flags too."""
    from lavender_min.tuning import arguments

    said = io.StringIO()
    try:
        with naming(stage.where), contextlib.redirect_stderr(said):
            flags, rest = cli.parse_known(Flags, command.PROG, None, stage.argv)
            arguments.parse(rest, flags)
    except SystemExit:
        raise ValueError(f"{stage.where}: {said.getvalue()}") from None
    return flags


def result(stage: Stage) -> Path:
    """The host that a stage leaves: its folder, or, where it trains an adapter, the two merged."""
    return stage.folder if flags_of(stage).mode == "full" else stage.folder / MERGED


def run(stages: list[Stage]) -> int:
    """Trains what is not trained yet; the exit code is train.py's of the stage that stopped."""
    from accelerate import PartialState

    from lavender_min.tuning.export import export

    for stage in stages:
        with naming(stage.where):
            command.examples(flags_of(stage))
    for i, stage in enumerate(stages, 1):
        say(f"== stage {i} of {len(stages)}: {stage.folder}")
        if code := command.train(stage.argv):
            return code
        # Trainer and model refer to each other, and two hosts at once may not fit.
        gc.collect()
        merged = result(stage)
        with PartialState().main_process_first():
            if merged != stage.folder and not merged.exists():
                export(stage.folder, merged)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog=PROG, description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("schedule", type=Path, help="a YAML file")
    parser.add_argument("--vlm", default="", help="the host that the first stage trains (default: as the file says)")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets a folder for each stage")
    args = parser.parse_args(argv)
    return cli.run(PROG, lambda: run(read(args.schedule, args.vlm, args.output_dir)))


if __name__ == "__main__":
    sys.exit(main())
