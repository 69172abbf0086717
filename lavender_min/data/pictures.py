"""Opens pictures: the one place where a file that somebody else made becomes an RGB picture.

Whatever goes wrong on the way is a `BrokenPicture`, whose line names the picture: all three stages skip it and list it.
Pillow knows some 40 formats. Here are those that people have and that need no other program: for an EPS file Pillow would
start Ghostscript, which runs what the file says.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lavender_min.failing import one_line, say

FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "QOI", "DDS"),
    # TGA files begin with no mark of their own, so they are recognised last.
    *("PCX", "PSD", "TGA"),
)
# The largest value of a grey pixel of 16 bits.
WHITE_16 = 65_535
# The usual ranges of which it has been said that a picture is outside.
STRETCHED: set[float] = set()


class BrokenPicture(ValueError):
    """What cannot be opened as a picture, and why: "<name>: <reason>"."""


@contextlib.contextmanager
def opening(name: str | Path) -> Iterator[None]:
    """Whatever is raised inside this `with` is a BrokenPicture of this name. A full memory stays a MemoryError."""
    try:
        yield
    except (MemoryError, BrokenPicture):
        raise
    except UnidentifiedImageError as error:
        raise _broken(name, f"not a picture of a kind that is read ({', '.join(FORMATS)})") from error
    except FileNotFoundError as error:
        raise _broken(name, "there is no such file") from error
    except Exception as error:
        # Decoders raise what they like: OSError, SyntaxError, struct.error, RuntimeError, errors of their own.
        raise _broken(name, str(error) or type(error).__name__) from error


def _broken(name: str | Path, reason: str) -> BrokenPicture:
    # A name may hold a line break, or be endless.
    return BrokenPicture(one_line(ValueError(f"{name}: {reason}")))


@functools.cache
def decoders() -> list[str]:
    """The formats of ours that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(file: str | Path | BytesIO, name: str = "") -> Image.Image:
    """A picture file, whole, upright (cameras note the rotation in EXIF), on white where it is transparent, and RGB.

    `name` is what a BrokenPicture calls it, if not by the file. Only an ordinary file is opened: a pipe would wait for ever.
    """
    name = name or str(file)
    with opening(name):
        if not isinstance(file, BytesIO):
            # A missing file raises here.
            os.stat(file)
            if not os.path.isfile(file):
                raise ValueError("not an ordinary file")
        with Image.open(file, formats=decoders()) as image:
            return as_rgb(ImageOps.exif_transpose(image), name)


@dataclass(frozen=True)
class Stored:
    """Opens a picture that lies inside another file, a tar or a table; `bytes_of` reads what lies there, without decoding it."""

    read: Callable[[], bytes]
    # What an error calls the picture.
    name: str

    def bytes_of(self) -> bytes:
        with opening(self.name):
            return self.read()

    def __call__(self) -> Image.Image:
        return open_image(BytesIO(self.bytes_of()), self.name)


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any Pillow picture as RGB: deep greys to 0 … 255 by the range of their type, transparency on a white ground."""
    if image.mode == "F" or image.mode.startswith("I"):
        return grey_of(image, name).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Premultiplied and palette pictures first become what RGBA can be made of.
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA"))
    return ground.convert("RGB")


def grey_of(image: Image.Image, name: str) -> Image.Image:
    """A grey picture of 16 or 32 bits, or of floats, in 8 bits; Pillow itself would cut off all that is above 255.

    Integers are taken to be 0 … 65535 and floats 0 … 1. Where they are not, they are stretched from their least to their
    greatest, which is said once.
    """
    pixels = np.asarray(image, np.float32)
    known = pixels[np.isfinite(pixels)]
    if not known.size:
        raise ValueError("no pixel of it is a number")
    low, high = 0.0, 1.0 if image.mode == "F" else float(WHITE_16)
    if known.min() < low or known.max() > high:
        if high not in STRETCHED:
            STRETCHED.add(high)
            say(
                f"{name}: grey values outside 0 … {high:g} are stretched from their least to their greatest (said once)"
            )
        low, high = float(known.min()), float(known.max())
    grey = (np.nan_to_num(pixels, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-30)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[pixels == clear] = 1.0
    return Image.fromarray(np.rint(grey * 255).astype(np.uint8))


def picture_folder(root: Path, folders: Sequence[str], files: Sequence[str]) -> Path:
    """The first folder that holds any of these pictures (some may be missing: those are skipped one by one)."""
    for folder in (root / name for name in folders):
        # os.path.isfile and not Path.is_file, which raises for a name that no file can have.
        if any(os.path.isfile(folder / file) for file in files):
            return folder
    raise FileNotFoundError(
        f"the texts in {root} are there but not the pictures: looked for {files[0]} and others in "
        f"{', '.join(str(root / name) for name in folders)}"
    )
