"""The pages of evaluate.py and of `lavender_min.maps show`: the words they hold, and that their numbers are those of the tables."""

import json
import re

import pytest
import torch
from mask_maps import store_of
from safetensors.torch import save_file

from lavender_min import page
from lavender_min.evaluation import command, figures, metrics, models, own_picture
from lavender_min.evaluation.models import Loaded
from lavender_min.evaluation.names import SD, UNTUNED
from lavender_min.evaluation.sheet import make_sheet
from lavender_min.geometry import contrast
from lavender_min.hosts import load as hosts
from lavender_min.maps import MapStore, entropy
from lavender_min.maps.__main__ import main as maps_main
from lavender_min.toy import data as toy
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import Lavender
from lavender_min.words import find_words


def content(path):
    return json.loads(re.findall(r'id="data">(.*?)</script>', path.read_text(), re.S)[0])


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    examples = toy.load("heldout", 26)
    folder = tmp_path_factory.mktemp("held")
    store_of(folder, examples)
    return make_sheet(examples, MapStore(folder))


def test_the_page_of_a_comparison_says_what_is_measured(sheet, tmp_path):
    maps = {SD: sheet.maps, UNTUNED: torch.rand(sheet.maps.shape, generator=torch.Generator().manual_seed(1))}
    figures.write_page(tmp_path / "page.html", sheet, maps, "whole")
    found = content(tmp_path / "page.html")
    assert found["names"] == [SD, UNTUNED]
    assert [picture["name"] for picture in found["pictures"]] == list(dict.fromkeys(sheet.pictures))[:24]
    words = [word for picture in found["pictures"] for text in picture["texts"] for word in text["words"]]
    # The sheet's first words, in its order.
    assert 24 < len(words) < len(sheet.texts) and [word["text"] for word in words] == sheet.texts[: len(words)]
    assert all(word["outline"] == page.outline(sheet.masks[i]) for i, word in enumerate(words))
    for column, of in enumerate(maps.values()):
        told = [word["numbers"][column] for word in words]
        for key, values, scale in (
            ("pointing", metrics.pointing(of, sheet.masks), 100),
            ("mass", metrics.mass_inside(of, sheet.masks), 100),
            ("entropy", entropy(of), 1),
        ):
            shown = torch.tensor([float(numbers[key]) for numbers in told])
            torch.testing.assert_close(shown, scale * values[: len(words)], rtol=0, atol=0.06 if scale > 1 else 6e-4)
        if column == 0:
            trust = torch.tensor([float(numbers["trust"]) for numbers in told])
            torch.testing.assert_close(trust, contrast(of)[: len(words)], rtol=0, atol=6e-3)
        else:
            assert all("trust" not in numbers for numbers in told)


def test_layers_and_heads_of_a_batch_have_its_own_maps_as_their_mean(vlm_folder):
    host, processor, family = hosts.load(vlm_folder)
    loaded = Loaded(Lavender(host, family).eval(), processor, "predicting")
    image, text = toy.load("heldout", 1)[0].image(), "a small green square"
    words = find_words({"answer": text})
    batch = own_picture.said(loaded, image, "what is it", text, words)
    heads = models.heads_of_batch(loaded.model, batch)
    shape = next(iter(family.layers(host).values()))
    assert heads.shape == (4, len(loaded.model.layers), family.heads(shape).query, 32, 32)
    own = models.maps_of_batch(loaded.model, batch)["own"]
    torch.testing.assert_close(heads.mean((1, 2)), own)
    # They differ from each other.
    assert (heads.std((1, 2)).mean() > 1e-3 * own.mean()).item()


def test_a_page_of_ones_own_picture(vlm_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own_picture, "LONGEST", 9)
    # A host with random weights may say nothing.
    monkeypatch.setattr(models, "answer", lambda *_: ["one small square"])
    toy.load("heldout", 1)[0].image().resize((150, 90)).save(tmp_path / "mine.jpg")
    model, *_ = runs.build(ModelFlags(vlm_folder))
    run = tmp_path / "run"
    model.host.save_pretrained(run)
    runs.remember(ModelFlags(vlm_folder), run)
    save_file(model.align.state_dict(), run / runs.ALIGN_FILE)
    asked = ["--image", str(tmp_path / "mine.jpg"), "--adapter", str(run), "--out", str(tmp_path / "out"), "--html"]
    assert command.main(asked) == 0
    assert "mine.html is to be opened in a browser" in capsys.readouterr().out
    found = content(tmp_path / "out" / "mine.html")
    assert found["names"] == list(own_picture.TITLES.values()) and found["layers"] == model.layers
    (text,) = found["pictures"][0]["texts"]
    assert [word["text"] for word in text["words"]] == ["one", "small", "square"]
    assert all(word["heads"].startswith("data:image/png") and len(word["numbers"]) == 2 for word in text["words"])

    # The page does not replace the picture, however that is named.
    (tmp_path / "mine.jpg").rename(tmp_path / "mine.html")
    asked = ["--image", str(tmp_path / "mine.html"), "--vlm", vlm_folder, "--out", str(tmp_path), "--html"]
    assert command.main(asked) == 2 and "would write over" in capsys.readouterr().err


def test_a_page_of_a_store(store_folder, tmp_path, capsys):
    where = tmp_path / "shown.html"
    assert maps_main(["show", store_folder, "--n", "3", "--data", "toy", "--html", str(where)]) == 0
    assert str(where) in capsys.readouterr().out
    found, store = content(where), MapStore(store_folder)
    assert len(found["pictures"]) == 3 and found["pictures"][0]["width"] == toy.SIDE
    for picture in found["pictures"]:
        stored, (text,) = store[picture["name"]], picture["texts"]
        assert [word["text"] for word in text["words"]] == [word.text for word in stored.words]
        trust = [float(word["numbers"][0]["trust"]) for word in text["words"]]
        assert trust == pytest.approx(contrast(stored.maps.float()).tolist(), abs=6e-3)
        spread = [float(word["numbers"][0]["entropy"]) for word in text["words"]]
        assert spread == pytest.approx(entropy(stored.maps.float()).tolist(), abs=6e-4)
