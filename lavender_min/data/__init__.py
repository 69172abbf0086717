"""Picture-and-text data, in one shape: a list of `Example`, whatever the files look like.

`load("flickr30k", root)` finds the reader by name; each reader is a file of this folder with one function, `load`.
Pictures are opened only when asked for, so a list of 100,000 examples costs little.
"""

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

CAPTION_PROMPT = "Describe the image in a single sentence as a caption."  # what a VLM is asked for a bare caption

# What a picture file can raise when it is not a whole picture: cut short, of no known kind, or too large to be meant.
BROKEN_PICTURE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class Example(NamedTuple):
    """A picture and its text: a bare caption (`question` is "") or a question and its answer."""

    id: str
    image: Callable[[], Image.Image]  # opens the picture, RGB; raises one of BROKEN_PICTURE if it cannot
    question: str
    answer: str

    @property
    def fields(self) -> dict[str, str]:
        """The text by field, as `words.find_words` takes it."""
        return {"question": self.question, "answer": self.answer}


class Source(NamedTuple):
    """What `--data NAME` stands for: its reader, and the defaults that go with it."""

    reader: str  # a module with load(**options) -> list[Example]
    options: tuple[str, ...]  # which of root, split, captions it takes
    root: str | None  # where the files are looked for
    sd: str  # Stable Diffusion for stage 1
    vlm: str  # the host for stage 2


_SD = "CompVis/stable-diffusion-v1-4"
_VLM = "meta-llama/Llama-3.2-11B-Vision-Instruct"
_TOY = Path(__file__).parent.parent / "toy" / "models"

SOURCES = {
    "flickr30k": Source("lavender_min.data.flickr30k", ("root", "split", "captions"), "data/flickr30k", _SD, _VLM),
    "folder": Source("lavender_min.data.folder", ("root",), "data/folder", _SD, _VLM),
    "toy": Source("lavender_min.toy.data", ("split",), None, str(_TOY / "sd"), str(_TOY / "vlm")),
}


def load(
    name: str, root: str | Path | None = None, split: str | None = None, captions: str | None = None
) -> list[Example]:
    """The examples of a data set. Whatever is None takes the data set's own default.

    Raises FileNotFoundError or ValueError, in one line, when the data is not there or not as expected.
    """
    if name not in SOURCES:
        raise ValueError(f"--data must be one of {', '.join(SOURCES)}; got {name!r}")
    source = SOURCES[name]
    given = {"root": root, "split": split, "captions": captions}
    options = {option: value for option, value in given.items() if value is not None}
    for option in options:
        if option not in source.options:
            flag = "--data_root" if option == "root" else f"--{option}"
            raise ValueError(f"--data {name} takes no {flag}")
    if "root" in source.options:
        options["root"] = Path(root if root is not None else str(source.root))
    examples = importlib.import_module(source.reader).load(**options)
    double = [id for id, count in Counter(example.id for example in examples).items() if count > 1]
    if double:
        raise ValueError(f"--data {name}: the id {double[0]!r} stands for more than one example")
    return examples


def open_image(path: str | Path) -> Image.Image:
    """A picture file, whole, upright (cameras note the rotation in EXIF) and RGB."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
