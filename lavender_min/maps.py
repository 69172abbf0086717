"""The attention-map store: what stage 1 leaves on disk and stage 2 trains on.

A store is a folder:

    recipe.json                  how the maps were made; every shard here was made that way
    maps-r000-00000.parquet      shard 0 of process 0: up to `shard_size` rows, one row an example
    maps-r000-00001.parquet      ...

A row holds id, question, answer, words (text, field, start, end), maps (float16, flattened from [w, 32, 32], raw
probabilities) and sos (the share of attention the start-of-text token took). The shards are ordinary Parquet:
`datasets.load_dataset("parquet", data_files="maps/flickr30k/*.parquet")` reads them.

A shard is written aside, flushed to the disk, and only then given its name, so a shard that is there is whole: a run
killed at any moment loses at most the rows it had not yet written. Its footer lists its ids, so opening a store reads
footers only, and one row is fetched by reading the small row group it lies in, in constant memory.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from lavender_min.geometry import MAP_SIDE
from lavender_min.words import Word

ROWS_PER_GROUP = 3  # rows read together for one random access, about 75 kB: fewer is faster, but lengthens footers
OPEN_SHARDS = 256  # an open shard costs its footer, about 1.4 MB
_IDS = b"lavender_ids"  # footer entry: the shard's ids in row order, as JSON
_WORD = pa.struct([("text", pa.string()), ("field", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("words", pa.list_(_WORD)),
        ("maps", pa.list_(pa.float16())),
        ("sos", pa.float32()),
    ]
)


class StoredMaps(NamedTuple):
    """One row of a store."""

    question: str
    answer: str
    words: list[Word]
    maps: Float[Tensor, "w g g"]  # float32, raw probabilities
    sos: float


class MapStore:
    """Read a store: `len(store)`, `store.ids`, `id in store`, `store[id]`, `store.recipe`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "recipe.json").is_file():
            raise FileNotFoundError(f"no attention maps in {self.path}: there is no recipe.json; run extract.py first")
        self.recipe = _read_recipe(self.path / "recipe.json")
        self._shards = _shards(self.path)
        self._place: dict[str, tuple[int, int]] = {}  # id ─► (shard, row); the first wins
        for number, shard in enumerate(self._shards):
            for row, id in enumerate(_read_ids(shard)):
                self._place.setdefault(id, (number, row))
        self._open: dict[int, pq.ParquetFile] = {}

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, id: object) -> bool:
        return id in self._place

    @property
    def ids(self) -> list[str]:
        return list(self._place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __getitem__(self, id: str) -> StoredMaps:
        if id not in self._place:
            raise KeyError(f"{self.path} has no maps for id {id!r} (it holds {len(self)} examples)")
        shard, row = self._place[id]
        try:
            file = self._file(shard)
            group = file.read_row_group(row // ROWS_PER_GROUP, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _broken(self._shards[shard], error) from error
        row = row % ROWS_PER_GROUP
        values = group["maps"].chunk(0)[row].values.to_numpy()  # a view of this row's float16 values
        return StoredMaps(
            question=group["question"][row].as_py(),
            answer=group["answer"][row].as_py(),
            words=[Word(**word) for word in group["words"][row].as_py()],
            maps=torch.from_numpy(values.astype(np.float32)).view(-1, MAP_SIDE, MAP_SIDE),
            sos=group["sos"][row].as_py(),
        )

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = pq.ParquetFile(self._shards[shard], memory_map=True)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # open files do not travel to DataLoader workers


class MapWriter:
    """Add rows to a store, new or begun earlier with the same recipe.

    >>> with MapWriter("maps/mine", {"name": "paper"}) as writer:  # doctest: +SKIP
    ...     if id not in writer.done:
    ...         writer.add(id, question, answer, words, maps, sos)

    `done` holds the ids that are already on disk, from whatever process or earlier run. Several processes may write to
    one folder at once under different `rank`s; a second writer of the same rank is refused.
    """

    def __init__(self, path: str | Path, recipe: dict[str, Any], shard_size: int = 512, rank: int = 0):
        self.path, self.shard_size, self.rank = Path(path), shard_size, rank
        self.path.mkdir(parents=True, exist_ok=True)
        _check_recipe(self.path / "recipe.json", recipe)
        self._lock = _lock(self.path / f".writing-r{rank:03d}", rank)
        try:
            for leftover in self.path.glob(f".tmp-r{rank:03d}-*"):  # of a run that was killed
                leftover.unlink()
            self.done = {id for shard in _shards(self.path) for id in _read_ids(shard)}
        except BaseException:
            self.close()
            raise
        mine = sorted(self.path.glob(f"maps-r{rank:03d}-*.parquet"))
        self._next = int(mine[-1].stem.split("-")[-1]) + 1 if mine else 0
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        id: str,
        question: str,
        answer: str,
        words: Sequence[Word],
        maps: Float[Tensor, "w g g"],
        sos: float,
    ) -> None:
        """Keep one example; every `shard_size` of them become a shard."""
        if tuple(maps.shape) != (len(words), MAP_SIDE, MAP_SIDE):
            raise ValueError(f"{id}: maps must be [{len(words)}, {MAP_SIDE}, {MAP_SIDE}], got {list(maps.shape)}")
        flat = torch.as_tensor(maps).detach().to("cpu", torch.float16).flatten().numpy()
        row = {"id": id, "question": question, "answer": answer, "words": [word._asdict() for word in words]}
        self._rows.append(row | {"maps": flat, "sos": float(sos)})
        if len(self._rows) >= self.shard_size:
            self.flush()

    def flush(self) -> None:
        """Write the rows held as one shard: aside, onto the disk, then under its name."""
        if not self._rows:
            return
        ids = [row["id"] for row in self._rows]
        stops = np.cumsum([0] + [len(row["maps"]) for row in self._rows], dtype=np.int32)
        values = np.concatenate([row["maps"] for row in self._rows])
        columns = {name: [row[name] for row in self._rows] for name in _SCHEMA.names if name != "maps"}
        arrays = [
            pa.ListArray.from_arrays(pa.array(stops), pa.array(values, pa.float16()))
            if field.name == "maps"
            else pa.array(columns[field.name], field.type)
            for field in _SCHEMA
        ]
        table = pa.Table.from_arrays(arrays, schema=_SCHEMA.with_metadata({_IDS: json.dumps(ids).encode()}))
        name = f"r{self.rank:03d}-{self._next:05d}.parquet"
        with _written_aside(self.path / f"maps-{name}", self.path / f".tmp-{name}") as aside:
            # Maps are noise to a compressor and never searched: store them as they are.
            pq.write_table(
                table,
                aside,
                row_group_size=ROWS_PER_GROUP,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
            )
        self._next += 1
        self.done.update(ids)
        self._rows = []

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # Stopped by hand or by an error elsewhere, the finished rows are still worth keeping; a full disk is not
            # worth a second try.
            if kind is None or not issubclass(kind, OSError):
                self.flush()
        finally:
            self.close()


def entropy(maps: Float[Tensor, "w g g"]) -> Float[Tensor, " w"]:
    """How spread out each map is, in nats: 0 for a single cell, ln(g²) = 6.93 for an even 32×32 map."""
    share = maps.flatten(1) / maps.flatten(1).sum(1, keepdim=True).clamp(min=1e-30)
    return -torch.special.xlogy(share, share).sum(1)


MAX_ENTROPY = math.log(MAP_SIDE**2)


# ---- files ----------------------------------------------------------------------------------------------------------


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("maps-*.parquet"))


