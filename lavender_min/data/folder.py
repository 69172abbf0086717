"""Data of one's own: a JSONL file, one example a line, with the pictures wherever the lines say.

    {"image": "dogs/1.jpg", "text": "Two dogs run."}
    {"image": "dogs/1.jpg", "question": "How many dogs?", "answer": "two"}

`--data_root` is the file, or a folder that holds `data.jsonl`. Picture paths are relative to the file. An "id" may be
given; otherwise it is "<image>#<line>".
"""

import json
from functools import partial
from pathlib import Path

from lavender_min.data import Example, open_image

FILE = "data.jsonl"


def load(root: Path) -> list[Example]:
    path = root / FILE if root.is_dir() else root
    if not path.is_file():
        raise FileNotFoundError(
            f'no data in {root}: looked for {path}, with lines such as {{"image": "1.jpg", "text": "Two dogs run."}}; '
            "pass --data_root, or try --data toy"
        )
    examples = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                examples.append(_example(line, path, number))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def _example(line: str, path: Path, number: int) -> Example:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        question, answer = ("", row["text"]) if "text" in row else (row["question"], row["answer"])
        image = row["image"]
        if not all(isinstance(value, str) for value in (image, question, answer)):
            raise ValueError("image and texts must be strings")
    except KeyError as error:
        raise ValueError(
            f"{path}, line {number}: {error} is missing; a line has image and text, or image, question and answer"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    return Example(str(row.get("id", f"{image}#{number}")), partial(open_image, path.parent / image), question, answer)
