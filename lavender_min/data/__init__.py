"""Picture-and-text data, in one shape: a list of `Example`, whatever the files look like.

`load("flickr30k", root)` finds the reader by name; each reader is a module with one function, `load`. Texts are read
at once. A picture is opened when it is needed, so a list of 100,000 examples costs some 100 MB.

To add a data set:

1. write a reader, a file of this folder: `load(root, …) -> list[Example]`, which says in one line what is missing; texts.py
   (what to do about odd rows) and pictures.py hold what readers share, regions.py what those share whose words have regions;
2. add a row to `SOURCES`, under the name that `--data` is to take;
3. test it on a small folder laid out as the data really comes, broken entries included (tests/data/test_readers.py).

This module imports neither torch nor a reader, so `--help` and the first errors of a command come at once.
"""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from PIL import Image

from lavender_min.data.pictures import BrokenPicture, Stored
from lavender_min.data.pictures import open_image as open_image
from lavender_min.failing import say

# The question that a VLM gets when the text is a bare caption.
CAPTION_PROMPT = "Describe the image in a single sentence as a caption."

# Special tokens of the models that are tuned here: Llama's and Qwen's, LLaVA's, Gemma's, InternVL's.
SPECIAL = re.compile(
    r"<\|\w+\|>|</?s>|<(?:image|pad|bos|eos|start_of_turn|end_of_turn|start_of_image|image_soft_token|IMG_CONTEXT)>"
)

# What opening a picture raises when it is not a whole picture: one class, whose line names the picture.
BROKEN_PICTURE = BrokenPicture


class Region(NamedTuple):
    """Where in the picture the thing lies that a word names."""

    # The word: example.fields[field][start:end].
    field: str
    start: int
    end: int
    # What kind of word it is ("shape", "color"), for tables by kind; "" for none of them.
    kind: str
    mask: Bool[np.ndarray, "side side"]


class Example(NamedTuple):
    """A picture and its text: a bare caption (`question` is "") or a question and its answer.

    The first four fields are all that training needs. The others are for measuring, and have defaults.
    """

    id: str
    # Opens the picture, RGB; raises BROKEN_PICTURE if it cannot.
    image: Callable[[], Image.Image]
    question: str
    answer: str
    # Examples that are known to show one picture share this; "" where the picture is this example's alone.
    picture: str = ""
    # What kind of question it is ("color", "count"), for tables by kind; "" if there are no kinds.
    kind: str = ""
    # regions(side): the regions of this example's words, with masks of side × side cells that cover the whole picture.
    # None: the data does not say where things are.
    regions: Callable[[int], list[Region]] | None = None
    # The file and the line or row it came from, for messages.
    where: str = ""

    @property
    def fields(self) -> dict[str, str]:
        """The text by field, as `words.find_words` takes it."""
        return {"question": self.question, "answer": self.answer}


_TOY = Path(__file__).parent.parent / "toy" / "models"


class Source(NamedTuple):
    """What `--data NAME` stands for: its reader, and the defaults that go with it."""

    # A module with load(**options) -> list[Example], and which of root, split, captions and entities it takes as options.
    reader: str
    options: tuple[str, ...] = ("root",)
    # Parquet copies: hub id ─► (revision, the files that matter).
    hub: Mapping[str, tuple[str, str]] = {}
    # Stable Diffusion for stage 1, the host for stage 2.
    sd: str = "CompVis/stable-diffusion-v1-4"
    vlm: str = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    # The held-out split for stage 3, if the examples of this data bring regions for their words; "" where it has no splits.
    measured_split: str | None = None


SOURCES = {
    "flickr30k": Source(
        "lavender_min.data.flickr30k",
        ("root", "split", "captions", "entities"),
        {
            # All splits, in spite of the name.
            "nlphuji/flickr30k": ("refs/convert/parquet", "TEST/test/*.parquet"),
            # All pictures; it does not say which split they are of.
            "lmms-lab/flickr30k": ("main", "data/test-*.parquet"),
        },
        measured_split="test",
    ),
    "laion50k": Source("lavender_min.data.laion50k"),
    "rlaifv83k": Source(
        "lavender_min.data.rlaifv83k",
        hub={"openbmb/RLAIF-V-Dataset": ("main", "RLAIF-V-Dataset_*.parquet")},
    ),
    "ocrvqa30k": Source(
        "lavender_min.data.ocrvqa30k",
        ("root", "captions"),
        # The first 30,000 of 165,746 covers.
        {"HuggingFaceM4/the_cauldron": ("main", "ocrvqa/train-0000[01]-of-*.parquet")},
    ),
    "refcoco": Source(
        "lavender_min.data.refcoco",
        ("root", "split", "captions"),
        {f"lmms-lab/{name}": ("main", "data/*.parquet") for name in ("RefCOCO", "RefCOCOplus", "RefCOCOg")},
        measured_split="val",
    ),
    "coco": Source("lavender_min.data.coco", ("root", "split", "captions"), measured_split=""),
    "folder": Source("lavender_min.data.folder", ("root", "captions")),
    "masks": Source("lavender_min.data.masks", ("root", "captions"), measured_split=""),
    "toy": Source(
        "lavender_min.toy.data", ("split",), sd=str(_TOY / "sd"), vlm=str(_TOY / "mllama"), measured_split="heldout"
    ),
}


