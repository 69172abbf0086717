"""The map stores of the ledger: Stable Diffusion's, exact masks, and Stable Diffusion's with two tiles exchanged.

A store holds one kind of maps of one row of scenes; the largest split that is wanted of the row is extracted once and serves the
smaller ones. Each is made in a process of its own, by the commands that make any store.
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

# One noised pass at the resolution that finds words best (lavender_min/toy/README.md).
RECIPE = "--recipe noise --timesteps 151 --resolutions 16:1 --batch_size 32".split()
COMMANDS = {
    "sd": ["lavender_min.teachers.command", *RECIPE, "--maps"],
    "masks": ["lavender_min.maps", "from-masks"],
}


class Wanted(NamedTuple):
    split: str
    kind: str


def folder(out: Path, split: str, kind: str) -> Path:
    """Splits that begin alike share a store."""
    return out / "maps" / f"{toy.SPLITS[split].drawn}-{kind}"


def splits_of(run: Run) -> list[str]:
    """The splits that a run is trained on."""
    return list(dict.fromkeys(split for stage in run.stages for split in listed(stage["split"])))


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def wanted(runs: Sequence[Run]) -> list[Wanted]:
    """Each store once, at its largest, those that others are made of first."""
    found: dict[tuple[str, str], Wanted] = {}
    for run in runs:
        needs = [Wanted(split, run.maps) for split in splits_of(run)]
        needs += [Wanted(run.mapped, "sd")] if run.mapped else []
        for one in [w for need in needs for w in (need._replace(kind=need.kind.removesuffix("-swapped")), need)]:
            key = (toy.SPLITS[one.split].drawn, one.kind)
            if key not in found or scenes(found[key].split) < scenes(one.split):
                found[key] = one
    return list(found.values())


def scenes(split: str) -> int:
    return toy.SPLITS[split].scenes or toy.TUNING_SCENES


def make(out: Path, one: Wanted) -> None:
    """The store, made or completed. Another process that wants it too waits."""
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
    """Waits for its turn; the turn ends with the process, however that ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def swap(source: Path, into: Path) -> None:
    """What a host learns whose tiles are laid out column by column: top right and bottom left change places."""
    store = MapStore(source)
    origins = store.origins()
    with MapWriter(into, {**store.recipe, "tiles": "exchanged"}) as writer:
        for id in store.ids:
            if id not in writer.done:
                row = store[id]
                writer.add(id, row.question, row.answer, row.words, exchanged(row.maps), row.sos, origins[id].digest)


def exchanged(maps: Float[Tensor, "w g g"]) -> Float[Tensor, "w g g"]:
    """Tile (row, column) of 2 × 2 goes to (column, row)."""
    tiles = rearrange(maps, "w (r y) (c x) -> w r c y x", r=2, c=2)
    return rearrange(tiles, "w r c y x -> w (c y) (r x)")
