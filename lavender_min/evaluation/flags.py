"""The flags of `evaluate.py`, and which of them do not go together."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from lavender_min import cli
from lavender_min.cli import flag
from lavender_min.data import SOURCES, measured_split

# Flags of train.py that --seeds sets itself.
OURS = ("--data", "--plain", "--seed", "--output_dir")


@dataclass
class Flags:
    data: str = flag("toy", "the pictures; their data must say where the things lie that words name", SOURCES)
    plain: list[str] = flag([], "finished runs of train.py --plain, one a seed", metavar="DIR")
    lavender: list[str] = flag([], "finished runs of train.py, in the same order of seeds", metavar="DIR")
    seeds: int | None = flag(None, "train this many pairs first, in OUT/plain-0, OUT/lavender-0, …")
    train: str = flag("", "with --seeds: more flags for train.py, in quotes", metavar="FLAGS")
    maps: str | None = flag(None, "Stable Diffusion's maps of the held-out pictures (default: maps/<data>-heldout)")
    extract: str = flag("", "more flags for extract.py, which makes those maps, in quotes", metavar="FLAGS")
    sd: str | None = flag(None, "Stable Diffusion for those maps (default: extract.py's)")
    image: str | None = flag(
        None, "one's own picture: answer about it, and draw where each word of the answer looks", metavar="FILE"
    )
    question: str = flag("", "with --image: the question (default: for a caption)", metavar="TEXT")
    vlm: str | None = flag(
        None, "with --image: hub id or folder of the host (default: the adapter's, or the data's)", metavar="NAME"
    )
    adapter: str | None = flag(None, "with --image: a finished run of train.py, or a PEFT adapter", metavar="DIR")
    html: bool = flag(False, "write a page too, in which one points at a word and sees where each model looked for it")
    scenes: int = flag(100, "held-out pictures")
    batch_size: int = flag(32, "texts at once")
    out: str = flag("runs/report", "folder for the report")

    def __post_init__(self) -> None:
        cli.at_least(1, seeds=self.seeds, scenes=self.scenes, batch_size=self.batch_size)
        if self.image is not None:
            if not self.image.strip():
                raise ValueError("--image needs the file of a picture; got ''")
            if os.path.realpath(self.image) in map(os.path.realpath, (self.drawing, self.page)):
                raise ValueError(f"--out {self.out} would write over --image {self.image}: take another --out")
            return
        if self.question or self.vlm or self.adapter:
            raise ValueError("--question, --vlm and --adapter are about one's own picture: give --image too")
        measured_split(self.data)
        split_flags("--extract", self.extract)
        more = split_flags("--train", self.train)
        if more and not self.seeds:
            raise ValueError("--train is for the runs that --seeds makes: give --seeds too")
        if self.seeds and (self.plain or self.lavender):
            raise ValueError("--seeds makes its own runs: leave out --plain and --lavender")
        if taken := [name for name in more if name.split("=")[0] in OURS]:
            raise ValueError(f"--train must not hold {taken[0]}: --seeds sets {', '.join(OURS)} itself")

    @property
    def drawing(self) -> Path:
        """Where --image's words are drawn to."""
        return Path(self.out) / f"{Path(str(self.image)).stem}.png"

    @property
    def page(self) -> Path:
        """Where --html writes."""
        return self.drawing.with_suffix(".html") if self.image is not None else Path(self.out) / "page.html"


def split_flags(name: str, text: str) -> list[str]:
    """The flags for another stage that stand in quotes behind the flag `name`."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name} {text!r} cannot be read as flags: {error}") from None
