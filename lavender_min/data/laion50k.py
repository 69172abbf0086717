"""Laion50k: 50,000 pictures of the web with their alt texts, as img2dataset downloads them.

    img2dataset --url_list … --caption_col … --output_format webdataset --output_folder data/laion50k

    00000.parquet     a row a link: key ("000000123"), caption, status ("success", or why there is no picture)
    00000.tar         000000123.jpg, .json, .txt, …: never unpacked, only where each picture lies in it is remembered
    00000/            or, with --output_format files, a folder of the same files

Shards are numbered on. The texts are the Parquet's, which img2dataset finishes last.
"""

import tarfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq
from PIL import Image

from lavender_min.data import Example, parquet
from lavender_min.data.pictures import BrokenPicture, open_image, opening
from lavender_min.data.texts import say

COLUMNS = ["key", "caption", "status"]
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def load(root: Path) -> list[Example]:
    """One example a downloaded picture, in the order of the keys, which are the ids."""
    shards = sorted({p.with_suffix("") for p in root.glob("[0-9]*") if p.suffix in (".parquet", ".tar", "")})
    if not shards:
        raise FileNotFoundError(
            f"no Laion50k in {root}: looked for what img2dataset writes, 00000.parquet with 00000.tar or a folder 00000; "
            "pass --data_root, or try --data toy"
        )
    examples, failed = [], 0
    for shard in shards:
        texts = shard.with_suffix(".parquet")
        parquet.check(texts, COLUMNS)
        pictures = _pictures(shard)
        for row in pq.read_table(texts, columns=COLUMNS).to_pylist():
            if row["status"] == "success":
                image = pictures.get(row["key"]) or partial(_missing, shard, row["key"])
                examples.append(Example(row["key"], image, "", row["caption"] or ""))
            else:
                failed += 1
    if failed:
        say(f"--data laion50k: {failed:,} of {failed + len(examples):,} links gave no picture and are left out")
    return sorted(examples, key=lambda example: example.id)


def _pictures(shard: Path) -> dict[str, Callable[[], Image.Image]]:
    """{key: what opens its picture} of a shard's folder or tar; of a tar that is cut short, as far as it goes."""
    if shard.is_dir():
        return {path.stem: partial(open_image, path) for path in shard.iterdir() if path.suffix in PICTURES}
    found: dict[str, Callable[[], Image.Image]] = {}
    tar = shard.with_suffix(".tar")
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                name = PurePosixPath(member.name)
                if name.suffix in PICTURES:
                    found[name.stem] = partial(_open_part, tar, member.offset_data, member.size, member.name)
    except tarfile.ReadError:
        # The pictures beyond the cut are missing; each is skipped when it is opened, like any broken picture.
        pass
    return found


def _open_part(tar: Path, offset: int, size: int, file: str) -> Image.Image:
    name = f"{tar}, {file}"
    # The tar is opened anew each time: an open file has one position, which threads would share.
    with opening(name), open(tar, "rb") as bytes_:
        bytes_.seek(offset)
        return open_image(BytesIO(bytes_.read(size)), name)


def _missing(shard: Path, key: str) -> Image.Image:
    raise BrokenPicture(f"shard {shard} holds no picture {key}")
