"""Flickr30k: 31,783 photographs with five captions each.

The folder holds the pictures and at least one of two caption files, as they are distributed:

    results_20130124.token     "<file>.jpg#<0…4>\\t<caption>" a line; the authors' own, without splits
    dataset_flickr30k.json     Karpathy's: {"images": [{"filename", "split", "sentences": [{"raw"}, …]}, …]}

or a Parquet copy: image {bytes, path}, caption [five], filename and, if it knows them, Karpathy's split. Ids are the same
in all three. Two copies are on the hub: nlphuji/flickr30k, and lmms-lab/flickr30k, which does not name the splits.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lavender_min.data import Example, parquet
from lavender_min.data.pictures import open_image, picture_folder

TOKENS = "results_20130124.token"
KARPATHY = "dataset_flickr30k.json"
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images", ".")


class Row(NamedTuple):
    file: str
    # None where it is not known.
    split: str | None
    # (caption index, caption)
    captions: list[tuple[int, str]]
    # None: the file lies in the image folder.
    image: Callable[[], Image.Image] | None = None


def load(root: Path, split: str | None = None, captions: str = "first") -> list[Example]:
    """One example a picture (`captions="first"`) or a caption (`"all"`); its id is "<file>#<caption index>".

    `split`: train, val, test, or all. Splits are Karpathy's; where they are not known the default is all, else train.
    """
    if captions not in ("first", "all"):
        raise ValueError(f"--captions must be first or all; got {captions!r}")
    if (root / KARPATHY).is_file():
        rows = _from_karpathy(root / KARPATHY)
    elif (root / TOKENS).is_file():
        rows = _from_tokens(root / TOKENS)
    elif files := parquet.find(root):
        rows = _from_parquet(files)
    else:
        raise FileNotFoundError(
            f"no Flickr30k in {root}: looked for {KARPATHY} and {TOKENS}, and for the pictures in "
            f"{', '.join(IMAGE_FOLDERS[:-1])} or beside them, or for a Parquet copy; ask for the data at "
            f"https://shannon.cs.illinois.edu/DenotationGraph/ and pass --data_root, or a copy's hub id "
            f"(--data_root nlphuji/flickr30k), or try --data toy"
        )
    splits = sorted({row.split for row in rows if row.split})
    if split not in (None, "all", *splits):
        if not splits:
            raise FileNotFoundError(f"--split {split} needs {root / KARPATHY}, or a Parquet copy that names the splits")
        raise ValueError(f"--split must be all or one of {', '.join(splits)}; got {split!r}")
    split = split or ("train" if splits else "all")
    rows = [row for row in rows if split in ("all", row.split)]
    folder = root
    if rows and rows[0].image is None:
        folder = picture_folder(root, IMAGE_FOLDERS, [row.file for row in rows[:100]])
    return [
        Example(
            f"{row.file}#{index}", row.image or partial(open_image, folder / row.file), "", caption, picture=row.file
        )
        for row in rows
        for index, caption in (row.captions[:1] if captions == "first" else row.captions)
    ]


def _from_karpathy(path: Path) -> list[Row]:
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        return [
            Row(r["filename"], r["split"], list(enumerate(s["raw"].strip() for s in r["sentences"]))) for r in images
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not Karpathy's caption file ({type(error).__name__}: {error})") from error


def _from_tokens(path: Path) -> list[Row]:
    captions: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        file, sharp, index = key.rpartition("#")
        if not (tab and sharp and index.isdigit()):
            raise ValueError(f"{path}, line {number}: expected <file>#<number><tab><caption>, got {line[:60]!r}")
        captions.setdefault(file, []).append((int(index), caption.strip()))
    return [Row(file, None, sorted(own)) for file, own in captions.items()]


def _from_parquet(files: list[Path]) -> list[Row]:
    rows = parquet.read(files, "image", ("caption", "filename"), optional=("split",))
    return [
        Row(row["filename"], row.get("split"), list(enumerate(text or "" for text in row["caption"] or [""])), image)
        for _, row, image in rows
    ]
