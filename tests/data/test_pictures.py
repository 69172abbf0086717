"""Whatever lies in a picture file, it opens as an RGB picture that shows the same, or is one BrokenPicture that names the file."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageCms

from lavender_min import data
from lavender_min.data import pictures
from lavender_min.data.pictures import BrokenPicture, as_rgb
from lavender_min.evaluation.command import open_picture

RAMP = np.arange(256, dtype=np.uint8)[None].repeat(3, 0)
MODES_OF_A_FILE = {"I": "tif", "I;16": "png", "I;16B": "tif", "F": "tif", "L": "png", "RGB": "png", "CMYK": "tif"}


def ramp(mode: str) -> Image.Image:
    """Black on the left to white on the right, in any mode; a clear picture has no hidden parts."""
    grey = Image.fromarray(RAMP)
    if mode in ("I", "I;16", "I;16B"):
        depth = {"I": np.int32, "I;16": "<u2", "I;16B": ">u2"}[mode]
        deep = (RAMP.astype(np.int64) * 257).astype(depth)
        return Image.frombytes(mode, grey.size, deep.tobytes()) if mode != "I" else Image.fromarray(deep)
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255)
    if mode == "LAB":
        return ImageCms.profileToProfile(
            grey.convert("RGB"), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    if mode in ("La", "RGBa"):
        return grey.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "PA":
        return grey.convert("P").convert("PA")
    if mode in ("HSV", "YCbCr", "CMYK"):
        return grey.convert("RGB").convert(mode)
    return grey.convert(mode)


@pytest.mark.parametrize(
    "mode", "1 L LA La P PA RGB RGBA RGBX RGBa CMYK YCbCr LAB HSV I I;16 I;16B F".split()
)  # fmt: skip
def test_a_ramp_of_every_mode_comes_out_as_it_is(mode):
    image = ramp(mode)
    assert image.mode == mode
    rgb = as_rgb(image, "a ramp")
    got = np.asarray(rgb, float)
    assert rgb.mode == "RGB" and got.shape == (3, 256, 3)
    # Error diffusion leaves only black and white in mode 1, the right share of each.
    near = 12 if mode == "1" else 1
    assert abs(got.mean() - 127.5) < near
    assert got[:, 0].max() <= 2 and got[:, -1].min() >= 253
    if mode != "1":
        assert abs(got - RAMP[..., None]).max() <= 2


@pytest.mark.parametrize("mode", MODES_OF_A_FILE)
def test_a_ramp_survives_its_file(tmp_path, mode):
    path = tmp_path / f"ramp.{MODES_OF_A_FILE[mode]}"
    ramp(mode).save(path)
    assert abs(np.asarray(data.open_image(path), float) - RAMP[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["F", "I"])
def test_deep_greys_out_of_range_are_stretched_and_that_is_said_once(tmp_path, mode, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "STRETCHED", set())
    values = RAMP.astype(np.int32) * 1000 - 50_000
    for name in ("a.tif", "b.tif"):
        Image.fromarray(values.astype({"F": np.float32, "I": np.int32}[mode])).save(tmp_path / name)
        assert abs(np.asarray(data.open_image(tmp_path / name), float) - RAMP[..., None]).max() <= 1
    said = capsys.readouterr().err
    assert "a.tif: grey values outside 0 … " in said and said.count("\n") == 1


def test_floats_that_are_no_numbers(tmp_path):
    values = RAMP.astype(np.float32) / 255
    values[0, 7], values[1, 7] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "some.tif")
    got = np.asarray(data.open_image(tmp_path / "some.tif"))
    assert got[0, 7].tolist() == [0] * 3 and got[1, 7].tolist() == [255] * 3 and got[2, 100].tolist() == [100] * 3
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "none.tif")
    with pytest.raises(BrokenPicture, match="none.tif: no pixel of it is a number"):
        data.open_image(tmp_path / "none.tif")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "PA", "RGB", "L", "1", "I;16", "RGBa", "La", "gif"])
def test_transparent_pictures_lie_on_white(tmp_path, kind):
    """A black bar on a clear ground, whose hidden colour is not white."""
    bar = np.zeros((4, 6), bool)
    bar[1:3, 1:5] = True
    path, options = tmp_path / ("p.gif" if kind == "gif" else "p.png"), {}
    shades = np.where(bar, 0, 40).astype(np.uint8)
    if kind in ("RGBA", "LA", "RGBa", "La", "PA"):
        whole = Image.fromarray(np.dstack([shades] * 3 + [np.where(bar, 255, 0).astype(np.uint8)]))
        image = whole.convert("LA").convert(kind) if kind == "La" else whole.convert("P" if kind == "PA" else kind)
        image = image.convert("PA") if kind == "PA" else image
    elif kind in ("P", "gif"):
        image = Image.fromarray(np.where(bar, 0, 1).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 200, 30, 30])
        options = {"transparency": 1}
    elif kind == "I;16":
        image, options = Image.fromarray(np.where(bar, 0, 7).astype(np.uint16)), {"transparency": 7}
    else:
        image = Image.fromarray(np.where(bar, 0, 255).astype(np.uint8) if kind == "1" else shades).convert(kind)
        options = {"transparency": {"RGB": (40, 40, 40), "L": 40, "1": 1}[kind]}
    if kind in ("RGBa", "La", "PA"):
        # No file keeps these modes; a decoder may still give them.
        rgb = as_rgb(image, "p")
    else:
        image.save(path, **options)
        rgb = data.open_image(path)
    assert np.array_equal(np.asarray(rgb), np.where(bar, 0, 255)[..., None].repeat(3, 2))


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 100, 200, 51)).save(tmp_path / "p.png")
    assert data.open_image(tmp_path / "p.png").getpixel((0, 0)) == (204, 224, 244)


# ---- broken pictures -------------------------------------------------------------------------------------------------


def test_avif_with_changed_bytes_is_a_broken_picture(tmp_path):
    path = tmp_path / "p.avif"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    whole, broken = path.read_bytes(), 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            data.open_image(path)
        except BrokenPicture as error:
            broken += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert broken > 20


@pytest.mark.parametrize("raised", [RuntimeError, KeyError, AssertionError, ZeroDivisionError, EOFError])
def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path, raised, monkeypatch):
    Image.new("RGB", (2, 2)).save(tmp_path / "p.png")

    def fail(*args, **options):
        raise raised("decoder says no")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BrokenPicture, match="p.png: .*decoder says no"):
        data.open_image(tmp_path / "p.png")


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt])
def test_a_full_memory_or_a_key_is_no_broken_picture(tmp_path, raised, monkeypatch):
    Image.new("RGB", (2, 2)).save(tmp_path / "p.png")

    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(raised):
        data.open_image(tmp_path / "p.png")


def test_a_bomb_and_a_cut_picture_name_themselves(tmp_path):
    from jpegs import HUGE

    (tmp_path / "bomb.jpg").write_bytes(HUGE)
    with pytest.raises(BrokenPicture, match="bomb.jpg: Image size .* exceeds limit"):
        data.open_image(tmp_path / "bomb.jpg")
    Image.effect_noise((90, 90), 80).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-300])
    with pytest.raises(BrokenPicture, match="cut.jpg: image file is truncated"):
        data.open_image(tmp_path / "cut.jpg")


def test_an_eps_starts_no_program(tmp_path, monkeypatch):
    out = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(out, "EPS")
    (tmp_path / "1.jpg").write_bytes(out.getvalue())

    def started(*args, **options):
        raise SystemExit("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)
    with pytest.raises(BrokenPicture, match="1.jpg: not a picture of a kind that is read"):
        data.open_image(tmp_path / "1.jpg")
    assert not {"EPS", "WMF", "GRIB", "HDF5"} & set(pictures.decoders())


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "missing", "name too long", "NUL", "two lines"])
def test_only_ordinary_files_are_opened(tmp_path, kind):
    path = str(tmp_path / "1.jpg")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    path = {"device": "/dev/zero", "name too long": path * 200, "NUL": path + "\0", "two lines": path + "\n2"}.get(
        kind, path
    )
    code = f"from lavender_min.data.pictures import *\ntry: open_image({path!r})\nexcept BrokenPicture as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    if kind in ("fifo", "device", "folder"):
        assert done.stdout == f"{path}: not an ordinary file\n"


def test_the_picture_of_the_flag_is_held_to_the_same(tmp_path):
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(FileNotFoundError, match="--image .*no.png: there is no such file"):
        open_picture(str(tmp_path / "no.png"))
    with pytest.raises(ValueError, match="--image .* is not a picture that can be read: not an ordinary file"):
        open_picture(str(tmp_path))
    for size in ((1, 5000), (5000, 1)):
        Image.new("RGB", size).save(tmp_path / "thin.png")
        with pytest.raises(ValueError, match="--image .*thin.png is .* pixels: one side is over 20 times the other"):
            open_picture(str(tmp_path / "thin.png"))
