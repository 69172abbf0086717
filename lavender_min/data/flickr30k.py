"""Flickr30k: 31,783 photographs with five captions each.

The folder holds the pictures and at least one of two caption files, as they are distributed:

    results_20130124.token     "<file>.jpg#<0…4>\\t<caption>" a line; the authors' own, without splits
    dataset_flickr30k.json     Karpathy's: {"images": [{"filename", "split", "sentences": [{"raw"}, …]}, …]}
"""

import json
from functools import partial
from pathlib import Path

from lavender_min.data import Example, open_image

TOKENS = "results_20130124.token"
KARPATHY = "dataset_flickr30k.json"
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images", ".")


def load(root: Path, split: str | None = None, captions: str = "first") -> list[Example]:
    """One example a picture (`captions="first"`) or a caption (`"all"`); its id is "<file>#<caption index>".

    `split`: train, val, test, or all. Splits are Karpathy's; without his file the default is all, else train.
    """
    if captions not in ("first", "all"):
        raise ValueError(f"--captions must be first or all; got {captions!r}")
    if not (root / KARPATHY).is_file() and not (root / TOKENS).is_file():
        raise FileNotFoundError(
            f"no Flickr30k in {root}: looked for {KARPATHY} and {TOKENS}, and for the pictures in "
            f"{', '.join(IMAGE_FOLDERS[:-1])} or beside them; ask for the data at "
            f"https://shannon.cs.illinois.edu/DenotationGraph/ and pass --data_root, or try --data toy"
        )
    if (root / KARPATHY).is_file():
        texts = _from_karpathy(root / KARPATHY, split or "train")
    elif split in (None, "all"):
        texts = _from_tokens(root / TOKENS)
    else:
        raise FileNotFoundError(f"--split {split} needs {root / KARPATHY}, which names the splits; it is not there")
    if not texts:
        raise ValueError(f"no captions found in {root} for --split {split or 'all'}")
    folder = _image_folder(root, list(texts)[:100])
    return [
        Example(f"{file}#{index}", partial(open_image, folder / file), "", caption)
        for file, sentences in texts.items()
        for index, caption in (sentences[:1] if captions == "first" else sentences)
    ]


def _from_karpathy(path: Path, split: str) -> dict[str, list[tuple[int, str]]]:
    """{file: [(caption index, caption), …]} of one split."""
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        rows = [(row["filename"], row["split"], [s["raw"].strip() for s in row["sentences"]]) for row in images]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not Karpathy's caption file ({type(error).__name__}: {error})") from error
    splits = sorted({part for _, part, _ in rows})
    if split != "all" and split not in splits:
        raise ValueError(f"--split must be all or one of {', '.join(splits)}; got {split!r}")
    return {file: list(enumerate(sentences)) for file, part, sentences in rows if split in ("all", part)}


def _from_tokens(path: Path) -> dict[str, list[tuple[int, str]]]:
    texts: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        file, sharp, index = key.rpartition("#")
        if not (tab and sharp and index.isdigit()):
            raise ValueError(f"{path}, line {number}: expected <file>#<number><tab><caption>, got {line[:60]!r}")
        texts.setdefault(file, []).append((int(index), caption.strip()))
    return {file: sorted(sentences) for file, sentences in texts.items()}


def _image_folder(root: Path, files: list[str]) -> Path:
    """The first folder that holds any of these pictures (some may be missing: those are skipped one by one)."""
    for folder in (root / name for name in IMAGE_FOLDERS):
        if any((folder / file).is_file() for file in files):
            return folder
    raise FileNotFoundError(
        f"the captions in {root} are there but not the pictures: looked for {files[0]} and others in "
        f"{', '.join(str(root / name) for name in IMAGE_FOLDERS)}"
    )
