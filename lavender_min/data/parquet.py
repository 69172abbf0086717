"""Parquet copies of a data set: the texts at once, a picture only when it is asked for.

Of a Parquet file only whole row groups can be read, and in these copies a group may be a gigabyte of pictures. So `datasets`
turns the files once into Arrow, in its cache (~/.cache/huggingface/datasets: as much disk again), which is mapped into
memory: any row in any order, from any thread or process, and no more held than the pictures in hand.
"""

import glob
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image

from lavender_min.data.pictures import Stored
from lavender_min.failing import naming


def find(root: Path) -> list[Path]:
    """The Parquet files under a folder, or the one file it is, by name: the order of the rows."""
    return [root] if root.is_file() else sorted(file for file in root.rglob("*.parquet") if file.is_file())


def check(file: Path, columns: Sequence[str]) -> list[str]:
    """All columns of a Parquet file; ValueError, naming the file, if it is not whole or lacks one of these."""
    with naming(f"{file} is missing or not a whole Parquet file: fetch it again"):
        if not file.is_file():
            raise ValueError("there is no such file")
        names = pq.read_schema(file).names
    if missing := [column for column in columns if column not in names]:
        raise ValueError(f"{file}: expected a column {missing[0]!r}; it has {', '.join(names)}")
    return names


class Row(NamedTuple):
    """A row of a Parquet copy."""

    # "<file>, row <number>", counted from 0.
    where: str
    # {column: value}
    texts: dict[str, Any]
    image: Callable[[], Image.Image]


def read(
    files: Sequence[Path], picture: str, texts: Sequence[str], optional: Sequence[str] = (), rows: int | None = None
) -> Iterator[Row]:
    """The first `rows` rows, each with what opens the picture of its column `picture`.

    `optional` columns are read if they are there; files that are not needed for `rows` rows are not read.
    """
    # Slow to import, and nothing else needs it.
    from datasets import Dataset, concatenate_datasets
    from datasets.exceptions import DatasetGenerationError

    parts: list[Dataset] = []
    for file in files:
        names = check(file, [picture, *texts])
        wanted = [picture, *texts, *(column for column in optional if column in names)]
        with naming(f"{file} cannot be read: fetch it again"):
            try:
                parts.append(Dataset.from_parquet(glob.escape(str(file)), columns=wanted, batch_size=256))
            except DatasetGenerationError as error:
                # It only says that the making failed; why, its cause says.
                raise error.__cause__ or error from None
        if rows is not None and sum(map(len, parts)) >= rows:
            break
    with naming(f"{files[0]} and the Parquet files beside it do not go together"):
        table = concatenate_datasets(parts).data
    only_texts = table.select([column for column in table.column_names if column != picture])
    places = (f"{file}, row {row}" for file, part in zip(files, parts, strict=False) for row in range(len(part)))
    with naming(f"the texts of {files[0]} and the Parquet files beside it cannot be read"):
        all_values = only_texts.slice(0, rows).to_pylist()
    for row, values in enumerate(all_values):
        where = next(places)
        yield Row(where, values, Stored(partial(cell_bytes, table, picture, row), where))


def cell_bytes(table: Any, column: str, row: int) -> bytes:
    """The picture file of a cell, {bytes, path} or a list of such, of which the first is taken."""
    cell = table.column(column)[row].as_py()
    for picture in cell if isinstance(cell, list) else [cell]:
        if isinstance(picture, dict) and picture.get("bytes"):
            return picture["bytes"]
    raise ValueError("holds no picture")
