"""The map store on disk: shards, their writer and their reader. `lavender_min.maps` says what a store is.

The layout follows from what it costs to read one row. Parquet reads a whole group of rows at once: with 8 words a row that
takes 0.2 ms for groups of 3 rows and 1.5 ms for groups of 32, nearly all of it for the maps. Small groups, on the other hand,
make long footers: held open, those of 100,000 rows take 290 MB in groups of 3 and 31 MB in groups of 32. So groups are of 32
rows, and only the texts are read through Parquet (0.06 ms). The maps are stored uncompressed, those of a group in one page.
Their values are then the last bytes of the group's column. Where those of one row begin follows from the number of words
before it, so just these bytes are read. To every other reader the file is ordinary Parquet.

Files are read, not memory-mapped. So what was read does not stay in the process; forked workers may share a handle, as each
read carries its own position; and a file that is cut short meanwhile is an error, where a mapped one would end the process.
"""

import contextlib
import fcntl
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from lavender_min.geometry import MAP_SIDE
from lavender_min.words import Word

ROWS_PER_GROUP = 32

# So many shards are kept open: each is a file handle and its footer, about 0.16 MB.
OPEN_SHARDS = 256

# Of one map, in float16.
MAP_BYTES = MAP_SIDE**2 * 2

# The footer's entry with the shard's ids in the order of its rows, as JSON.
_IDS = b"lavender_ids"
_WORD = pa.struct([("text", pa.string()), ("field", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("words", pa.list_(_WORD)),
        ("sos", pa.float32()),
        ("maps", pa.list_(pa.float16())),
    ]
)


class StoredMaps(NamedTuple):
    """One row of a store."""

    question: str
    answer: str
    words: list[Word]
    # The probabilities that were recorded, in float32.
    maps: Float[Tensor, "w g g"]
    # The share of attention that the start-of-text token took.
    sos: float


class Shard:
    """One shard, held open: `shard[row]` reads one row, counted from 0 in the shard."""

    def __init__(self, path: Path):
        self._source = pa.OSFile(str(path))
        self._file = pq.ParquetFile(self._source, pre_buffer=False)
        footer = self._file.metadata
        self._column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path.startswith("maps."))
        self._rows_per_group = footer.row_group(0).num_rows
        column = footer.row_group(0).column(self._column)
        if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
            raise ValueError("another program rewrote it, with compressed maps")

    def __getitem__(self, row: int) -> StoredMaps:
        group, row = divmod(row, self._rows_per_group)
        first, column = (self._file.metadata.row_group(group).column(i) for i in (0, self._column))
        # Read the bytes of all the texts at once, and forget them: the column by column reading below then finds them in the
        # system's cache, so a cold file waits for the disk once and not once a column.
        self._source.read_at(column.data_page_offset - first.data_page_offset, first.data_page_offset)
        texts = self._file.read_row_group(group, ["question", "answer", "words", "sos"], use_threads=False)
        words = texts["words"].chunk(0)
        # Which of the group's words are this row's, and how many there are.
        start, stop, last = (words.offsets[i].as_py() for i in (row, row + 1, len(words)))
        end = column.data_page_offset + column.total_compressed_size
        raw = self._source.read_at((stop - start) * MAP_BYTES, end - (last - start) * MAP_BYTES)
        maps = np.frombuffer(raw, np.float16).astype(np.float32).reshape(stop - start, MAP_SIDE, MAP_SIDE)
        return StoredMaps(
            question=texts["question"][row].as_py(),
            answer=texts["answer"][row].as_py(),
            words=[Word(**word) for word in words[row].as_py()],
            maps=torch.from_numpy(maps),
            sos=texts["sos"][row].as_py(),
        )


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
            return shard[self._row[id] - self._first[number]]

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to DataLoader workers.
        return self.__dict__ | {"_open": {}}


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
        self._lock = _lock(self.path / f".writing-r{rank:03d}", rank)
        try:
            # What a killed run left half written.
            for leftover in self.path.glob(f".tmp-r{rank:03d}-*"):
                leftover.unlink()
            _check_recipe(self.path / "recipe.json", recipe, self.path / f".tmp-r{rank:03d}-recipe.json")
            self.done = {id for shard in shard_files(self.path) for id in read_ids(shard)}
        except BaseException:
            self.close()
            raise
        mine = sorted(self.path.glob(f"maps-r{rank:03d}-*.parquet"))
        self._next = int(mine[-1].stem.split("-")[-1]) + 1 if mine else 0
        self._rows: list[dict[str, Any]] = []

    def add(
        self, id: str, question: str, answer: str, words: Sequence[Word], maps: Float[Tensor, "w g g"], sos: float
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
        aside = self.path / f".tmp-{name}"
        with _written_aside(self.path / f"maps-{name}", aside):
            # Maps cannot be compressed and are never searched. So they are stored as they are, a group's in one page.
            pq.write_table(
                table,
                aside,
                row_group_size=ROWS_PER_GROUP,
                data_page_size=2**30,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
        self._next += 1
        self.done.update(ids)
        self._rows = []

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


@contextlib.contextmanager
def naming(shard: Path) -> Iterator[None]:
    """Whatever reading a shard raises becomes one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"broken map shard {shard}: {reason}; delete that file and run extract.py again to remake it"
        ) from error


def read_ids(shard: Path) -> list[str]:
    """The ids of a shard, in row order, from its footer alone."""
    with naming(shard):
        footer = pq.read_metadata(shard)
        ids = json.loads(footer.metadata[_IDS])
        if len(ids) != footer.num_rows:
            raise ValueError(f"{footer.num_rows} rows but {len(ids)} ids")
        return ids


def read_recipe(path: Path) -> dict[str, Any]:
    file = path / "recipe.json"
    if not file.is_file():
        raise FileNotFoundError(f"no attention maps in {path}: there is no recipe.json; run extract.py first")
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error


def _check_recipe(file: Path, recipe: dict[str, Any], aside: Path) -> None:
    """Write the recipe into a new store, or compare it with the one that is there.

    Whatever stands under "made_with" (versions, machine) is kept for the record and may differ.
    """
    # As it will be read back: tuples become lists.
    recipe = json.loads(json.dumps(recipe))
    if not file.exists():
        if shard_files(file.parent):
            raise ValueError(f"{file} is missing, but its folder holds map shards: choose another --maps folder")
        with _written_aside(file, aside):
            aside.write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
        return
    stored = read_recipe(file.parent)
    keys = [key for key in stored | recipe if key != "made_with" and stored.get(key) != recipe.get(key)]
    if keys:
        changes = ", ".join(f"{key}: {stored.get(key)!r} there, {recipe.get(key)!r} now" for key in keys)
        raise ValueError(f"{file} was made with another recipe ({changes}): choose another --maps folder")


@contextlib.contextmanager
def _written_aside(file: Path, aside: Path) -> Iterator[None]:
    """Inside this `with`, write to `aside`; afterwards `file` holds it, whole and on the disk. If that fails, nothing is left."""
    try:
        yield
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        # Arrow's own wording is longer.
        reason = os.strerror(error.errno) if error.errno else error
        raise OSError(f"cannot write {file}: {reason}") from error
    finally:
        aside.unlink(missing_ok=True)


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
