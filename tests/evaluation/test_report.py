"""Measures against answers known by hand, intervals against published ones, and tables that hide no loss."""

import json
import math

import numpy as np
import pytest
import torch

from lavender_min.data import Example
from lavender_min.evaluation import measures, report
from lavender_min.evaluation.measures import Sheet
from lavender_min.maps import MapStore, MapWriter
from lavender_min.toy import data as toy
from lavender_min.words import find_words

G = 32


def one_cell(y, x, value=1.0):
    grid = torch.zeros(G, G)
    grid[y, x] = value
    return grid


def block(y, x, side):
    mask = torch.zeros(G, G, dtype=torch.bool)
    mask[y : y + side, x : x + side] = True
    return mask


# ------------------------------------------------------------------------------------------------------- measures


def test_pointing_right_wrong_and_tied():
    masks = block(4, 8, 4).expand(4, G, G)
    half = one_cell(5, 9) + one_cell(20, 20)  # two largest cells, one of them inside
    maps = torch.stack([one_cell(4, 8), one_cell(8, 8), half, torch.ones(G, G)])
    assert measures.pointing(maps, masks).tolist() == [1.0, 0.0, 0.5, 16 / 1024]


def test_mass_inside():
    masks = block(0, 0, 16).expand(3, G, G)
    maps = torch.stack([torch.ones(G, G), 0.25 * one_cell(0, 0) + 0.75 * one_cell(31, 31), torch.zeros(G, G)])
    assert measures.mass_inside(maps, masks).tolist() == [0.25, 0.25, 0.0]


def test_alignment_own_and_others():
    """Two things a picture, one cell each: a map equal to its target has error 0, and 2 cells of 1024 against the other."""
    masks = torch.stack([block(0, 0, 2), block(0, 0, 2), block(10, 10, 2), block(0, 0, 2)])
    targets = torch.stack([one_cell(0, 0, 0.3), one_cell(1, 1, 0.7), one_cell(10, 10, 0.1), one_cell(0, 0)])
    own, other = measures.alignment(targets, targets, masks, ["a", "a", "a", "b"])
    assert own[:3].abs().max() < 1e-9
    # Words 0 and 1 name the same thing, so only word 2 counts against them; both count against word 2.
    torch.testing.assert_close(other[:3], torch.full((3,), 2 / 1024), rtol=1e-4, atol=0)
    assert own[3].isnan() and other[3].isnan()  # alone in its picture
    swapped, _ = measures.alignment(targets[[2, 1, 0, 3]], targets, masks, ["a", "a", "a", "b"])
    torch.testing.assert_close(swapped[:3], torch.tensor([2, 0, 2]) / 1024, rtol=1e-4, atol=1e-9)


def test_alignment_is_a_mean_over_the_others():
    masks = torch.stack([block(0, 0, 2), block(10, 10, 2), block(20, 20, 2)])
    maps = torch.rand(3, G, G, generator=torch.Generator().manual_seed(0))
    own, other = measures.alignment(maps, maps.flip(0), masks, ["a"] * 3)
    stretched = [(m - m.min()) / (m.max() - m.min()) for m in maps]
    aims = stretched[::-1]
    assert own[0].item() == pytest.approx(((stretched[0] - aims[0]) ** 2).mean().item(), rel=1e-4)
    expected = sum(((stretched[0] - aims[j]) ** 2).mean().item() for j in (1, 2)) / 2
    assert other[0].item() == pytest.approx(expected, rel=1e-4)


def sheet_of(masks, maps, kinds, pictures):
    n = len(kinds)
    return Sheet([], [], [(i, 0) for i in range(n)], ["word"] * n, kinds, pictures, masks, maps)


def test_map_numbers_of_even_and_perfect_maps():
    masks = torch.stack([block(0, 0, 8), block(16, 16, 4)])
    sheet = sheet_of(masks, masks.float(), ["shape", "color"], ["a", "a"])
    chance, even = measures.chance_numbers(sheet), measures.map_numbers(torch.ones(2, G, G), sheet)
    for key in chance:
        assert chance[key] == pytest.approx(even[key], rel=1e-6), key
    assert even["entropy.all"] == pytest.approx(math.log(1024), rel=1e-6)
    assert (chance["mass.shape"], chance["pointing.color"]) == (64 / 1024, 16 / 1024)
    perfect = measures.map_numbers(masks.float(), sheet)
    assert perfect["pointing.all"] == perfect["mass.all"] == 1
    assert perfect["entropy.shape"] == pytest.approx(math.log(64), rel=1e-5)
    assert perfect["mse.own"] < 1e-9 and perfect["mse.others"] == pytest.approx(80 / 1024, rel=1e-4)
    assert "pointing.size" not in perfect  # there is none


