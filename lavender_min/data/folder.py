"""Data of one's own, in one of these forms:

    data.jsonl         one example a line; picture paths are relative to the file:
                       {"image": "dogs/1.jpg", "text": "Two dogs run."}
                       {"image": "dogs/1.jpg", "question": "How many dogs?", "answer": "two"}
    metadata.jsonl     Hugging Face's image folder: the same, with "file_name" in place of "image"
    metadata.csv       the same as a table, whose first line names the columns
    1.jpg 1.txt        a caption beside each picture, in any subfolders; a picture without one is left alone
    <name>.json        LLaVA's and ShareGPT's: a list of conversations, each with its "image" (conversations.py)

`--data_root` is the folder, or the file. A row may give an "id"; otherwise it is "<image>#<line>". Beside pictures it is the
picture's path in the folder; of a conversation "<id>#<n>", n counting the questions that share an id.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import TypedDict

from lavender_min.data import Example, check_captions, conversations
from lavender_min.data.pictures import open_image
from lavender_min.data.texts import Text, encodable, json_lines, keep, read_text
from lavender_min.failing import naming, shaped

FILES = ("data.jsonl", "metadata.jsonl", "metadata.csv")


class Row(TypedDict, total=False):
    image: Text
    file_name: Text
    text: Text
    question: Text
    answer: Text
    id: Text | int


def load(root: Path, captions: str = "all") -> list[Example]:
    """`captions`: "all" questions of a conversation, or the "first". Other rows hold one example each."""
    check_captions(captions)
    if path := _file(root):
        if path.suffix == ".json":
            return _conversations(path, captions)
        rows = _table(path) if path.suffix == ".csv" else json_lines(path)
        examples = keep(rows, partial(_example, path.parent))
        if not examples:
            raise ValueError(f"{path} holds no examples")
        return examples
    if examples := _beside_pictures(root):
        return examples
    lists = sorted(file for file in root.glob("*.json") if file.is_file() and _begins_a_list(file))
    if len(lists) > 1:
        raise ValueError(
            f"{root} holds {len(lists)} JSON files ({lists[0].name}, …): pass the right one as --data_root"
        )
    if lists:
        return _conversations(lists[0], captions)
    raise FileNotFoundError(
        f'no data in {root}: looked for {root / FILES[0]}, with lines such as {{"image": "1.jpg", "text": "Two dogs run."}}, '
        f"for {FILES[1]} and {FILES[2]}, for pictures with a caption beside them (1.jpg, 1.txt) and for a list of "
        "conversations (JSON); pass --data_root, or try --data toy"
    )


def _file(root: Path) -> Path | None:
    candidates = [root / name for name in FILES] if root.is_dir() else [root]
    return next((path for path in candidates if path.is_file()), None)


def _begins_a_list(file: Path) -> bool:
    """Whether a JSON file may hold conversations: many folders have one that says something else."""
    return file.read_bytes()[:100].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    with naming(path):
        table = csv.DictReader(io.StringIO(read_text(path), newline=""))
        for row in table:
            # An empty cell is a value that is not there; what goes beyond the header has no name.
            yield f"{path}, line {table.line_num}", {name: value for name, value in row.items() if name and value}


def _example(folder: Path, row: Any, where: str) -> Example:
    # Tables that programs write hold null, or an empty cell, where there is no value.
    if isinstance(row, dict):
        row = {name: value for name, value in row.items() if value is not None}
    row = shaped(row, Row, where)
    image = row.get("image", row.get("file_name"))
    fields = [] if image else ["image"]
    fields += [] if "text" in row else [field for field in ("question", "answer") if field not in row]
    if fields or image is None:
        raise ValueError(f"{where}: {fields[0]!r} is missing; a line has image and text, or image, question and answer")
    question, answer = ("", row["text"]) if "text" in row else (row["question"], row["answer"])
    # The name of a row ends in the number of its line.
    id = str(row.get("id", f"{image}#{where.rpartition(' ')[2]}"))
    return Example(id, partial(open_image, folder / image), question, answer, picture=image, where=where)


def _beside_pictures(root: Path) -> list[Example]:
    kinds = Image.registered_extensions()
    pictures = [file for file in sorted(root.rglob("*")) if file.suffix.lower() in kinds]

    def example(picture: Path, name: str) -> Example:
        with naming(name):
            # A name in bytes that are no UTF-8 can be opened, but not stored.
            id = encodable(picture.relative_to(root).as_posix())
        text = picture.with_suffix(".txt")
        return Example(id, partial(open_image, picture), "", read_text(text).strip(), where=str(text))

    return keep(((str(file), file) for file in pictures if file.with_suffix(".txt").is_file()), example)


def _conversations(path: Path, captions: str) -> list[Example]:
    seen, examples = Counter[str](), []
    for told in conversations.read(path):
        for question, answer in told.turns[: 1 if captions == "first" else None]:
            image = partial(open_image, path.parent / told.image)
            id = f"{told.id}#{seen[told.id]}"
            seen[told.id] += 1
            examples.append(Example(id, image, question, answer, picture=told.image, where=told.where))
    return examples
