"""Check a map store, show it, or make one from the maps that the paper's authors released, or from masks.

python -m lavender_min.maps check DIR [--data NAME]       every row of every shard, and with --data whether its text and picture
                                                          are still those of the data; exit code 1 if anything is wrong
python -m lavender_min.maps show DIR --n 12 [--data NAME] a sheet of word maps, over their pictures with --data; with --html a
                                                          page in which one points at a word
python -m lavender_min.maps import JPEG_ROOT DIR          the released Flickr30k maps, words placed in --data_root's captions
python -m lavender_min.maps from-masks DIR --data NAME    the boxes or masks that the data has for its words, in place of maps
"""

import argparse
import math
import string
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lavender_min import cli, data, draw, page
from lavender_min.data import pictures
from lavender_min.geometry import MAP_SIDE, contrast
from lavender_min.maps.check import check
from lavender_min.maps.from_masks import from_masks
from lavender_min.maps.shard import StoredMaps
from lavender_min.maps.store import MapStore, MapWriter, entropy
from lavender_min.words import find_words

PROG = "python -m lavender_min.maps"

# Words of an example that the sheet shows.
COLUMNS = 8
ABOUT = (
    "Where the teacher, Stable Diffusion, sees each word. Trust: how sharp its map is, (largest − smallest) / mean. "
    "Entropy: how spread out it is, at most 6.93 nats."
)


def spread(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of them, evenly spaced."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


class Shown(NamedTuple):
    """A row of a store, and what its maps lie over."""

    id: str
    stored: StoredMaps
    # None without --data.
    picture: Image.Image | None


def show(folder: Path, n: int, out: Path | None, name: str | None, root: str | None, html: str | None) -> int:
    """Draw a sheet of word maps, a line an example: each map is stretched to 0 … 1 and, with --data, laid over the picture."""
    cli.at_least(1, n=n)
    store = MapStore(folder)
    pictures = {example.id: example.image for example in data.load(name, root) if example.id in store} if name else {}
    ids = spread(list(pictures) if name else store.ids, n)
    if not ids:
        raise ValueError(
            f"{folder} holds no maps" + (f" for --data {name}: were they made from other data?" if name else "")
        )
    rows = [Shown(id, store[id], draw.framed(pictures[id](), store.recipe["frame"]) if name else None) for id in ids]
    if html is None:
        out = out or folder / "maps.png"
        draw_sheet(rows, out)
    else:
        out = Path(html or folder / "maps.html")
        write_page(rows, out, str(folder))
    print(f"{len(ids)} of {len(store):,} examples: {out}")
    return 0


def draw_sheet(rows: list[Shown], out: Path) -> None:
    inches = 1.75 * len(rows) + 0.25
    figure = Figure(figsize=(1.3 * COLUMNS, inches))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.1 / inches, top=1 - 0.45 / inches, wspace=0.05, hspace=0.4)
    for axes, (id, stored, picture) in zip(figure.subplots(len(rows), COLUMNS, squeeze=False), rows, strict=True):
        text = f"{id}:  {stored.question} {stored.answer}"[:160]
        axes[0].text(0, 1.22, text, fontsize=7, color="#444444", transform=axes[0].transAxes)
        square = Image.new("L", (1, 1)) if picture is None else picture.resize((256, 256))
        for axis, i in zip(axes, spread(range(len(stored.words)), COLUMNS), strict=False):
            draw.overlay(axis, square, stored.maps[i])
            axis.set_title(stored.words[i].text, fontsize=8, pad=2)
        for axis in axes[len(stored.words) :]:
            axis.axis("off")
    figure.savefig(out, dpi=110)


def write_page(rows: list[Shown], out: Path, title: str) -> None:
    """The same as a page, with every word."""
    pictures = []
    for id, stored, picture in rows:
        sharp, spread_out = contrast(stored.maps.float()).tolist(), entropy(stored.maps.float()).tolist()
        words = [
            page.WordMaps(word, maps[None], [{"trust": f"{trust:.2f}", "entropy": f"{nats:.3f}"}])
            for word, maps, trust, nats in zip(stored.words, stored.maps, sharp, spread_out, strict=True)
        ]
        pictures.append(page.Picture(id, picture, [page.Text(stored.question, stored.answer, words)]))
    page.write(out, page.Page(title, ABOUT, ["the teacher's map"], pictures))


def released_map(file: Path) -> Float[Tensor, "g g"]:
    """One released map, 8-bit grey, as numbers from 0 to 1. Raises BrokenPicture if it is none, or of another size."""
    with pictures.opening(file), Image.open(file, formats=pictures.decoders()) as image:
        grey = np.asarray(image.convert("L"), np.float32) / 255
        if grey.shape != (MAP_SIDE, MAP_SIDE):
            raise ValueError(f"{grey.shape} cells instead of {MAP_SIDE} x {MAP_SIDE}")
        return torch.from_numpy(grey)


