"""The page to look at: what stands in the file, and that it is what was handed over."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lavender_min import page
from lavender_min.geometry import minmax
from lavender_min.words import find_words

ODD = 'a \U0001f600 <b>bold</b> </script><script>alert("1")</script> cat, {{data}}'


def word_maps(text, field="answer", count=2, side=7, seed=0, **more):
    draw = torch.Generator().manual_seed(seed)
    numbers = [{"entropy": f"{i}.5"} for i in range(count)]
    return [
        page.WordMaps(word, torch.rand(count, side, side, generator=draw), numbers, **more)
        for word in find_words({field: text})
    ]


def written(path, content):
    page.write(path, content)
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return text, json.loads(data)


def opened(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.fixture
def picture():
    return Image.effect_noise((90, 61), 40).convert("RGB")


def test_the_file_asks_for_nothing_outside_itself(tmp_path, picture):
    shown = page.Picture(ODD, picture, [page.Text(ODD, ODD, word_maps(ODD))])
    text, data = written(tmp_path / "deep" / "page.html", page.Page(ODD, ODD, [ODD, "b"], [shown]))
    assert not re.search(r"https?://|url\(|@import|<link|fetch\(|\bsrc=", text)
    # What a text holds ends no script and begins none: the two that stand there are the data and the code.
    assert text.count("</script>") == text.count("<script") == 2 and "alert(" in text and "<b>" not in text
    assert text.isascii() or "alert" not in "".join(re.findall(r"[^\x00-\x7f]+", text))
    (found,) = data["pictures"]
    words = [word["text"] for word in found["texts"][0]["words"]]
    assert data["title"] == data["about"] == data["names"][0] == found["name"] == ODD
    for field in ("question", "answer"):
        pieces = found["texts"][0][field]
        assert "".join(piece if isinstance(piece, str) else words[piece] for piece in pieces) == ODD
    # Words of the answer stand in the answer alone, at their places.
    assert found["texts"][0]["question"] == [ODD]
    assert [words[piece] for piece in found["texts"][0]["answer"] if isinstance(piece, int)] == words
    assert words[1:5] == ["b", "bold", "b", "script"]


def test_maps_come_back_from_the_sprite(tmp_path, picture):
    words = word_maps("two words", count=3, side=7)
    shown = page.Picture("p", picture.resize((1000, 500)), [page.Text("", "two words", words)])
    _, data = written(tmp_path / "page.html", page.Page("t", "", ["a", "b", "c"], [shown]))
    (found,) = data["pictures"]
    assert opened(found["image"]).size == (found["width"], found["height"]) == (448, 224)
    sprite = opened(found["texts"][0]["maps"])
    values = np.asarray(sprite)
    assert values.shape == (2 * 7, 3 * 7)
    colors = np.asarray(sprite.convert("RGBA"), int)
    for row, (of, told) in enumerate(zip(words, found["texts"][0]["words"], strict=True)):
        for column in range(3):
            part = np.s_[row * 7 : row * 7 + 7, column * 7 : column * 7 + 7]
            expected = minmax(of.maps[column]).numpy()
            np.testing.assert_allclose(values[part] / 63, expected, atol=0.51 / 63)
            # The larger, the brighter and the less transparent.
            order = expected.ravel().argsort()
            for light in (colors[part][..., :3].sum(-1), colors[part][..., 3]):
                assert (np.diff(light.ravel()[order]) >= -2).all() and light.max() > 2 * light.min()
            y, x = np.unravel_index(expected.argmax(), expected.shape)
            assert told["peaks"][column] == pytest.approx([(x + 0.5) / 7, (y + 0.5) / 7])
        assert told["numbers"] == of.numbers and "outline" not in told and "heads" not in told


def test_maps_can_stand_without_their_picture(tmp_path):
    shown = page.Picture("p", None, [page.Text("", "cat", word_maps("cat"))])
    _, data = written(tmp_path / "page.html", page.Page("t", "", ["a", "b"], [shown]))
    (found,) = data["pictures"]
    assert (found["image"], found["width"], found["height"]) == ("", 1, 1) and found["texts"][0]["maps"]


def test_a_mask_is_outlined_between_its_cells_and_the_others(tmp_path, picture):
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(3)) > 0.6
    shown = page.Picture("p", picture, [page.Text("", "cat", word_maps("cat", mask=mask))])
    _, data = written(tmp_path / "page.html", page.Page("t", "", ["a", "b"], [shown]))
    drawn = re.findall(r"M(\d+) (\d+)([hv])1", data["pictures"][0]["texts"][0]["words"][0]["outline"])

    def inside(x, y):
        return 0 <= x < 7 and 0 <= y < 7 and bool(mask[y, x])

    expected = {(x, y, "h") for x in range(7) for y in range(8) if inside(x, y) != inside(x, y - 1)}
    expected |= {(x, y, "v") for x in range(8) for y in range(7) if inside(x, y) != inside(x - 1, y)}
    assert len(drawn) == len(expected) and {(int(x), int(y), way) for x, y, way in drawn} == expected


def test_layers_and_heads_stand_in_one_sprite_after_their_means(tmp_path, picture):
    # Sides of 16 are kept as they are.
    heads = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(4))
    words = word_maps("cat", heads=heads)
    _, data = written(
        tmp_path / "page.html",
        page.Page("t", "", ["a", "b"], [page.Picture("p", picture, [page.Text("", "cat", words)])], [2, 7, 9]),
    )
    assert data["layers"] == [2, 7, 9]
    values = np.asarray(opened(data["pictures"][0]["texts"][0]["words"][0]["heads"]))
    assert values.shape == (4 * 16, 6 * 16)
    for (layer, head), expected in {
        (0, 0): heads.mean((0, 1)),
        (0, 4): heads[:, 3].mean(0),
        (2, 0): heads[1].mean(0),
        (3, 5): heads[2, 4],
    }.items():
        part = values[layer * 16 : layer * 16 + 16, head * 16 : head * 16 + 16]
        np.testing.assert_allclose(part / 15, minmax(expected).numpy(), atol=0.51 / 15)


def test_twenty_four_pictures_stay_below_5_mb(tmp_path, picture):
    """Maps of noise, which no PNG makes small, of twice as many words as a toy scene has."""
    maps = torch.rand(25, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[3:29, 5:30] = True
    words = find_words({"answer": "word " * 25})
    shown = [
        page.WordMaps(word, page.resize_map(of, 32), [{"entropy": "5.123"}] * 4, mask)
        for word, of in zip(words, maps, strict=True)
    ]
    one = page.Picture("p", picture.resize((640, 480)), [page.Text("", "word " * 25, shown)])
    page.write(tmp_path / "page.html", page.Page("t", "", ["a", "b", "c", "d"], [one]))
    assert 24 * (tmp_path / "page.html").stat().st_size < 5e6
