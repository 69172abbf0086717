"""Small JPEGs of known colours, and things that pass for pictures and are none."""

import io

import numpy as np
import pytest
from PIL import Image

from lavender_min.data import BROKEN_PICTURE

HUGE = b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + 2 * (60_000).to_bytes(4, "little") + b"\1\0\x18\0" + bytes(24)
NOT_A_PICTURE = b"<html>gone</html>"


def colour(i: int) -> tuple[int, int, int]:
    return 40 * (i % 6) + 20, 200 - 30 * (i % 5), 60 * (i // 30) + 30  # all different up to i = 119


def jpeg(i: int, size=(12, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour(i)).save(out, "JPEG", quality=95)
    return out.getvalue()


def shows(example, i: int) -> bool:
    """Whether the example opens as picture i (JPEG keeps a plain colour to a few levels)."""
    image = example.image()
    pixels = np.asarray(image, dtype=int)
    return image.mode == "RGB" and pixels.shape == (8, 12, 3) and abs(pixels - colour(i)).max() <= 4


def is_broken(example) -> bool:
    with pytest.raises(BROKEN_PICTURE):
        example.image()
    return True
