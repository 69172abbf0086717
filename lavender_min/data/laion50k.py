"""Laion50k: 50,000 pictures of the web with their alt texts, as img2dataset downloads them.

    img2dataset --url_list … --caption_col … --output_format webdataset --output_folder data/laion50k

    00000.parquet     a row a link: key ("000000123"), caption, status ("success", or why there is no picture)
    00000.tar         000000123.jpg, .json, .txt, …: never unpacked, only where each picture lies in it is remembered
    00000/            or, with --output_format files, a folder of the same files

Shards are numbered on. The texts are the Parquet's, which img2dataset finishes last. A shard that lacks its texts or its pictures
is left out.

    laion50k.json.gz  or the split of Lavender's authors, beside their OCRVQA list (or .json), with the pictures in images/, imgs/
                      or beside it. What it holds could not be seen when this was written: it is read as that list is.

Alt texts come from web pages, so "&amp;" and the like in them are decoded, once.
"""

import html
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from typing_extensions import TypedDict

from lavender_min.data import CAPTION_PROMPT, Example, conversations, parquet
from lavender_min.data.pictures import BrokenPicture, Stored, open_image, picture_folder
from lavender_min.data.texts import Text, keep, say
from lavender_min.failing import naming, shaped

PUBLISHED = ("laion50k.json.gz", "laion50k.json")
IMAGE_FOLDERS = ("images", "imgs", ".")
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Link(TypedDict):
    key: Text
    caption: Text | None
    status: Text | None


COLUMNS = tuple(Link.__annotations__)


def load(root: Path) -> list[Example]:
    """One example a downloaded picture, in the order of the keys, which are the ids."""
    shards = sorted({p.with_suffix("") for p in root.glob("[0-9]*") if p.suffix in (".parquet", ".tar", "")})
    if not shards:
        if path := next((root / name for name in PUBLISHED if (root / name).is_file()), None):
            return _from_published(path)
        raise FileNotFoundError(
            f"no Laion50k in {root}: looked for what img2dataset writes, 00000.parquet with 00000.tar or a folder 00000, "
            f"and for {PUBLISHED[0]}; pass --data_root, or try --data toy"
        )
    of_shards = keep(((str(shard), shard) for shard in shards), _shard, "shards")
    found = [example for of_shard in of_shards for example in of_shard]
    examples = [example for example in found if example is not None]
    if len(examples) < len(found):
        failed = len(found) - len(examples)
        say(f"--data laion50k: {failed:,} of {len(found):,} links gave no picture and are left out")
    return sorted(examples, key=lambda example: example.id)


def _shard(shard: Path, name: str) -> list[Example | None]:
    """Its examples, None for a link that gave no picture. Raises ValueError or OSError if its texts or pictures are missing."""
    texts = shard.with_suffix(".parquet")
    parquet.check(texts, COLUMNS)
    pictures = _pictures(shard)
    with naming(texts, "fetch it again"):
        rows = pq.read_table(texts, columns=list(COLUMNS)).to_pylist()

    def example(row: Any, where: str) -> Example | None:
        link: Any = shaped(row, Link, where)
        if link["status"] != "success":
            return None
        image = pictures.get(link["key"]) or partial(_missing, shard, link["key"])
        return Example(link["key"], image, "", html.unescape(link["caption"] or ""), where=where)

    return keep(((f"{texts}, row {number}", row) for number, row in enumerate(rows)), example)


def _pictures(shard: Path) -> dict[str, Callable[[], Image.Image]]:
    """{key: what opens its picture} of a shard's folder or tar; of a tar that is cut short, as far as it goes."""
    if shard.is_dir():
        return {path.stem: partial(open_image, path) for path in shard.iterdir() if path.suffix in PICTURES}
    found: dict[str, Callable[[], Image.Image]] = {}
    tar = shard.with_suffix(".tar")
    if not tar.is_file():
        raise FileNotFoundError(f"{tar} is missing, and so are its pictures")
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                name = PurePosixPath(member.name)
                if name.suffix in PICTURES:
                    found[name.stem] = Stored(
                        partial(_part_bytes, tar, member.offset_data, member.size), f"{tar}, {member.name}"
                    )
    except tarfile.ReadError:
        # The pictures beyond the cut are missing; each is skipped when it is opened, like any broken picture.
        pass
    return found


def _part_bytes(tar: Path, offset: int, size: int) -> bytes:
    # The tar is opened anew each time: an open file has one position, which threads would share.
    with open(tar, "rb") as whole:
        whole.seek(offset)
        return whole.read(size)


def _missing(shard: Path, key: str) -> Image.Image:
    raise BrokenPicture(f"shard {shard} holds no picture {key}")


def _from_published(path: Path) -> list[Example]:
    told = conversations.read(path)
    names = [Path(one.image).name for one in told]
    folder = picture_folder(path.parent, IMAGE_FOLDERS, names[:100])
    return [
        Example(
            f"{one.id}#{number}",
            partial(open_image, folder / name),
            "" if question == CAPTION_PROMPT else question,
            html.unescape(answer),
            picture=one.id,
            where=one.where,
        )
        for one, name in zip(told, names, strict=True)
        for number, (question, answer) in enumerate(one.turns)
    ]
