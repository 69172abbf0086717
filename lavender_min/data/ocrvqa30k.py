"""OCRVQA30k: 30,000 book covers of OCR-VQA with questions about them, in one of two forms:

    ocrvqa30k.json.gz     the paper's authors': [{"id", "image", "conversations": [{"role", "content"}, …]}, …] (or .json);
                          the pictures lie in imgs/, images/ or beside it: the folder they were in is a placeholder there
    *.parquet             the_cauldron's ocrvqa: images [one], texts [{user, assistant, source}, …]; its first 30,000 rows

They are the same covers in the same order, and an example has the same id in both.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from typing_extensions import TypedDict

from lavender_min.data import Example, check_captions, conversations, parquet
from lavender_min.data.pictures import open_image, picture_folder
from lavender_min.data.texts import Text, keep
from lavender_min.failing import shaped

FILES = ("ocrvqa30k.json.gz", "ocrvqa30k.json")
IMAGE_FOLDERS = ("imgs", "images", ".")
COVERS = 30_000


class Turn(TypedDict):
    user: Text | None
    assistant: Text | None


class Texts(TypedDict):
    texts: list[Turn] | None


class Cover(NamedTuple):
    where: str
    id: str
    image: Callable[[], Image.Image]
    # (question, answer) for each turn of the conversation.
    turns: list[tuple[str, str]]


def load(root: Path, captions: str = "all") -> list[Example]:
    """One example a question; its id is "<number of the cover>#<number of the question>".

    `captions`: "all" questions of a cover (146,000 in all), or the "first", which nearly always asks who wrote the book.
    """
    check_captions(captions)
    if path := next((root / name for name in FILES if (root / name).is_file()), None):
        covers = _from_json(path)
    elif files := parquet.find(root):
        rows = parquet.read(files, "images", ("texts",), rows=COVERS)
        covers = keep(((row.where, (number, row)) for number, row in enumerate(rows)), _from_row)
    else:
        raise FileNotFoundError(
            f"no OCRVQA30k in {root}: looked for {' and '.join(FILES)}, and for the_cauldron's Parquet; pass --data_root, "
            "or have it downloaded (--data_root HuggingFaceM4/the_cauldron), or try --data toy"
        )
    return [
        Example(f"{cover.id}#{number}", cover.image, question, answer, picture=cover.id, where=cover.where)
        for cover in covers
        for number, (question, answer) in enumerate((cover.turns or [("", "")])[: 1 if captions == "first" else None])
    ]


def _from_json(path: Path) -> list[Cover]:
    told = conversations.read(path, "the authors' list of conversations")
    names = [Path(one.image).name for one in told]
    folder = picture_folder(path.parent, IMAGE_FOLDERS, names[:100])
    return [
        Cover(one.where, one.id, partial(open_image, folder / name), one.turns)
        for one, name in zip(told, names, strict=True)
    ]


def _from_row(numbered: tuple[int, parquet.Row], where: str) -> Cover:
    number, row = numbered
    turns: Any = shaped(row.texts, Texts, where)["texts"] or []
    told = [((turn["user"] or "").strip(), (turn["assistant"] or "").strip()) for turn in turns]
    return Cover(where, str(number), row.image, told)
