"""Which picture an example shows, by the bytes of its file."""

import os
from functools import partial
from hashlib import sha256

import pytest
from PIL import Image

from lavender_min.data import Example, open_image, picture_digest
from lavender_min.data.pictures import Stored
from lavender_min.toy import data as toy


def test_a_file_is_known_by_its_bytes_and_is_not_decoded(tmp_path):
    file = tmp_path / "0.png"
    file.write_bytes(b"no picture at all")
    example = Example("0", partial(open_image, file), "", "a")
    assert picture_digest(example) == sha256(b"no picture at all").hexdigest()
    assert picture_digest(example._replace(image=Stored(lambda: b"a row's", "a row"))) == sha256(b"a row's").hexdigest()


def test_a_drawn_picture_is_known_by_its_pixels():
    one, other = toy.load("tune", 2)[::2]
    assert picture_digest(one) == picture_digest(one) != picture_digest(other)
    wide, high = (Example("0", partial(Image.new, "RGB", size), "", "a") for size in ((4, 2), (2, 4)))
    assert picture_digest(wide) != picture_digest(high)


def test_what_is_no_ordinary_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing"):
        with pytest.raises(OSError, match=f"{name} is no file"):
            picture_digest(Example("0", partial(open_image, tmp_path / name), "", "a"))
