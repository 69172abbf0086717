"""The flags of `evaluate.py`, and which of them do not go together."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from lavender_min import cli
from lavender_min.cli import flag
from lavender_min.data import SOURCES, Example, load, measured_split

# Flags of train.py that --seeds sets itself.
OURS = ("--data", "--plain", "--seed", "--output_dir")


@dataclass
class MeasuredData:
    """The flags that say what is measured on."""

    data: str = flag("toy", "the pictures; their data must say where the things lie that words name", SOURCES)
    data_root: str | None = flag(None, "where its files are: a folder, or a copy's hub id (default: data/<data>)")
    split: str | None = flag(None, "which part of it (default: the held-out one)")
    entities: str | None = flag(
        None, "with --data flickr30k: the folder of Flickr30k Entities, with Annotations/ and Sentences/", metavar="DIR"
    )

    def __post_init__(self) -> None:
        measured_split(self.data, self.entities)

    def examples(self) -> list[Example]:
        """Raises OSError or ValueError, in one line, if the data is not there."""
        split = self.split or measured_split(self.data, self.entities)
        return load(self.data, self.data_root, split or None, entities=self.entities)


@dataclass
class Flags(MeasuredData):
    plain: list[str] = flag([], "finished runs of train.py --plain, one a seed", metavar="DIR")
    lavender: list[str] = flag(
        [], "finished runs of train.py, in the same order of seeds; of several settings each is a row", metavar="DIR"
    )
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
    benchmarks: str | None = flag(
        None, "lmms-eval's tasks, with commas between, or paper for those of the paper", metavar="TASKS"
    )
    bench: str = flag("", "with --benchmarks: more flags for lmms-eval, in quotes", metavar="FLAGS")
    bench_python: str = flag(
        ".venv-bench/bin/python",
        "with --benchmarks: the interpreter that has lmms-eval; make bench-env builds this one",
    )
    text: str | None = flag(
        None,
        "instead of maps measure BLEU and CIDEr of captions, and answers, on this split of any data (all where it has none), "
        "or on the share that train.py --eval_share held out",
        metavar="SPLIT|SHARE",
    )
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
        if self.benchmarks is not None and self.text is not None:
            raise ValueError("--benchmarks and --text exclude each other")
        if self.benchmarks is not None or self.text is not None:
            if self.seeds or self.train:
                name = "--text" if self.benchmarks is None else "--benchmarks"
                raise ValueError(f"{name} compares finished runs: give --plain and --lavender, not --seeds")
        if self.bench and self.benchmarks is None:
            raise ValueError("--bench is for lmms-eval: give --benchmarks too")
        split_flags("--bench", self.bench)
        # A share that is none is refused here.
        if self.benchmarks is not None or self.text_share is not None or self.text is not None:
            return
        super().__post_init__()
        split_flags("--extract", self.extract)
        more = split_flags("--train", self.train)
        if more and not self.seeds:
            raise ValueError("--train is for the runs that --seeds makes: give --seeds too")
        if self.seeds and (self.plain or self.lavender):
            raise ValueError("--seeds makes its own runs: leave out --plain and --lavender")
        if taken := [name for name in more if name.split("=")[0] in OURS]:
            raise ValueError(f"--train must not hold {taken[0]}: --seeds sets {', '.join(OURS)} itself")

    @property
    def text_share(self) -> float | None:
        """--text as a share, None if it is the name of a split. Raises ValueError for a number that is no share."""
        try:
            share = float(str(self.text))
        except ValueError:
            return None
        if not 0 < share < 1:
            raise ValueError(f"--text must be a split, or a share above 0 and below 1; got {self.text}")
        return share

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
