"""The localisation table, on a tiny Stable Diffusion that knows nothing, against scores taken word by word."""

import pytest
import torch
from tiny_sd import build_tiny_sd

from lavender_min.evaluation import localise
from lavender_min.evaluation.flags import MeasuredData
from lavender_min.evaluation.localise import Reading
from lavender_min.geometry import MAP_SIDE
from lavender_min.teachers import attention_maps, find_recipe, stable_diffusion
from lavender_min.toy import data, world

WORD_KINDS = {"shape": world.SHAPES, "color": world.COLORS, "size": world.SIZES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(build_tiny_sd(tmp_path_factory.mktemp("sd")))


def true_masks(example):
    """{(field, start, end): mask} from the scene itself."""
    scene, question, answer = data.make(example.id)
    seen = torch.from_numpy(world.visible_masks(scene, MAP_SIDE))
    return {
        (field, start, end): seen[list(things)].any(0)
        for field, line in (("question", question), ("answer", answer))
        for start, end, things in line.mentions
        if things
    }


def test_scores_equal_those_taken_word_by_word(folder):
    sd = stable_diffusion.load(folder)
    # The first with words of every kind.
    examples = localise.captions(MeasuredData(split="tune"), 6)
    assert [example.id for example in examples] == [f"tune-{i:05d}-caption" for i in range(6)]
    readings = [Reading(None, False), Reading(8, True)]
    scores, seconds = localise.localise(sd, examples, find_recipe("noise", timesteps=[300]), readings, batch_size=2)
    assert seconds > 0 and set(scores) == set(readings)
    for side, content_norm in readings:
        hits = {kind: [] for kind in WORD_KINDS}
        for example in examples:
            (found,) = attention_maps.word_maps(
                sd, attention_maps.frame_image(example.image(), sd.side)[None], [example.fields], [example.id],
                find_recipe("noise", timesteps=[300])._replace(resolutions=side and {side: 1.0}, content_norm=content_norm),
            )  # fmt: skip
            masks = true_masks(example)
            for word, map in zip(found.words, found.maps, strict=True):
                for kind, texts in WORD_KINDS.items():
                    if word.text in texts and word[1:] in masks:
                        mask = masks[word[1:]]
                        hit, inside = mask.flatten()[map.argmax()], map[mask].sum() / map.sum()
                        hits[kind].append([float(hit), float(inside), float(mask.float().mean())])
        assert list(scores[side, content_norm]) == list(hits)
        for kind, each in hits.items():
            torch.testing.assert_close(
                torch.tensor(scores[side, content_norm][kind]), torch.tensor(each).mean(0), rtol=1e-3, atol=1e-6
            )


def test_the_table_has_a_row_for_every_recipe_and_resolution(folder, monkeypatch):
    trials = {"invert": find_recipe("invert", inversion_steps=1), "noise": find_recipe("noise", timesteps=[9])}
    monkeypatch.setattr(localise, "TRIALS", trials)
    text, best = localise.localisation_table(localise.captions(MeasuredData(split="tune"), 2), folder)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    names = [(name, layers) for name in trials for layers in ("all", "8²", "4²")]
    head = ["recipe", "layers", "pointing, shape", "pointing, color", "pointing, size", "mass, shape", "s a picture"]
    assert rows[0] == head
    assert [tuple(row[:2]) for row in rows[2:-1]] == [("chance", ""), *names]
    points = {(row[0], row[1]): float(row[2]) for row in rows[3:-1]}  # for shapes
    assert best == pytest.approx(max(points.values()), abs=1e-3)
    assert rows[-1][1].endswith(", content norm") and points[rows[-1][0], rows[-1][1].split(",")[0]] == max(
        points.values()
    )


def test_one_line_says_which_data_can_be_localised_on(capsys):
    assert localise.main(["--data", "flickr30k"]) == 2
    assert capsys.readouterr().err.startswith("localise: --data flickr30k has no regions: ")
    assert localise.main(["--scenes", "513"]) == 2
    assert capsys.readouterr().err == "localise: --scenes 513: there are 512 captions\n"