def measured_split(name: str, entities: str | None = None) -> str:
    """The held-out split of a data set whose words have regions; ValueError, in one line, if they have none.

    `entities`: the folder of Flickr30k Entities, without which Flickr30k has none.
    """
    split = SOURCES[name].measured_split
    if split is None or ("entities" in SOURCES[name].options and not entities):
        have = ", ".join(name for name, source in SOURCES.items() if source.measured_split is not None)
        raise ValueError(
            f"--data {name} has no regions: it does not say where the thing that a word names is, so there is nothing "
            f"to measure maps against; data that does: {have} (flickr30k with --entities)"
        )
    return split


def load(
    name: str,
    root: str | Path | None = None,
    split: str | None = None,
    captions: str | None = None,
    entities: str | Path | None = None,
) -> list[Example]:
    """The examples of a data set. What is left out (no text, odd values), and what looks odd, is said in a line each on stderr.

    `root` is a folder, or one of the data set's ids in `Source.hub`; `entities` the folder of Flickr30k Entities. Whatever is None
    takes the data set's own default.
    Raises OSError (which FileNotFoundError is) or ValueError, in one line, when the data is not there or not as expected.
    """
    if name not in SOURCES:
        raise ValueError(f"--data must be one of {', '.join(SOURCES)}; got {name!r}")
    source = SOURCES[name]
    given = {"root": root, "split": split, "captions": captions, "entities": entities}
    options = {option: value for option, value in given.items() if value is not None}
    for option in options:
        if option not in source.options:
            flag = "--data_root" if option == "root" else f"--{option}"
            raise ValueError(f"--data {name} takes no {flag}")
    if "root" in source.options:
        folder = Path(root or f"data/{name}")
        at_hub = source.hub.get(str(folder))
        options["root"] = fetch(str(folder), *at_hub) if at_hub and not folder.exists() else folder
    found = importlib.import_module(source.reader).load(**options)
    examples = [example for example in found if example.answer.strip()]
    if not examples:
        raise ValueError(f"--data {name}: none of {len(found):,} entries has text")
    if len(examples) < len(found):
        say(f"--data {name}: {len(found) - len(examples):,} of {len(found):,} entries have no text and are left out")
    double = [id for id, count in Counter(example.id for example in examples).items() if count > 1]
    if double:
        raise ValueError(f"--data {name}: the id {double[0]!r} stands for more than one example")
    _say_special(name, examples)
    return examples


def _say_special(name: str, examples: list[Example]) -> None:
    """A model takes its special tokens for what they stand for, wherever they come from: a picture, the end of a turn."""
    found = [example for example in examples if any(map(SPECIAL.search, example.fields.values()))]
    if found:
        example = found[0]
        token = SPECIAL.findall(f"{example.question} {example.answer}")[0]
        say(
            f"--data {name}: {len(found):,} entries hold what a model takes for a special token, the first {token} "
            f"in {example.where or example.id}; they are left as they are"
        )


def check_captions(captions: str) -> None:
    if captions not in ("first", "all"):
        raise ValueError(f"--captions must be first or all; got {captions!r}")


def fetch(hub_id: str, revision: str, files: str) -> Path:
    """The folder with these files of a data set of the hub, downloaded once into the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        copy = snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=files)
    except Exception as error:
        # No network, no such data set, no room: the HTTP library has errors of its own, which are no OSErrors.
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"{hub_id} could not be fetched ({type(error).__name__}: {reason}); "
            "try where there is a network, or pass a folder as --data_root"
        ) from error
    return (Path(copy) / files).parent


def picture_digest(example: Example) -> str:
    """Which picture an example shows: the SHA-256 of its file's bytes, in hexadecimal, as `sha256sum` prints it.

    Bytes are read ten times as fast as they are decoded, and they are the same on every machine, while decoders differ in the
    last digit. A picture without a file is known by its pixels. Raises OSError if the file cannot be read.
    """
    if isinstance(example.image, Stored):
        return sha256(example.image.bytes_of()).hexdigest()
    if isinstance(example.image, partial) and example.image.func is open_image:
        file = Path(example.image.args[0])
        # A pipe has no end to read to.
        if not file.is_file():
            raise FileNotFoundError(f"{file} is no file")
        return sha256(file.read_bytes()).hexdigest()
    image = example.image()
    return sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
