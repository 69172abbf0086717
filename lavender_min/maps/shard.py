"""One shard of a map store: the Parquet file, how a row is found in it, and how it is written.

The layout follows from what it costs to read one row. Parquet reads a whole group of rows at once: with 8 words a row that
takes 0.2 ms for groups of 3 rows and 1.5 ms for groups of 32, nearly all of it for the maps. Small groups, on the other hand,
make long footers: held open, those of 100,000 rows take 290 MB in groups of 3 and 31 MB in groups of 32. So groups are of 32
rows, and only the texts are read through Parquet (0.06 ms). The maps are stored uncompressed, those of a group in one page.
Their values are then the last bytes of the group's column. Where those of one row begin follows from the number of words
before it, so just these bytes are read. To every other reader the file is ordinary Parquet.

Files are read, not memory-mapped. So what was read does not stay in the process; forked workers may share a handle, as each
read carries its own position; and a file that is cut short meanwhile is an error, where a mapped one would end the process.
They are opened as files, never by name alone, in which Arrow would take `flickr:v2` for a URI.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from lavender_min import failing
from lavender_min.geometry import MAP_SIDE
from lavender_min.words import Word

ROWS_PER_GROUP = 32

# Of one map: cells, and bytes in float16.
CELLS = MAP_SIDE**2
MAP_BYTES = CELLS * 2

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
        ("digest", pa.string()),
        ("maps", pa.list_(pa.float16())),
    ]
)


class Origin(NamedTuple):
    """What the maps of a row were made from."""

    question: str
    answer: str
    # `data.picture_digest` of the picture. "": not known, as in a store of an earlier version.
    digest: str


class StoredMaps(NamedTuple):
    """One row of a store."""

    question: str
    answer: str
    words: list[Word]
    # The probabilities that were recorded, in float32.
    maps: Float[Tensor, "w g g"]
    # The share of attention that the start-of-text token took.
    sos: float


def naming(shard: Path) -> contextlib.AbstractContextManager[None]:
    """Whatever reading a shard raises becomes one line that names it."""
    return failing.naming(f"broken map shard {shard}", "delete that file and run extract.py again to remake it")


class Shard:
    """One shard, held open: `shard[row]` reads one row, counted from 0 in the shard, and `shard.ids[row]` is its id."""

    def __init__(self, path: Path):
        self._source = pa.OSFile(str(path))
        self._file = pq.ParquetFile(self._source, pre_buffer=False)
        footer = self._file.metadata
        self.ids = footer_ids(footer)
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
        # Where each row's words begin among the group's.
        bounds = words.offsets.to_numpy()
        start, stop, last = (int(bounds[i]) for i in (row, row + 1, -1))
        # An empty list counts as one value.
        cells = column.num_values - int((np.diff(bounds) == 0).sum())
        if cells != last * CELLS:
            raise ValueError(f"its rows have {cells / CELLS:g} maps for {last} words")
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


def footer_ids(footer: pq.FileMetaData) -> list[str]:
    """The ids of a shard in row order. Raises ValueError if they, or a column, are not there or of another type.

    Shards of earlier versions have no digest.
    """
    there = footer.schema.to_arrow_schema()
    for field in _SCHEMA:
        if field.name not in there.names:
            if field.name != "digest":
                raise ValueError(f"it has no column {field.name!r}")
        elif there.field(field.name).type != field.type:
            raise ValueError(f"expected {field.name} as {field.type}; got {there.field(field.name).type}")
    ids = json.loads((footer.metadata or {}).get(_IDS, b"[]"))
    if not isinstance(ids, list) or len(ids) != footer.num_rows or not all(isinstance(id, str) for id in ids):
        raise ValueError(f"its footer does not list the ids of its {footer.num_rows} rows")
    return ids


def read_ids(shard: Path) -> list[str]:
    """The ids of a shard, in row order, from its footer alone."""
    with naming(shard), pa.OSFile(str(shard)) as source:
        return footer_ids(pq.read_metadata(source))


def read_origins(shard: Path) -> dict[str, Origin]:
    """What each row of a shard was made from, by id, without reading a map."""
    with naming(shard), pa.OSFile(str(shard)) as source:
        table = pq.ParquetFile(source).read(["id", *Origin._fields], use_threads=False)
        if "digest" not in table.column_names:
            table = table.append_column("digest", pa.array([""] * len(table)))
        if empty := [name for name in table.column_names if table[name].null_count]:
            raise ValueError(f"a row has no {empty[0]}: delete the shard and extract again")
        columns = (table[name].to_pylist() for name in Origin._fields)
        return dict(zip(table["id"].to_pylist(), map(Origin, *columns), strict=True))


def read_through(shard: Path) -> None:
    """Raises ValueError, naming the shard, if a byte of it has changed since it was written: its pages carry checksums."""
    with naming(shard), pa.OSFile(str(shard)) as source:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        for group in range(file.num_row_groups):
            file.read_row_group(group, use_threads=False)


def write_rows(shard: Path, rows: Sequence[dict[str, Any]], aside: Path) -> None:
    """Rows, with a column's value under its name, as a new shard; the maps are flat float16 arrays."""
    stops = np.cumsum([0] + [len(row["maps"]) for row in rows], dtype=np.int32)
    values = np.concatenate([row["maps"] for row in rows])
    arrays = [
        pa.ListArray.from_arrays(pa.array(stops), pa.array(values, pa.float16()))
        if field.name == "maps"
        else pa.array([row[field.name] for row in rows], field.type)
        for field in _SCHEMA
    ]
    _write(shard, pa.Table.from_arrays(arrays, schema=_SCHEMA), aside)


def drop_rows(shard: Path, ids: Collection[str], aside: Path) -> None:
    """Write a shard anew without the rows of these ids; a shard with no other rows is deleted."""
    with naming(shard), pa.OSFile(str(shard)) as source:
        table = pq.ParquetFile(source).read()
    kept = table.filter([id not in ids for id in table["id"].to_pylist()])
    if len(kept):
        _write(shard, kept.combine_chunks(), aside)
    else:
        shard.unlink()


def _write(shard: Path, table: pa.Table, aside: Path) -> None:
    table = table.replace_schema_metadata({_IDS: json.dumps(table["id"].to_pylist()).encode()})
    with written_aside(shard, aside), pa.OSFile(str(aside), "wb") as sink:
        # Maps cannot be compressed and are never searched. So they are stored as they are, a group's in one page.
        pq.write_table(
            table,
            sink,
            row_group_size=ROWS_PER_GROUP,
            data_page_size=2**30,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )


@contextlib.contextmanager
def written_aside(file: Path, aside: Path) -> Iterator[None]:
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
