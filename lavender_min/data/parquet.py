"""Parquet copies of a data set: the texts at once, a picture only when it is asked for.

Of a Parquet file only whole row groups can be read, and in these copies a group may be a gigabyte of pictures. So `datasets`
turns the files once into Arrow, in its cache (~/.cache/huggingface/datasets: as much disk again), which is mapped into
memory: any row in any order, from any thread or process, and no more held than the pictures in hand.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lavender_min.data import open_image


def find(root: Path) -> list[Path]:
    """The Parquet files under a folder, or the one file it is, by name: the order of the rows."""
    return [root] if root.is_file() else sorted(root.rglob("*.parquet"))


def check(file: Path, columns: Sequence[str]) -> pq.FileMetaData:
    """The footer of a Parquet file that is whole and has these columns; else ValueError, naming the file."""
    try:
        footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is missing or not a whole Parquet file: fetch it again ({error})") from error
    names = footer.schema.to_arrow_schema().names
    if missing := [column for column in columns if column not in names]:
        raise ValueError(f"{file}: expected a column {missing[0]!r}; it has {', '.join(names)}")
    return footer


def read(
    files: Sequence[Path], columns: Sequence[str], optional: Sequence[str] = (), rows: float = float("inf")
) -> Any:
    """A table (`datasets.table.Table`) of these columns, and of the `optional` ones that every file has.

    Of many files, only the first that together have `rows` rows.
    """
    from datasets import Dataset  # slow to import, and nothing else needs it
    from datasets.exceptions import DatasetGenerationError

    wanted: list[str] = []
    taken, count = {*columns, *optional}, 0
    for file in files:
        footer = check(file, columns)
        wanted.append(str(file))
        taken.intersection_update(footer.schema.to_arrow_schema().names)
        count += footer.num_rows
        if count >= rows:
            break
    try:
        return Dataset.from_parquet(wanted, columns=sorted(taken), batch_size=256).data
    except DatasetGenerationError as error:
        raise ValueError(
            f"{files[0].parent}: {' '.join(str(error.__cause__).split())}: fetch the file again"
        ) from error


def open_cell(table: Any, column: str, row: int) -> Image.Image:
    """The picture of a cell, {bytes, path} or a list of such, of which the first is taken."""
    cell = table.column(column)[row].as_py()
    for picture in cell if isinstance(cell, list) else [cell]:
        if picture and picture["bytes"]:
            return open_image(BytesIO(picture["bytes"]))
    raise ValueError(f"row {row} holds no picture")
