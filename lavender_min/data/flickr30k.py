"""Flickr30k: 31,783 photographs with five captions each.

The folder holds the pictures and at least one of these caption files, as they are distributed (the first that is there is read):

    dataset_flickr30k.json     Karpathy's: {"images": [{"filename", "split", "sentences": [{"raw"}, …]}, …]}
    results_20130124.token     "<file>.jpg#<0…4>\t<caption>" a line; the authors' own, without splits
    results.csv                "<file>.jpg| <0…4>| <caption>" a line below a header; Kaggle's, also in flickr30k_images/
    flickr30k.json.gz          the split of Lavender's authors, beside their OCRVQA list (or .json), read as that list is

or a Parquet copy: image {bytes, path}, caption [five], filename and, if it knows them, Karpathy's split. Ids are the same
in all. Two copies are on the hub: nlphuji/flickr30k, and lmms-lab/flickr30k, which does not name the splits.

With `--entities`, the folder of Flickr30k Entities, the words of phrases have regions (entities.py).

What flickr30k.json.gz holds could not be seen when this was written. A file that has the layout of Karpathy's is read so.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from PIL import Image
from typing_extensions import TypedDict

from lavender_min.data import CAPTION_PROMPT, Example, check_captions, conversations, parquet
from lavender_min.data.entities import with_regions
from lavender_min.data.pictures import open_image, picture_folder
from lavender_min.data.texts import Text, keep, lines, numbered, read_json
from lavender_min.failing import shaped

KARPATHY = "dataset_flickr30k.json"
TOKENS = "results_20130124.token"
KAGGLE = ("results.csv", "flickr30k_images/results.csv")
PUBLISHED = ("flickr30k.json.gz", "flickr30k.json")
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images", ".")

TOKEN_LINE = re.compile(r"(?P<file>.*)#(?P<index>[0-9]{1,9})\t(?P<text>.*)")
# In one line of Kaggle's file, 2199200615.jpg's, the second bar is missing.
KAGGLE_LINE = re.compile(r"(?P<file>[^|]+)\|\s*(?P<index>[0-9]{1,9})\s*(?:\||\s)(?P<text>.*)")


class Sentence(TypedDict):
    raw: Text


class Photograph(TypedDict):
    filename: Text
    split: NotRequired[Text | None]
    sentences: list[Sentence]


class Texts(TypedDict):
    filename: Text
    caption: Text | list[Text | None] | None
    split: NotRequired[Text | None]


class Caption(NamedTuple):
    file: str
    number: int
    text: str
    where: str
    question: str = ""
    # None where it is not known.
    split: str | None = None
    # None: the file lies in the image folder.
    image: Callable[[], Image.Image] | None = None


def load(
    root: Path, split: str | None = None, captions: str = "first", entities: str | Path | None = None
) -> list[Example]:
    """One example a picture (`captions="first"`) or a caption (`"all"`); its id is "<file>#<caption index>".

    `split`: train, val, test, or all. Splits are Karpathy's; where they are not known the default is all, else train.
    """
    check_captions(captions)
    found = _read(root)
    splits = sorted({caption.split for caption in found if caption.split})
    if split not in (None, "all", *splits):
        if not splits:
            raise FileNotFoundError(f"--split {split} needs {root / KARPATHY}, or a Parquet copy that names the splits")
        raise ValueError(f"--split must be all or one of {', '.join(splits)}; got {split!r}")
    split = split or ("train" if splits else "all")
    of_file: dict[str, list[Caption]] = {}
    for caption in found:
        if split in ("all", caption.split):
            of_file.setdefault(caption.file, []).append(caption)
    folder = root
    if any(caption.image is None for own in of_file.values() for caption in own):
        folder = picture_folder(root, IMAGE_FOLDERS, list(of_file)[:100])
    examples = [
        Example(
            f"{file}#{caption.number}",
            caption.image or partial(open_image, folder / file),
            caption.question,
            caption.text,
            picture=file,
            where=caption.where,
        )
        for file, own in of_file.items()
        for caption in sorted(own, key=lambda caption: caption.number)[: 1 if captions == "first" else None]
    ]
    return examples if entities is None else with_regions(examples, Path(entities))


def _read(root: Path) -> list[Caption]:
    def there(*names: str) -> Path | None:
        return next((root / name for name in names if (root / name).is_file()), None)

    if path := there(KARPATHY):
        return _from_karpathy(read_json(path, "Karpathy's caption file"), path)
    if path := there(TOKENS):
        return _from_lines(path, TOKEN_LINE, "<file>#<number><tab><caption>")
    if path := there(*KAGGLE):
        return _from_lines(path, KAGGLE_LINE, "<file>| <number>| <caption>", header="image_name|")
    if path := there(*PUBLISHED):
        return _from_published(path)
    if files := parquet.find(root):
        rows = parquet.read(files, "image", ("caption", "filename"), optional=("split",))
        return _flat(keep(((row.where, row) for row in rows), _from_row))
    raise FileNotFoundError(
        f"no Flickr30k in {root}: looked for {KARPATHY} and {TOKENS}, {KAGGLE[0]} and {PUBLISHED[0]}, and for the pictures in "
        f"{', '.join(IMAGE_FOLDERS[:-1])} or beside them, or for a Parquet copy; ask for the data at "
        f"https://shannon.cs.illinois.edu/DenotationGraph/ and pass --data_root, or a copy's hub id "
        f"(--data_root nlphuji/flickr30k), or try --data toy"
    )


def _flat(of_rows: list[list[Caption]]) -> list[Caption]:
    return [caption for of_row in of_rows for caption in of_row]


def _from_karpathy(whole: Any, path: Path) -> list[Caption]:
    kind = "Karpathy's caption file"
    if not isinstance(whole, dict) or "images" not in whole:
        raise ValueError(f'{path} is not {kind}: expected {{"images": [...]}}')

    def captions(entry: Any, where: str) -> list[Caption]:
        photograph: Any = shaped(entry, Photograph, where)
        return [
            Caption(photograph["filename"], index, sentence["raw"].strip(), where, split=photograph.get("split"))
            for index, sentence in enumerate(photograph["sentences"])
        ]

    return _flat(keep(numbered(whole["images"], path, kind), captions))


def _from_lines(path: Path, pattern: re.Pattern[str], layout: str, header: str | None = None) -> list[Caption]:
    found = []
    for where, line in lines(path):
        if header and line.startswith(header):
            continue
        match = pattern.fullmatch(line)
        if not match:
            raise ValueError(f"{where}: expected {layout}, got {line[:60]!r}")
        found.append(Caption(match["file"], int(match["index"]), match["text"].strip(), where))
    return found


def _from_published(path: Path) -> list[Caption]:
    whole = read_json(path, conversations.KIND)
    if isinstance(whole, dict):
        return _from_karpathy(whole, path)
    found, seen = [], Counter[str]()
    for told in conversations.of(whole, path):
        file = Path(told.image).name
        for question, answer in told.turns:
            question = "" if question == CAPTION_PROMPT else question
            found.append(Caption(file, seen[file], answer, told.where, question))
            seen[file] += 1
    return found


def _from_row(row: parquet.Row, where: str) -> list[Caption]:
    texts: Any = shaped(row.texts, Texts, where)
    # A copy with one caption a picture may hold it as a plain text.
    told = [texts["caption"]] if isinstance(texts["caption"], str) else texts["caption"] or [""]
    return [
        Caption(texts["filename"], index, (text or "").strip(), where, split=texts.get("split"), image=row.image)
        for index, text in enumerate(told)
    ]