def _broken(shard: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"broken map shard {shard}: {reason}; delete that file and run extract.py again to remake it")


def _read_ids(shard: Path) -> list[str]:
    """The ids of a shard, in row order, from its footer alone."""
    try:
        footer = pq.read_metadata(shard)
        ids = json.loads(footer.metadata[_IDS])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(shard, error) from error
    if len(ids) != footer.num_rows:
        raise _broken(shard, ValueError(f"{footer.num_rows} rows but {len(ids)} ids"))
    return ids


def _read_recipe(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error


def _check_recipe(file: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe into a new store, or compare it with the one that is there.

    Whatever stands under "made_with" (versions, machine) is kept for the record and may differ.
    """
    recipe = json.loads(json.dumps(recipe))  # as it will be read back: tuples become lists
    if not file.exists():
        if _shards(file.parent):
            raise ValueError(f"{file} is missing, but its folder holds map shards: choose another --maps folder")
        with _written_aside(file, file.with_name(f".tmp-recipe-{os.getpid()}")) as aside:
            aside.write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
        return
    stored = _read_recipe(file)
    keys = [key for key in stored | recipe if key != "made_with" and stored.get(key) != recipe.get(key)]
    if keys:
        changes = ", ".join(f"{key}: {stored.get(key)!r} there, {recipe.get(key)!r} now" for key in keys)
        raise ValueError(f"{file} was made with another recipe ({changes}): choose another --maps folder")


@contextlib.contextmanager
def _written_aside(file: Path, aside: Path) -> Iterator[Path]:
    """Yield a path to write to; afterwards it stands, whole and on the disk, under `file`, or not at all."""
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {file}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def _lock(file: Path, rank: int) -> Any:
    """Hold a file that only one process can hold; the system lets go of it when the process ends, however it ends."""
    handle = open(file, "w")  # noqa: SIM115 (held until the writer closes)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise ValueError(
            f"another process is already writing to {file.parent} as rank {rank}: wait for it, or choose another --maps"
        ) from None
    return handle
