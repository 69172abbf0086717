"""The map store on disk: shards, their writer and their reader. `lavender_min.maps` says what a store is.

The layout follows from what one row costs. Read through Parquet, a row costs its whole row group: with 8 words a row, 0.2 ms
for groups of 3 rows and 1.5 ms for groups of 32, nearly all of it for the maps. Small groups, on the other hand, make long
footers: held open, those of 100,000 rows take 290 MB in groups of 3, 31 MB in groups of 32. So groups are of 32 rows and only
the texts come through Parquet (0.06 ms). The maps are stored as they are, in one page a group: the values are the last
bytes of the group's column, where a row's begin follows from the number of words before it, and just those bytes are read.
To every other reader the file is ordinary Parquet.

Files are read, not memory-mapped: what was read does not stay in the process, forked workers may share a handle (each
read carries its own position), and a file that is cut short meanwhile is an error, not a SIGBUS.
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
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from lavender_min.geometry import MAP_SIDE
from lavender_min.words import Word

ROWS_PER_GROUP = 32
OPEN_SHARDS = 256  # kept open, each a file handle and its footer, about 0.16 MB
MAP_BYTES = MAP_SIDE**2 * 2  # float16
_IDS = b"lavender_ids"  # footer entry: the shard's ids in row order, as JSON
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
    maps: Float[Tensor, "w g g"]  # float32, raw probabilities
    sos: float


class Shard:
    """One shard, open: `shard[row]`."""

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
        # One read for all the texts: where the system has none of the file in memory, it then waits for the disk once here.
        self._source.read_at(column.data_page_offset - first.data_page_offset, first.data_page_offset)
        texts = self._file.read_row_group(group, ["question", "answer", "words", "sos"], use_threads=False)
        words = texts["words"].chunk(0)
        start, stop, last = (words.offsets[i].as_py() for i in (row, row + 1, len(words)))  # in words of the group
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

    In memory are the ids (about 20 MB for 100,000) and up to OPEN_SHARDS footers, however many rows are read. A store may
    go to DataLoader workers, forked or spawned.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = read_recipe(self.path)
        self._shards = shard_files(self.path)
        ids = [read_ids(shard) for shard in self._shards]
        self._first = [0, *accumulate(map(len, ids))]  # each shard's first row, rows counted throughout
        self._row: dict[str, int] = {}  # if an id should stand twice, the first wins
        for row, id in enumerate(chain.from_iterable(ids)):
            self._row.setdefault(id, row)
        self._open: dict[int, Shard] = {}  # the one used last stands last

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
        self._lock = _lock(self.path / f".writing-r{rank:03d}", rank)
        try:
            for leftover in self.path.glob(f".tmp-r{rank:03d}-*"):  # of a run that was killed
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
        aside = self.path / f".tmp-{name}"
        with _written_aside(self.path / f"maps-{name}", aside):
            pq.write_table(  # maps are noise to a compressor and never searched: as they are, a group's in one page
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
    recipe = json.loads(json.dumps(recipe))  # as it will be read back: tuples become lists
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
    """What is written to `aside` inside stands afterwards, whole and on the disk, under `file`, or not at all."""
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
        reason = os.strerror(error.errno) if error.errno else error  # Arrow's own wording is longer
        raise OSError(f"cannot write {file}: {reason}") from error
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
