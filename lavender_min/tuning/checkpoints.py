"""The folder of a run: who may write there, which of its checkpoints are whole, and when the run is at its end.

A checkpoint holds the model as it will be saved, and what going on needs: optimiser, schedule, random states. Its last file is
trainer_state.json. The folder itself gets a trainer_state.json when the run is at its end, again as the last file.
"""

import contextlib
import fcntl
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from safetensors import safe_open
from typing_extensions import TypedDict

from lavender_min.failing import naming, one_line, read_json
from lavender_min.tuning.flags import Flags

STATE_FILE = "trainer_state.json"
LOCK_FILE = ".training"
# Beginnings of the names of a checkpoint's files that are there to go on, and no part of the model.
TO_GO_ON = ("optimizer", "scheduler", "rng_state", "scaler", "pytorch_model_fsdp", STATE_FILE)


class Checkpoint(NamedTuple):
    step: int
    folder: Path


def total_steps(args: Any, examples: int) -> int:
    """How many steps a run takes from its start, as the Trainer counts them. Raises ValueError if there is none."""
    batch = args.per_device_train_batch_size * args.world_size
    batches = examples // batch if args.dataloader_drop_last else math.ceil(examples / batch)
    if not batches:
        raise ValueError(
            f"--dataloader_drop_last true leaves nothing to train on: {examples} examples are no batch of {batch}; "
            f"take --per_device_train_batch_size {max(1, examples // args.world_size)} or less"
        )
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def real(path: str | Path) -> Path:
    """Where a path leads; unlike Path.resolve it takes a link that leads to itself."""
    return Path(os.path.realpath(path))


def refuse_inputs(flags: Flags, out: Path) -> None:
    """No output replaces an input."""
    inputs = [("--vlm", flags.vlm), *(("--maps", one.maps) for one in flags.sets)]
    inputs += [("--data_root", one.root or "") for one in flags.sets]
    for name, given in inputs:
        path = real(given)
        # The Trainer deletes old checkpoints of its own folder.
        checkpoint = path.parent == real(out) and path.name.startswith("checkpoint-")
        if given and (path == real(out) or checkpoint):
            raise ValueError(f"--output_dir {out} would write over {name} {given}: take another --output_dir")


class Callbacks(TypedDict):
    """What the Trainer asks for by name when it goes on."""

    TrainerControl: dict[str, Any]


class State(TypedDict):
    """What must stand in a trainer_state.json; more may."""

    global_step: int
    stateful_callbacks: NotRequired[Callbacks]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """One run at a time writes to a folder. The lock ends with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK_FILE, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another train.py is at work in {out}: wait for it, or take another --output_dir"
            ) from None
        yield


def step_of(folder: Path) -> int:
    """The step at which a checkpoint, or a finished run, was saved. Raises ValueError or OSError, which name the file."""
    file = folder / STATE_FILE
    with naming(file):
        return int(read_json(file, dict)["global_step"])


def is_finished(out: Path, steps: int) -> bool:
    """Whether the folder holds a run that has taken this many steps and saved its end."""
    try:
        return step_of(out) >= steps
    except (ValueError, OSError):
        return False


def last_checkpoint(out: Path) -> Checkpoint | None:
    """The newest whole checkpoint.

    A run killed while it saved leaves one without its last file, which is passed over. One whose files cannot be read, because
    a disk was full or a copy was cut, is named on stderr, and the one before is taken. Raises ValueError if none is left then.
    """
    found, broken = [], ""
    for folder in out.glob("checkpoint-*"):
        with contextlib.suppress(ValueError, OSError):
            found.append(Checkpoint(step_of(folder), folder))
    for checkpoint in sorted(found, reverse=True):
        try:
            check(checkpoint.folder)
        except (ValueError, OSError) as error:
            broken = one_line(error)
            print(f"{checkpoint.folder} is passed over: {broken}", file=sys.stderr)
        else:
            return checkpoint
    if broken:
        raise ValueError(f"no checkpoint in {out} can be read ({broken}): delete them to start from the beginning")
    return None


def given(folder: str | None) -> Checkpoint | None:
    """The checkpoint of --resume_from_checkpoint. Raises ValueError or OSError, which name what of it cannot be read."""
    if not folder:
        return None
    check(Path(folder))
    return Checkpoint(step_of(Path(folder)), Path(folder))


def require_optimizer(folder: Path) -> None:
    """Raises ValueError for a checkpoint of --save_only_model. The Trainer would begin its schedule anew, without a word."""
    # DeepSpeed keeps its optimiser in a folder global_step<N>.
    if not any(file.name.startswith(("optimizer", "global_step")) for file in folder.iterdir()):
        raise ValueError(
            f"{folder} holds a model alone, as --save_only_model wants it, and no run can go on from that: "
            "take another --output_dir, or delete the checkpoints to start from the beginning"
        )


def check(folder: Path) -> None:
    """Reads every file of a checkpoint through. Raises ValueError, which names the file that is cut or has changed."""
    for file in sorted(folder.iterdir()):
        with naming(file):
            if file.suffix == ".safetensors":
                # Its header says how long the file is.
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                # torch.save writes a zip archive, with a checksum of each tensor.
                with zipfile.ZipFile(file) as archive:
                    if bad := archive.testzip():
                        raise ValueError(f"{bad} in it has changed")
            elif file.suffix == ".json":
                read_json(file, State if file.name == STATE_FILE else Any)


def finish(checkpoint: Checkpoint, out: Path, take_best: bool) -> None:
    """The end of a run that was killed after its last checkpoint: the model is copied from there to the folder itself.

    `take_best` takes the model of the best checkpoint instead, as --load_best_model_at_end wants it. No step is taken, so no
    model is loaded.
    """
    source = checkpoint.folder
    if take_best:
        state = read_json(source / STATE_FILE, dict)
        # The folder may have been moved since.
        best = source.parent / Path(str(state.get("best_model_checkpoint"))).name
        source = best if best.is_dir() else source
    files = [file for file in sorted(source.iterdir()) if file.is_file() and not file.name.startswith(TO_GO_ON)]
    for file in [*files, checkpoint.folder / STATE_FILE]:
        aside = out / f".tmp-{file.name}"
        shutil.copyfile(file, aside)
        os.replace(aside, out / file.name)