def take_released(jpegs: Path, folder: Path, root: str | None, captions: str | None, frame: str) -> int:
    """Make a store of the released maps, JPEG_ROOT/<picture>/lpm_attention/<any folder>/attention_<word>.jpg.

    A file's map is stored for each place in its picture's captions where its word stands, in capitals or not. A file whose word
    stands in no caption is counted and listed. The released maps do not tell the share of the start-of-text token, so `sos` is
    NaN.
    """
    # Picture ─► word ─► file.
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in sorted(jpegs.glob("*/lpm_attention/*/attention_*.jpg")):
        word = file.stem.removeprefix("attention_").strip(string.punctuation).casefold()
        found[file.parts[-4]][word] = file
    if not found:
        raise FileNotFoundError(f"no maps in {jpegs}: looked for <picture>/lpm_attention/<folder>/attention_<word>.jpg")
    examples = defaultdict(list)
    for example in data.load("flickr30k", root, "all", captions):
        examples[example.id.rpartition("#")[0]].append(example)
    # (Picture, word) ─► why it is not in the store.
    left: dict[tuple[str, str], str] = {}
    recipe = {"data": "flickr30k", "recipe": "released", "values": "8-bit grey / 255", "frame": frame}
    with (
        MapWriter(folder, recipe | {"map_side": MAP_SIDE}) as writer,
        tqdm(found.items(), unit=" pictures") as bar,
    ):
        for picture, files in bar:
            maps = {}
            for word, file in files.items():
                left[picture, word] = "in no caption"
                try:
                    maps[word] = released_map(file)
                except data.BROKEN_PICTURE as error:
                    left[picture, word] = str(error)
            for example in examples[picture]:
                words = [word for word in find_words(example.fields) if word.text.casefold() in maps]
                for placed in words:
                    left.pop((picture, placed.text.casefold()), None)
                if words and example.id not in writer.done:
                    own = torch.stack([maps[word.text.casefold()] for word in words])
                    writer.add(example.id, example.question, example.answer, words, own, math.nan)
    print(
        f"{folder} holds {len(writer.done):,} captions; of {sum(map(len, found.values())):,} files {len(left):,} found no place"
    )
    if left:
        listing = folder / "left_out.txt"
        listing.write_text("".join(f"{picture}\t{word}\t{why}\n" for (picture, word), why in left.items()))
        print(f"they are listed in {listing}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m lavender_min.maps`; returns the exit code."""
    args = vars(parser().parse_args(argv))
    command = args.pop("command")
    return cli.run(PROG, lambda: command(**args))


def parser() -> cli.Parser:
    """A subcommand for each function, whose arguments are the function's."""
    form: dict[str, Any] = {"usage": argparse.SUPPRESS, "formatter_class": cli.HelpFormatter}
    parser = cli.Parser(prog=PROG, description=__doc__, **form)
    commands = parser.add_subparsers(required=True, metavar="check | show | import | from-masks", prog=PROG)
    functions = {"check": check, "show": show, "import": take_released, "from-masks": from_masks}
    own = {}
    for name, function in functions.items():
        what = (function.__doc__ or "").partition("\n")[0]
        own[name] = commands.add_parser(name, description=what, help=what, **form)
        own[name].set_defaults(command=function)
    own["import"].add_argument("jpegs", metavar="JPEG_ROOT", type=Path, help="the folder of the released maps")
    for name in functions:
        own[name].add_argument("folder", metavar="DIR", type=Path, help="the store")
    check_, show_, import_, masks_ = (own[name].add_argument for name in functions)
    show_("--n", type=int, default=12, help="examples")
    show_("--out", type=Path, help="the picture to write (default: DIR/maps.png)")
    show_("--html", nargs="?", const="", metavar="FILE", help="write a page instead (default: DIR/maps.html)")
    show_("--data", dest="name", choices=list(data.SOURCES), help="the data set whose pictures to lay under the maps")
    check_("--data", dest="name", choices=list(data.SOURCES), help="the data set to compare texts and pictures with")
    check_("--split", help="which part of it (default: the part for training)")
    masks_(
        "--data", dest="name", choices=list(data.SOURCES), required=True, help="the data set, whose words have regions"
    )
    masks_("--split", help="which part of it (default: the part for training)")
    masks_("--entities", metavar="DIR", help="with --data flickr30k: the folder of Flickr30k Entities")
    for add in (check_, show_, import_, masks_):
        add("--data_root", dest="root", help="where its files are (default: data/<data>)")
    for add in (check_, import_, masks_):
        add(
            "--captions",
            choices=["first", "all"],
            help="how many captions or questions of a picture, as for extract.py",
        )
    import_("--frame", choices=["whole", "crop"], default="whole", help="what the maps cover")
    return parser


if __name__ == "__main__":
    sys.exit(main())
