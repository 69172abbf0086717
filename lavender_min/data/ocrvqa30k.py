"""OCRVQA30k: 30,000 book covers of OCR-VQA with questions about them, in one of two forms:

    ocrvqa30k.json.gz     the paper's authors': [{"id", "image", "conversations": [{"role", "content"}, …]}, …] (or .json);
                          the pictures lie in imgs/, images/ or beside it: the folder they were in is a placeholder there
    *.parquet             the_cauldron's ocrvqa: images [one], texts [{user, assistant, source}, …]; its first 30,000 rows

They are the same covers in the same order, and an example has the same id in both.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lavender_min.data import Example, parquet
from lavender_min.data.pictures import open_image, picture_folder

FILES = ("ocrvqa30k.json.gz", "ocrvqa30k.json")
IMAGE_FOLDERS = ("imgs", "images", ".")
COVERS = 30_000


class Cover(NamedTuple):
    id: str
    image: Callable[[], Image.Image]
    # (question, answer) for each turn of the conversation.
    turns: list[tuple[str, str]]


def load(root: Path, captions: str = "all") -> list[Example]:
    """One example a question; its id is "<number of the cover>#<number of the question>".

    `captions`: "all" questions of a cover (146,000 in all), or the "first", which nearly always asks who wrote the book.
    """
    if captions not in ("first", "all"):
        raise ValueError(f"--captions must be first or all; got {captions!r}")
    if path := next((root / name for name in FILES if (root / name).is_file()), None):
        covers = _from_json(path)
    elif files := parquet.find(root):
        covers = _from_parquet(files)
    else:
        raise FileNotFoundError(
            f"no OCRVQA30k in {root}: looked for {' and '.join(FILES)}, and for the_cauldron's Parquet; pass --data_root, "
            "or have it downloaded (--data_root HuggingFaceM4/the_cauldron), or try --data toy"
        )
    return [
        Example(f"{id}#{number}", image, question.removeprefix("<image>").strip(), answer.strip(), picture=id)
        for id, image, turns in covers
        for number, (question, answer) in enumerate((turns or [("", "")])[: 1 if captions == "first" else None])
    ]


def _from_json(path: Path) -> Iterable[Cover]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            rows = json.load(file)
        covers = []
        for row in rows:
            said = [turn["content"] for turn in row["conversations"]]
            covers.append((row["id"], Path(row["image"]).name, list(zip(said[::2], said[1::2], strict=True))))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the authors' list of conversations ({type(error).__name__}: {error})"
        ) from error
    folder = picture_folder(path.parent, IMAGE_FOLDERS, [file for _, file, _ in covers[:100]])
    return [Cover(id, partial(open_image, folder / file), turns) for id, file, turns in covers]


def _from_parquet(files: list[Path]) -> Iterable[Cover]:
    for number, (_, row, image) in enumerate(parquet.read(files, "images", ("texts",), rows=COVERS)):
        yield Cover(str(number), image, [(turn["user"] or "", turn["assistant"] or "") for turn in row["texts"] or []])
