"""The ledger's map stores: Stable Diffusion's maps ("sd"), exact masks ("masks"), and sd with two tiles exchanged ("sd-swapped").

Splits such as crowd_64 and crowd_256 hold the first scenes of one row (toy/data.py). They share a store for each kind of maps,
which is made for the largest of them that is wanted. "sd" and "masks" are made by the package's own commands, in processes of
their own.
"""

import fcntl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lavender_min import data
from lavender_min.failing import say
from lavender_min.ledger.plan import Run
from lavender_min.maps import MapStore, MapWriter
from lavender_min.toy import data as toy

# One noised pass, read at the resolution whose maps point best (lavender_min/toy/README.md).
RECIPE = "--recipe noise --timesteps 151 --resolutions 16:1 --batch_size 32".split()
# The module and the first words of the command that makes a store; the folder follows.
COMMANDS = {
    "sd": ["lavender_min.teachers.command", *RECIPE, "--maps"],
    "masks": ["lavender_min.maps", "from-masks"],
}


class Wanted(NamedTuple):
    """A store to be made: of all scenes of a split, and of one kind of maps (`Arm.maps`)."""

    split: str
    kind: str


def folder(out: Path, split: str, kind: str) -> Path:
    """The folder of a store: the same for all splits of one row of scenes."""
    return out / "maps" / f"{toy.SPLITS[split].drawn}-{kind}"


def splits_of(run: Run) -> list[str]:
    """The splits that a run is trained on, each once."""
    return list(dict.fromkeys(split for stage in run.stages for split in listed(stage["split"])))


def listed(value: str | list[str]) -> list[str]:
    """The value of a flag that may be given one value or several."""
    return [value] if isinstance(value, str) else value


def wanted(runs: Sequence[Run]) -> list[Wanted]:
    """The stores that runs need, each once and for its largest split."""
    needs: list[Wanted] = []
    for run in runs:
        for split in splits_of(run):
            # Swapped maps are made of others, so those come first.
            needs += [Wanted(split, run.maps.removesuffix("-swapped")), Wanted(split, run.maps)]
        if run.mapped:
            needs.append(Wanted(run.mapped, "sd"))
    found: dict[tuple[str, str], Wanted] = {}
    for one in needs:
        key = (toy.SPLITS[one.split].drawn, one.kind)
        if key not in found or scenes(found[key].split) < scenes(one.split):
            found[key] = one
    return list(found.values())


def scenes(split: str) -> int:
    """How many scenes a split has."""
    return toy.SPLITS[split].scenes or toy.TUNING_SCENES


def make(out: Path, one: Wanted) -> None:
    """Makes or completes a store; does nothing if it is there. A second process that wants it waits until the first is done.

    Raises ValueError if the command that makes it fails.
    """
    into = folder(out, *one)
    with locked(out / "locks" / f"{into.name}.lock"):
        examples = data.load("toy", split=one.split)
        if (into / "recipe.json").exists() and {example.id for example in examples} <= set(MapStore(into).ids):
            return
        say(f"── maps: {one.kind} of {one.split}, into {into}")
        if one.kind == "sd-swapped":
            swap(folder(out, one.split, "sd"), into)
            return
        words = [*COMMANDS[one.kind], str(into), "--data", "toy", "--split", one.split]
        code = subprocess.run([sys.executable, "-m", *words]).returncode
        if code:
            raise ValueError(f"the maps {into} could not be made (exit code {code}): {' '.join(words)}")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Waits until no other process holds the lock, and holds it while the `with` lasts. A process that ends holds no lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def swap(source: Path, into: Path) -> None:
    """Makes a store of the maps in `source` with the tiles top right and bottom left exchanged.

    These are the wrong targets that a host would get whose four tiles were laid out column by column (the paper's Fig. 23 and 24).
    """
    store = MapStore(source)
    origins = store.origins()
    with MapWriter(into, {**store.recipe, "tiles": "exchanged"}) as writer:
        for id in store.ids:
            if id not in writer.done:
                row = store[id]
                writer.add(id, row.question, row.answer, row.words, exchanged(row.maps), row.sos, origins[id].digest)


def exchanged(maps: Float[Tensor, "w g g"]) -> Float[Tensor, "w g g"]:
    """Cuts each map into 2 × 2 tiles and moves tile (row, column) to (column, row)."""
    tiles = rearrange(maps, "w (r y) (c x) -> w r c y x", r=2, c=2)
    return rearrange(tiles, "w r c y x -> w (c y) (r x)")
