"""Data of one's own, in one of two forms:

    data.jsonl     one example a line; picture paths are relative to the file:
                   {"image": "dogs/1.jpg", "text": "Two dogs run."}
                   {"image": "dogs/1.jpg", "question": "How many dogs?", "answer": "two"}
    1.jpg 1.txt    a caption beside each picture, in any subfolders; a picture without one is left alone

`--data_root` is the folder, or the JSONL file. A line may give an "id"; otherwise it is "<image>#<line>". Beside pictures
it is the picture's path in the folder.
"""

import json
from functools import partial
from pathlib import Path

from PIL import Image

from lavender_min.data import Example
from lavender_min.data.pictures import open_image

FILE = "data.jsonl"


def load(root: Path) -> list[Example]:
    path = root / FILE if root.is_dir() else root
    if path.is_file():
        with open(path, encoding="utf-8") as lines:
            examples = [_example(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
        if not examples:
            raise ValueError(f"{path} holds no examples")
        return examples
    if examples := _beside_pictures(root):
        return examples
    raise FileNotFoundError(
        f'no data in {root}: looked for {path}, with lines such as {{"image": "1.jpg", "text": "Two dogs run."}}, and for '
        "pictures with a caption beside them (1.jpg, 1.txt); pass --data_root, or try --data toy"
    )


def _beside_pictures(root: Path) -> list[Example]:
    kinds = Image.registered_extensions()
    pictures = [file for file in sorted(root.rglob("*")) if file.suffix.lower() in kinds]
    return [
        Example(picture.relative_to(root).as_posix(), partial(open_image, picture), "", text.read_text("utf-8").strip())
        for picture in pictures
        if (text := picture.with_suffix(".txt")).is_file()
    ]


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
    id = str(row.get("id", f"{image}#{number}"))
    return Example(id, partial(open_image, path.parent / image), question, answer, picture=image)
