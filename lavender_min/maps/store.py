"""The map store on disk: its reader and its writer. `lavender_min.maps` says what a store is, `shard` what a shard is."""

import contextlib
import fcntl
import json
import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TextIO

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field
from torch import Tensor
from typing_extensions import TypedDict

from lavender_min import failing
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps.shard import (
    Origin,
    Shard,
    StoredMaps,
    drop_rows,
    naming,
    read_ids,
    read_origins,
    read_through,
    write_rows,
    written_aside,
)
from lavender_min.words import Word

# So many shards are kept open: each is a file handle, its footer and ids, about 0.2 MB.
OPEN_SHARDS = 256

# So many bytes of maps are held before they become a shard, however few rows they are: Parquet counts a shard's cells in 32 bits.
MOST_BYTES = 2**30


class MadeWith(TypedDict):
    """What is read of a recipe's record of versions and machine."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    batch_size: NotRequired[Annotated[int, Field(ge=1)]]


class RecipeFile(TypedDict):
    """What recipe.json must hold, whatever else it does."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    frame: Literal["whole", "crop"]
    made_with: NotRequired[MadeWith]


class MapStore:
    """Read a store: `len(store)`, `store.ids`, `id in store`, `store[id]`, `store.recipe`.

    However many rows are read, it holds no more than the ids (about 20 MB for 100,000) and OPEN_SHARDS footers. A store may
    go to DataLoader workers, forked or spawned.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = read_recipe(self.path)
        self._shards = shard_files(self.path)
        ids = [read_ids(shard) for shard in self._shards]
        # The number of each shard's first row, where the rows of all shards are counted through.
        self._first = [0, *accumulate(map(len, ids))]
        # If an id should stand twice, the first counts.
        self._row: dict[str, int] = {}
        for row, id in enumerate(chain.from_iterable(ids)):
            self._row.setdefault(id, row)
        # The one used last stands last.
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, id: object) -> bool:
        return id in self._row

    @property
    def ids(self) -> list[str]:
        return list(self._row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __getitem__(self, id: str) -> StoredMaps:
        if id not in self._row:
            raise KeyError(f"{self.path} has no maps for id {id!r} (it holds {len(self)} examples)")
        number = bisect_right(self._first, self._row[id]) - 1
        with naming(self._shards[number]):
            shard = self._open.pop(number) if number in self._open else Shard(self._shards[number])
            self._open[number] = shard
            if len(self._open) > OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            row = self._row[id] - self._first[number]
            if shard.ids[row : row + 1] == [id]:
                stored = shard[row]
                low, high = stored.maps.aminmax() if stored.words else (0, 0)
                # NaN is neither.
                if not (low >= 0 and high < math.inf):
                    raise ValueError(f"the maps of {id} are no probabilities, which are finite and at least 0")
                return stored
        raise ValueError(f"{self._shards[number]} was written anew while it was being read: start again")

    def origins(self) -> dict[str, Origin]:
        """What each row was made from, by id."""
        found: dict[str, Origin] = {}
        for shard in self._shards:
            found = read_origins(shard) | found
        return found

    def read_through(self, part: int = 0, parts: int = 1) -> None:
        """Raises ValueError, naming the shard, if a byte of it has changed. Reads each `parts`-th shard, from `part` on."""
        for shard in self._shards[part::parts]:
            read_through(shard)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to DataLoader workers.
        return self.__dict__ | {"_open": {}}


class MapWriter:
    """Add rows to a store, new or begun earlier with the same recipe.

    >>> with MapWriter("maps/mine", {"name": "paper"}) as writer:  # doctest: +SKIP
    ...     if id not in writer.done:
    ...         writer.add(id, question, answer, words, maps, sos)

    `done` holds the ids that are already on disk, from whatever process or earlier run, less those to `remake`. Several
    processes may write to one folder at once under different `rank`s; a second writer of the same rank is refused.
    """

    def __init__(self, path: str | Path, recipe: dict[str, Any], shard_size: int = 512, rank: int = 0):
        self.path, self.shard_size, self.rank = Path(path), shard_size, rank
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path / f".writing-r{rank:03d}", rank)
        try:
            # What a killed run left half written.
            for leftover in self.path.glob(f".tmp-r{rank:03d}-*"):
                leftover.unlink()
            _check_recipe(self.path / "recipe.json", recipe, self._aside("recipe.json"))
            # Id ─► the shard it stands in.
            with self._no_other_rewrites():
                self._home = {id: shard for shard in shard_files(self.path) for id in read_ids(shard)}
        except BaseException:
            self.close()
            raise
        self.done = set(self._home)
        # The rows that are to go when their new ones are there.
        self._outdated: set[str] = set()
        mine = sorted(self.path.glob(f"maps-r{rank:03d}-*.parquet"))
        self._next = int(mine[-1].stem.split("-")[-1]) + 1 if mine else 0
        self._rows: list[dict[str, Any]] = []

    def remake(self, ids: Collection[str]) -> None:
        """Count these rows as not done, because they were made from something else than what their ids now stand for.

        An old row goes just before the shard with its new one is written, so no id ever stands twice; rows that got no new one go
        when the run ends. If it is killed, those left are found again.
        """
        self._outdated |= self.done.intersection(ids)
        self.done -= self._outdated

    def add(
        self,
        id: str,
        question: str,
        answer: str,
        words: Sequence[Word],
        maps: Float[Tensor, "w g g"],
        sos: float,
        digest: str = "",
    ) -> None:
        """Keep one example; every `shard_size` of them become a shard. `digest`: `data.picture_digest` of its picture."""
        if tuple(maps.shape) != (len(words), MAP_SIDE, MAP_SIDE):
            raise ValueError(f"{id}: maps must be [{len(words)}, {MAP_SIDE}, {MAP_SIDE}], got {list(maps.shape)}")
        flat = torch.as_tensor(maps).detach().to("cpu", torch.float16).flatten().numpy()
        row = {"id": id, "question": question, "answer": answer, "words": [word._asdict() for word in words]}
        self._rows.append(row | {"maps": flat, "sos": float(sos), "digest": digest})
        if len(self._rows) >= self.shard_size or sum(row["maps"].nbytes for row in self._rows) >= MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows held as one shard: aside, onto the disk, then under its name."""
        if not self._rows:
            return
        ids = {row["id"] for row in self._rows}
        self._drop(self._outdated & ids)
        shard = self.path / f"maps-r{self.rank:03d}-{self._next:05d}.parquet"
        write_rows(shard, self._rows, self._aside(shard.name))
        self._next += 1
        self.done |= ids
        self._rows = []

    def _drop(self, ids: set[str]) -> None:
        """Take outdated rows off the disk."""
        if ids:
            with self._no_other_rewrites():
                for shard in sorted({self._home[id] for id in ids}):
                    drop_rows(shard, ids, self._aside(shard.name))
            self._outdated -= ids

    def _aside(self, name: str) -> Path:
        return self.path / f".tmp-r{self.rank:03d}-{name}"

    @contextlib.contextmanager
    def _no_other_rewrites(self) -> Iterator[None]:
        """Waits until no other process takes rows out of the shards here. Of two at once, one would bring back the other's."""
        with open(self.path / ".rewriting", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> "MapWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # If the run is stopped by hand or by an error elsewhere, the finished rows are still worth keeping. A disk that
            # was full is not worth a second try.
            if kind is None or not issubclass(kind, OSError):
                self.flush()
            if kind is None:
                self._drop(self._outdated)
        finally:
            self.close()


def entropy(maps: Float[Tensor, "w g g"]) -> Float[Tensor, " w"]:
    """How spread out each map is, in nats: 0 for a single cell, ln(g²) = 6.93 for an even 32×32 map."""
    share = maps.flatten(1) / maps.flatten(1).sum(1, keepdim=True).clamp(min=1e-30)
    return -torch.special.xlogy(share, share).sum(1)


MAX_ENTROPY = math.log(MAP_SIDE**2)


# ---- files ----------------------------------------------------------------------------------------------------------


def shard_files(path: Path) -> list[Path]:
    return sorted(path.glob("maps-*.parquet"))


def read_recipe(path: Path) -> dict[str, Any]:
    file = path / "recipe.json"
    if not file.is_file():
        raise FileNotFoundError(f"no attention maps in {path}: there is no recipe.json; run extract.py first")
    return dict(failing.read_json(file, RecipeFile))


def _check_recipe(file: Path, recipe: dict[str, Any], aside: Path) -> None:
    """Write the recipe into a new store, or compare it with the one that is there.

    Whatever stands under "made_with" (versions, machine) is kept for the record and may differ.
    """
    # As it will be read back: tuples become lists.
    recipe = json.loads(json.dumps(recipe))
    if not file.exists():
        if shard_files(file.parent):
            raise ValueError(f"{file} is missing, but its folder holds map shards: choose another --maps folder")
        with written_aside(file, aside):
            aside.write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
        return
    stored = read_recipe(file.parent)
    keys = [key for key in stored | recipe if key != "made_with" and stored.get(key) != recipe.get(key)]
    if keys:
        changes = ", ".join(f"{key}: {stored.get(key)!r} there, {recipe.get(key)!r} now" for key in keys)
        raise ValueError(f"{file} was made with another recipe ({changes}): choose another --maps folder")


def _lock(file: Path, rank: int) -> TextIO:
    """Lock a file; the lock lasts until the file is closed or the process ends, however it ends."""
    handle = open(file, "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise ValueError(
            f"another process is already writing to {file.parent} as rank {rank}: wait for it, or choose another --maps"
        ) from None
    return handle