def test_answers_are_right_as_a_whole():
    assert measures.same("  The circle  is RED\n", "the circle is red")
    assert not measures.same("the circle is red .", "the circle is red")
    assert not measures.same("red", "the circle is red") and not measures.same("", "the circle is red")
    examples = [
        Example(f"heldout-{i:05d}-{kind}", None, "?", "yes") for i, kind in enumerate(["color", "color", "count"])
    ]
    numbers = measures.answer_numbers(examples, ["yes", "no", "Yes "])
    assert numbers == {"answers.all": 2 / 3, "answers.color": 0.5, "answers.count": 1.0}


def test_the_sheet_holds_the_words_of_answers_that_name_something(tmp_path):
    examples = toy.load("heldout", 3)
    with MapWriter(tmp_path, {"frame": "whole"}) as writer:
        for example in examples:
            words = find_words(example.fields)
            maps = torch.arange(len(words)).float()[:, None, None].expand(-1, G, G)  # each holds its own number
            writer.add(example.id, example.question, example.answer, words, maps, 0.9)
    store = MapStore(tmp_path)
    sheet = measures.make_sheet(examples, store, toy.word_masks)
    assert sheet.place == sorted(sheet.place) and sheet.maps.shape == sheet.masks.shape == (len(sheet.texts), G, G)
    for n, (e, w) in enumerate(sheet.place):
        example = examples[e]
        word = find_words({"answer": example.answer})[w]
        assert word.text == sheet.texts[n]
        assert np.array_equal(toy.word_masks(example.id, G)["answer", word.start, word.end], sheet.masks[n].numpy())
        assert (sheet.maps[n] == w + len(find_words({"question": example.question}))).all()
        assert sheet.pictures[n] == example.id[:13]
    seen = {(text, kind) for text, kind in zip(sheet.texts, sheet.kinds, strict=True)}
    assert (
        ("square", "shape") in seen
        and ("green", "color") in seen
        and ("small", "size") in seen
        and ("shapes", "") in seen
    )
    expected = sum(key[0] == "answer" and mask.any() for e in examples for key, mask in toy.word_masks(e.id, G).items())
    assert len(sheet.texts) == expected
    with pytest.raises(ValueError, match="no maps for 6 of 24 examples, heldout-00003-caption the first"):
        measures.make_sheet(toy.load("heldout", 4), store, toy.word_masks)


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("freedom", range(1, 31))
def test_t_table_against_the_density(freedom):
    """Simpson's rule over Student's density from 0 to t gives 0.475."""
    x = np.linspace(0, measures.T95[freedom - 1], 20001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    y = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(x * x / freedom))
    area = (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * (x[1] - x[0]) / 3
    assert area == pytest.approx(0.475, abs=3e-5)


def test_interval_of_students_sleep_data():
    """Student (1908): additional hours of sleep, ten patients; R's t.test(paired = TRUE) gives 0.7001142 to 2.4598858."""
    mean, half = measures.interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert mean == pytest.approx(1.58) and mean - half == pytest.approx(0.7001142, abs=3e-4)
    assert measures.interval([0.5]) == (0.5, None)
    assert measures.interval([2.0, 2.0, 2.0]) == (2.0, 0.0)


def runs_of(**columns):
    """runs_of(mse_own=[1, 2]) is two runs, {"mse.own": 1} and {"mse.own": 2}."""
    count = len(next(iter(columns.values())))
    return [{key.replace("_", "."): values[i] for key, values in columns.items()} for i in range(count)]


PLAIN = runs_of(
    answers_all=[0.60, 0.70, 0.65], pointing_all=[0.40, 0.42, 0.41], mse_own=[0.05, 0.05, 0.05], entropy_all=[6, 6, 6]
)
LAVENDER = runs_of(
    answers_all=[0.50, 0.61, 0.54], pointing_all=[0.60, 0.63, 0.62], mse_own=[0.02, 0.08, 0.05], entropy_all=[5, 5, 5]
)


def test_differences_are_paired_and_name_the_winner_either_way():
    found = report.differences(PLAIN, LAVENDER)
    assert found["answers.all"].mean == pytest.approx(-0.10) and found["answers.all"].winner == "plain tuning"
    # The differences −0.10, −0.09, −0.11 have s = 0.01, so the interval is 4.303 · 0.01 / √3.
    assert found["answers.all"].half == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert found["pointing.all"].excludes_zero and found["pointing.all"].winner == "Lavender"
    assert not found["mse.own"].excludes_zero and found["mse.own"].winner == ""
    assert found["entropy.all"].excludes_zero and found["entropy.all"].winner == ""  # neither way is better
    one = report.differences(PLAIN[:1], LAVENDER[:1])["answers.all"]
    assert (one.half, one.excludes_zero, one.winner) == (None, None, "")
    assert report.differences(PLAIN, LAVENDER[:2]) == {}


def test_a_smaller_error_wins():
    better = report.differences(runs_of(mse_own=[0.05, 0.06]), runs_of(mse_own=[0.02, 0.03]))
    assert better["mse.own"].winner == "Lavender"


# ---------------------------------------------------------------------------------------------------------- tables


def test_tables_show_intervals_and_losses():
    models = {report.SD: [{"pointing.all": 0.9}], report.PLAIN: PLAIN, report.LAVENDER: LAVENDER}
    main = report.main_table(models).splitlines()
    assert main[2].startswith("| Stable Diffusion | ") and "90.0" in main[2] and "±" not in main[2]
    assert "65.0 ± 12.4" in main[3] and len({len(line) for line in main}) == 1
    lines = report.differences_table(models).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["answers right (all), %", "65.0 ± 12.4", "55.0 ± 13.8", "-10.0 ± 2.5", "yes", "plain tuning"]
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["plain tuning", "Lavender", "–", "–"]
    assert [line.split("|")[-3].strip() for line in lines[2:]] == ["yes", "yes", "no", "yes"]
    assert report.differences_table(models, ("mse.own",)).count("\n") == 2
    assert report.differences_table({report.PLAIN: PLAIN}) == ""


def test_numbers_are_spelled_in_their_units():
    assert report.spell("answers.all", 0.7125, 0.021) == "71.2 ± 2.1"
    assert report.spell("mse.own", -0.00001, None, sign=True) == "+0.0000"
    assert report.spell("mse.ratio", 0.6666, None) == "0.67"
    assert report.spell("entropy.all", math.log(1024), 0.0) == "6.931 ± 0.000"


def tiny_sheet():
    examples = toy.load("heldout", 6)
    with_words = [e for e in examples if any(f == "answer" for f, *_ in toy.word_masks(e.id, G))]
    rows = []
    for e in with_words:
        for (_, start, end), mask in sorted((k, m) for k, m in toy.word_masks(e.id, G).items() if k[0] == "answer"):
            rows.append((e, e.answer[start:end], torch.from_numpy(mask)))
    kinds = [next((k for k, words in measures.WORD_KINDS.items() if text in words), "") for _, text, _ in rows]
    masks = torch.stack([mask for *_, mask in rows])
    place = [(with_words.index(e), 0) for e, *_ in rows]
    texts, pictures = [text for _, text, _ in rows], [e.id[:13] for e, *_ in rows]
    return Sheet(
        with_words, with_words, place, texts, kinds, pictures, masks, masks.float()
    )  # an Example has an answer too


def test_words_to_show_are_of_several_pictures_and_kinds():
    sheet = tiny_sheet()
    chosen = report.choose(sheet, 5)
    assert len({sheet.pictures[i] for i in chosen}) == 5
    assert [sheet.kinds[i] for i in chosen][:2] == ["shape", "color"] and "size" in {sheet.kinds[i] for i in chosen}


def test_files(tmp_path):
    sheet = tiny_sheet()
    history = [{"step": s, "loss_vlm": 1 / s, "loss_att": 0.1 / s} for s in (1, 2, 3)]
    runs = [report.Run(report.PLAIN, f"p{i}", {}, history) for i in range(3)]
    runs += [report.Run(report.LAVENDER, f"l{i}", {}, history) for i in range(3)]
    models = {report.SD: [{"pointing.all": 0.9}], report.PLAIN: PLAIN, report.LAVENDER: LAVENDER}
    about = {
        "commands": ["python evaluate.py"],
        "versions": {"torch": "9.9"},
        "recipe": {"recipe": "paper"},
        "host": "some/model",
        "scenes": 6,
    }
    report.draw_maps(
        tmp_path / "maps.png", sheet, report.choose(sheet, 2), {report.SD: sheet.maps, report.LAVENDER: sheet.maps}
    )
    assert report.draw_curves(tmp_path / "curves.png", runs)
    assert not report.draw_curves(tmp_path / "none.png", [report.Run(report.PLAIN, "p", {}, [{"step": 1}])])
    report.write(tmp_path, sheet, models, runs, about, ["maps.png", "curves.png"])
    text, content = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert (
        "python evaluate.py" in text
        and "torch 9.9" in text
        and "![maps](maps.png)" in text
        and "taken run by run, 3 pairs" in text
    )
    assert "| plain tuning: p2 " in text and "0.3333" in text
    assert content["models"]["plain tuning"]["runs"] == PLAIN
    assert content["models"]["Lavender"]["mean"]["pointing.all"] == pytest.approx(0.6166667)
    assert content["lavender_minus_plain"]["answers.all"]["winner"] == "plain tuning"
    assert not (tmp_path / "none.png").exists() and (tmp_path / "maps.png").stat().st_size > 10_000
    report.write(tmp_path, sheet, {**models, report.LAVENDER: LAVENDER[:2]}, runs[:-1], about, [])
    assert "No differences are given" in (tmp_path / "report.md").read_text()
