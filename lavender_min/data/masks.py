"""Data of one's own whose things are marked by mask pictures: a folder as `--data folder` reads it, with masks/ in it.

    dogs/1.jpg, dogs/1.txt           a picture and its text, in any of folder.py's forms
    masks/dogs/1/dog.png             where the dog of dogs/1.jpg is
    masks/dogs/1/red ball.png        where its red ball is

A picture's masks lie in a folder named as the picture is, without its ending. A mask is a PNG named after the word or words of the
text that name the thing; they are found in question and answer as whole words, also with a plural's s or es. Whatever is not black
in it is the thing. A mask covers the whole picture, and may have another size.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from lavender_min.data import Example, folder
from lavender_min.data.pictures import decoders, opening
from lavender_min.data.regions import Place, find_label, pixel_mask, regions
from lavender_min.data.texts import keep
from lavender_min.failing import say


def load(root: Path, captions: str = "all") -> list[Example]:
    """The examples of `folder.load`, with regions. Masks that are broken, or whose words no text has, are left out and counted."""
    place = (root.parent if root.is_file() else root) / "masks"
    files = keep(((str(file), file) for file in sorted(place.rglob("*.png"))), _whole, "masks")
    if not files:
        raise FileNotFoundError(
            f"no masks in {place}: looked for <picture>/<word>.png; pass --data_root, take --data folder for data without "
            "masks, or try --data toy"
        )
    of_picture: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        of_picture[file.parent.relative_to(place)].append(file)
    made, named = [], set[Path]()
    for example in folder.load(root, captions):
        places = []
        for file in of_picture[Path(example.picture or example.id).with_suffix("")]:
            spans = [(field, *span) for field, text in example.fields.items() for span in find_label(text, file.stem)]
            places += [Place(*span, "", partial(png_mask, file)) for span in spans]
            named |= {file} if spans else set()
        made.append(example._replace(regions=partial(regions, example.fields, places)))
    if nameless := [file for file in files if file not in named]:
        say(
            f"{len(nameless):,} of {len(files):,} masks have a name that no text of their picture has; the first: {nameless[0]}"
        )
    return made


def _whole(file: Path, where: str) -> Path:
    """The file itself. Raises BrokenPicture, a ValueError, if it is no whole picture; `where` is what `keep` passes."""
    with opening(file), Image.open(file, formats=decoders()) as image:
        image.verify()
    return file


def png_mask(file: Path, side: int) -> Bool[np.ndarray, "side side"]:
    """The cells in which a mask picture is not black."""
    with opening(file), Image.open(file, formats=decoders()) as image:
        return pixel_mask(np.asarray(image.convert("L")) > 0, side)
