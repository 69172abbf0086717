"""A store made of the data's own masks: the exact ones of the toy world, boxes of photographs; and training that it teaches."""

import json
import math

import pytest
import torch
from entities_folder import toy_flickr

from lavender_min import data
from lavender_min.maps import MapStore
from lavender_min.maps.__main__ import main
from lavender_min.toy import data as toy
from lavender_min.tuning.command import main as train


def exact(example):
    return {region[:3]: region.mask for region in example.regions(32)}


def same_as_masks(store, examples):
    """How many words there are; each one's map is its mask, to the last bit."""
    words = 0
    assert store.ids == [example.id for example in examples]
    for example in examples:
        stored, masks = store[example.id], exact(example)
        assert (stored.question, stored.answer) == (example.question, example.answer) and math.isnan(stored.sos)
        assert {word[1:] for word in stored.words} == masks.keys()
        for word, map in zip(stored.words, stored.maps, strict=True):
            assert example.fields[word.field][word.start : word.end] == word.text
            assert torch.equal(map, torch.from_numpy(masks[word[1:]]).float())
        words += len(stored.words)
    return words


def test_a_store_of_the_toy_world_holds_its_exact_masks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "TUNING_SCENES", 3)
    folder = tmp_path / "masks"
    argv = ["from-masks", "--data", "toy", "--split", "heldout", str(folder)]
    assert main(argv) == 0
    examples, store = toy.load("heldout", 3), MapStore(folder)
    words = same_as_masks(store, examples)
    # One of the answers, "no, there is no star", has no words that are anywhere.
    assert min(len(store[example.id].words) for example in examples) == 0 < words
    assert f"{folder} holds 18 examples; {words} words are new, 0 pictures were skipped" in capsys.readouterr().out
    assert {k: v for k, v in store.recipe.items() if k != "made_with"} == {
        "data": "toy", "recipe": "masks", "values": "1 inside, 0 outside", "frame": "whole", "map_side": 32
    }  # fmt: skip
    assert main(argv) == 0 and "18 examples; 0 words are new" in capsys.readouterr().out
    assert main(["check", str(folder), "--data", "toy", "--split", "heldout"]) == 0
    # As train.py reads them: words in reading order, question first.
    for id in store.ids:
        places = [("qa".index(word.field[0]), word.start) for word in store[id].words]
        assert places == sorted(places)


def test_training_is_taught_by_it(tmp_path, vlm_folder, monkeypatch):
    monkeypatch.setattr(toy, "TUNING_SCENES", 4)
    assert main(["from-masks", "--data", "toy", str(tmp_path / "masks")]) == 0
    argv = [
        "--data", "toy", "--vlm", vlm_folder, "--maps", tmp_path / "masks", "--output_dir", tmp_path / "run", "--match", "all",
        "--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "true",
    ]  # fmt: skip
    assert train(list(map(str, argv))) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss_att" in entry]
    assert len(steps) == 2 and all(0 < step["loss_att"] < 10 and step["words_per_sample"] > 0 for step in steps)


def test_boxes_of_photographs_and_what_has_none(tmp_path, capsys):
    flickr, entities = toy_flickr(tmp_path, 3)
    (flickr / "flickr30k-images" / "1.jpg").unlink()
    argv = ["from-masks", "--data", "flickr30k", "--data_root", str(flickr), str(tmp_path / "maps")]
    assert main(argv) == 2
    assert "--data flickr30k has no regions" in capsys.readouterr().err
    assert main([*argv, "--entities", str(entities)]) == 0
    said = capsys.readouterr()
    assert "1 pictures were skipped" in said.out and "skipped 1.jpg#0: " in said.err
    examples = data.load("flickr30k", flickr, entities=entities)
    assert same_as_masks(MapStore(tmp_path / "maps"), [examples[0], examples[2]]) == 4


def test_a_mask_that_covers_everything_teaches_nothing(tmp_path):
    flickr, entities = toy_flickr(tmp_path, 1)
    file = entities / "Annotations" / "0.xml"
    text = file.read_text()
    for end, value in (("xmin", 1), ("ymin", 1), ("xmax", 150), ("ymax", 100)):
        before, _, after = text.partition(f"<{end}>")
        text = f"{before}<{end}>{value}</{end}>{after.partition(f'</{end}>')[2]}"
    file.write_text(text)
    argv = ["from-masks", "--data", "flickr30k", "--data_root", str(flickr), "--entities", str(entities), str(tmp_path)]
    assert main(argv) == 0
    (example,) = data.load("flickr30k", flickr, entities=entities)
    (word,) = MapStore(tmp_path)["0.jpg#0"].words
    covers = {region[:3]: region.mask.mean() for region in example.regions(32)}
    assert sorted(covers.values())[1] == 1 and 0 < covers[word[1:]] < 1 and len(covers) == 2


def test_wrong_flags_are_one_line(tmp_path, capsys):
    assert main(["from-masks", "--data", "folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("python -m lavender_min.maps: --data folder has no regions")
    with pytest.raises(SystemExit):
        main(["from-masks", str(tmp_path)])
    assert "--data" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
