"""Measures against answers known by hand, intervals against published ones, and tables that hide no loss."""

import json
import math

import numpy as np
import pytest
import torch

from lavender_min.data import Example, Region
from lavender_min.evaluation import figures, intervals, metrics, names, report, side_by_side, tables
from lavender_min.evaluation.sheet import Sheet, first_pictures, make_sheet
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
    assert metrics.pointing(maps, masks).tolist() == [1.0, 0.0, 0.5, 16 / 1024]


def test_mass_inside():
    masks = block(0, 0, 16).expand(3, G, G)
    maps = torch.stack([torch.ones(G, G), 0.25 * one_cell(0, 0) + 0.75 * one_cell(31, 31), torch.zeros(G, G)])
    assert metrics.mass_inside(maps, masks).tolist() == [0.25, 0.25, 0.0]


def test_alignment_own_and_others():
    """Two things a picture, one cell each: a map equal to its target has error 0, and 2 cells of 1024 against the other."""
    masks = torch.stack([block(0, 0, 2), block(0, 0, 2), block(10, 10, 2), block(0, 0, 2)])
    targets = torch.stack([one_cell(0, 0, 0.3), one_cell(1, 1, 0.7), one_cell(10, 10, 0.1), one_cell(0, 0)])
    own, other = metrics.alignment(targets, targets, masks, ["a", "a", "a", "b"])
    assert own[:3].abs().max() < 1e-9
    # Words 0 and 1 name the same thing, so only word 2 counts against them; both count against word 2.
    torch.testing.assert_close(other[:3], torch.full((3,), 2 / 1024), rtol=1e-4, atol=0)
    assert own[3].isnan() and other[3].isnan()  # alone in its picture
    swapped, _ = metrics.alignment(targets[[2, 1, 0, 3]], targets, masks, ["a", "a", "a", "b"])
    torch.testing.assert_close(swapped[:3], torch.tensor([2, 0, 2]) / 1024, rtol=1e-4, atol=1e-9)


def test_alignment_is_a_mean_over_the_others():
    masks = torch.stack([block(0, 0, 2), block(10, 10, 2), block(20, 20, 2)])
    maps = torch.rand(3, G, G, generator=torch.Generator().manual_seed(0))
    own, other = metrics.alignment(maps, maps.flip(0), masks, ["a"] * 3)
    stretched = [(m - m.min()) / (m.max() - m.min()) for m in maps]
    aims = stretched[::-1]
    assert own[0].item() == pytest.approx(((stretched[0] - aims[0]) ** 2).mean().item(), rel=1e-4)
    expected = sum(((stretched[0] - aims[j]) ** 2).mean().item() for j in (1, 2)) / 2
    assert other[0].item() == pytest.approx(expected, rel=1e-4)


def sheet_of(masks, maps, kinds, pictures):
    n = len(kinds)
    order = list(dict.fromkeys(kind for kind in kinds if kind))
    return Sheet([], [], [(i, 0) for i in range(n)], ["word"] * n, kinds, pictures, masks, maps, order)


def test_map_numbers_of_even_and_perfect_maps():
    masks = torch.stack([block(0, 0, 8), block(16, 16, 4)])
    sheet = sheet_of(masks, masks.float(), ["shape", "color"], ["a", "a"])
    chance, even = metrics.chance_numbers(sheet), metrics.map_numbers(torch.ones(2, G, G), sheet)
    for key in chance:
        assert chance[key] == pytest.approx(even[key], rel=1e-6), key
    assert even["entropy.all"] == pytest.approx(math.log(1024), rel=1e-6)
    assert (chance["mass.shape"], chance["pointing.color"]) == (64 / 1024, 16 / 1024)
    perfect = metrics.map_numbers(masks.float(), sheet)
    assert perfect["pointing.all"] == perfect["mass.all"] == 1
    assert perfect["entropy.shape"] == pytest.approx(math.log(64), rel=1e-5)
    assert perfect["mse.own"] < 1e-9 and perfect["mse.others"] == pytest.approx(80 / 1024, rel=1e-4)
    assert "pointing.size" not in perfect  # there is none


def test_answers_are_right_as_a_whole():
    assert metrics.same("  The circle  is RED\n", "the circle is red")
    assert not metrics.same("the circle is red .", "the circle is red")
    assert not metrics.same("red", "the circle is red") and not metrics.same("", "the circle is red")
    kinds = ["color", "color", "count"]
    examples = [Example(str(i), lambda: None, "?", "yes", kind=kind) for i, kind in enumerate(kinds)]
    numbers = metrics.answer_numbers(examples, ["yes", "no", "Yes "])
    assert numbers == {"answers.all": 2 / 3, "answers.color": 0.5, "answers.count": 1.0}
    assert metrics.answer_numbers([Example("a", lambda: None, "?", "yes")], ["yes"]) == {"answers.all": 1.0}


def test_the_sheet_holds_the_words_of_answers_that_name_something(tmp_path):
    examples = toy.load("heldout", 3)
    with MapWriter(tmp_path, {"frame": "whole"}) as writer:
        for example in examples:
            words = find_words(example.fields)
            maps = torch.arange(len(words)).float()[:, None, None].expand(-1, G, G)  # each holds its own number
            writer.add(example.id, example.question, example.answer, words, maps, 0.9)
    store = MapStore(tmp_path)
    sheet = make_sheet(examples, store)
    assert sheet.place == sorted(sheet.place) and sheet.maps.shape == sheet.masks.shape == (len(sheet.texts), G, G)
    for n, (e, w) in enumerate(sheet.place):
        example = examples[e]
        word = find_words({"answer": example.answer})[w]
        assert word.text == sheet.texts[n]
        (region,) = (r for r in example.regions(G) if r[:3] == ("answer", word.start, word.end))
        assert np.array_equal(region.mask, sheet.masks[n].numpy())
        assert (sheet.maps[n] == w + len(find_words({"question": example.question}))).all()
        assert sheet.pictures[n] == example.id[:13]
    seen = {(text, kind) for text, kind in zip(sheet.texts, sheet.kinds, strict=True)}
    assert (
        ("square", "shape") in seen
        and ("green", "color") in seen
        and ("small", "size") in seen
        and ("shapes", "") in seen
    )
    assert sheet.kind_order == ["shape", "color", "size"]
    expected = sum(region.field == "answer" for e in examples for region in e.regions(G))
    assert len(sheet.texts) == expected
    with pytest.raises(ValueError, match="no maps for 6 of 24 examples, heldout-00003-caption the first"):
        make_sheet(toy.load("heldout", 4), store)


def dog_data(tmp_path):
    """Two captions of one photograph and a question about another, of data that is not the toy's."""

    def regions_of(word, kind, corner):
        def regions(side):
            mask = np.zeros((side, side), bool)
            mask[corner : corner + 4, corner : corner + 4] = True
            return [Region("answer", 2, 2 + len(word), kind, mask)]

        return regions

    examples = [
        Example("1.jpg#0", lambda: None, "", "A dog.", picture="1.jpg", regions=regions_of("dog", "animals", 3)),
        Example("1.jpg#1", lambda: None, "", "A cart.", picture="1.jpg", regions=regions_of("cart", "vehicles", 20)),
        Example("9", lambda: None, "Where?", "A lawn", kind="where", regions=regions_of("lawn", "", 9)),
    ]
    with MapWriter(tmp_path, {"frame": "whole"}) as writer:
        for example in examples:
            words = find_words(example.fields)
            writer.add(example.id, example.question, example.answer, words, torch.ones(len(words), G, G), 0.9)
    return examples, MapStore(tmp_path)


def test_any_data_with_regions_can_be_measured(tmp_path):
    examples, store = dog_data(tmp_path)
    sheet = make_sheet(examples, store)
    assert (sheet.texts, sheet.kinds) == (["dog", "cart", "lawn"], ["animals", "vehicles", ""])
    assert (sheet.pictures, sheet.kind_order) == (["1.jpg", "1.jpg", "9"], ["animals", "vehicles"])
    numbers = metrics.map_numbers(sheet.masks.float() + 1e-3, sheet)
    assert numbers["pointing.animals"] == numbers["pointing.vehicles"] == numbers["pointing.all"] == 1
    assert list(numbers)[:3] == ["pointing.all", "pointing.animals", "pointing.vehicles"]
    models = {names.CHANCE: [metrics.chance_numbers(sheet)], names.SD: [numbers]}
    assert [c.strip() for c in tables.main_table(models).splitlines()[0].split("|")][2:5] == [
        "answers, %", "pointing: animals, %", "pointing: all, %",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="example 9 has no regions: it does not say where the things"):
        make_sheet([*examples[:2], examples[2]._replace(regions=None)], store)
    with pytest.raises(ValueError, match="no answer of the 1 examples holds a word with a region"):
        make_sheet([examples[0]._replace(regions=lambda side: [])], store)


def test_first_pictures_are_counted_by_picture_not_by_text(tmp_path):
    examples, _ = dog_data(tmp_path)
    assert [e.id for e in first_pictures(examples, 1)] == ["1.jpg#0", "1.jpg#1"]
    assert first_pictures(examples, 2) == examples
    with pytest.raises(ValueError, match="--scenes 3: there are 2 held-out pictures"):
        first_pictures(examples, 3)


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("freedom", range(1, 31))
def test_t_table_against_the_density(freedom):
    """Simpson's rule over Student's density from 0 to t gives 0.475."""
    x = np.linspace(0, intervals.T95[freedom - 1], 20001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    y = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(x * x / freedom))
    area = (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * (x[1] - x[0]) / 3
    assert area == pytest.approx(0.475, abs=3e-5)


def test_interval_of_students_sleep_data():
    """Student (1908): additional hours of sleep, ten patients; R's t.test(paired = TRUE) gives 0.7001142 to 2.4598858."""
    mean, half = intervals.interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert mean == pytest.approx(1.58) and mean - half == pytest.approx(0.7001142, abs=3e-4)
    assert intervals.interval([0.5]) == (0.5, None)
    assert intervals.interval([2.0, 2.0, 2.0]) == (2.0, 0.0)


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
    found = intervals.differences(PLAIN, LAVENDER)
    assert found["answers.all"].mean == pytest.approx(-0.10) and found["answers.all"].winner == "plain tuning"
    # The differences −0.10, −0.09, −0.11 have s = 0.01, so the interval is 4.303 · 0.01 / √3.
    assert found["answers.all"].half == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert found["pointing.all"].excludes_zero and found["pointing.all"].winner == "Lavender"
    assert not found["mse.own"].excludes_zero and found["mse.own"].winner == ""
    assert found["entropy.all"].excludes_zero and found["entropy.all"].winner == ""  # neither way is better
    one = intervals.differences(PLAIN[:1], LAVENDER[:1])["answers.all"]
    assert (one.half, one.excludes_zero, one.winner) == (None, None, "")
    assert intervals.differences(PLAIN, LAVENDER[:2]) == {}


def test_a_smaller_error_wins():
    better = intervals.differences(runs_of(mse_own=[0.05, 0.06]), runs_of(mse_own=[0.02, 0.03]))
    assert better["mse.own"].winner == "Lavender"


# ---------------------------------------------------------------------------------------------------------- tables


def test_tables_show_intervals_and_losses():
    models = {names.SD: [{"pointing.all": 0.9}], names.PLAIN: PLAIN, names.LAVENDER: LAVENDER}
    main = tables.main_table(models).splitlines()
    assert main[2].startswith("| Stable Diffusion | ") and "90.0" in main[2] and "±" not in main[2]
    assert "65.0 ± 12.4" in main[3] and len({len(line) for line in main}) == 1
    lines = tables.differences_table(models).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["answers right (all), %", "65.0 ± 12.4", "55.0 ± 13.8", "-10.0 ± 2.5", "yes", "plain tuning"]
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["plain tuning", "Lavender", "–", "–"]
    assert [line.split("|")[-3].strip() for line in lines[2:]] == ["yes", "yes", "no", "yes"]
    assert tables.differences_table(models, ("mse.own",)).count("\n") == 2
    assert tables.differences_table({names.PLAIN: PLAIN}) == ""


def test_numbers_are_spelled_in_their_units():
    assert names.spell("answers.all", 0.7125, 0.021) == "71.2 ± 2.1"
    assert names.spell("mse.own", -0.00001, None, sign=True) == "+0.0000"
    assert names.spell("mse.ratio", 0.6666, None) == "0.67"
    assert names.spell("entropy.all", math.log(1024), 0.0) == "6.931 ± 0.000"


def tiny_sheet():
    examples = [e for e in toy.load("heldout", 6) if any(r.field == "answer" for r in e.regions(G))]
    found = [(n, r) for n, e in enumerate(examples) for r in e.regions(G) if r.field == "answer"]
    masks = torch.stack([torch.from_numpy(region.mask) for _, region in found])
    return Sheet(
        examples,
        [],
        [(n, 0) for n, _ in found],
        [examples[n].answer[region.start : region.end] for n, region in found],
        [region.kind for _, region in found],
        [examples[n].picture for n, _ in found],
        masks,
        masks.float(),
        ["shape", "color", "size"],
    )


def test_words_to_show_are_of_several_pictures_and_kinds():
    sheet = tiny_sheet()
    chosen = figures.choose(sheet, 5)
    assert len({sheet.pictures[i] for i in chosen}) == 5
    assert [sheet.kinds[i] for i in chosen] == ["shape", "color", "shape", "size", "shape"]
    one_kind = sheet._replace(kinds=["animal"] * len(sheet.kinds), kind_order=["animal"])
    no_kind = sheet._replace(kinds=[""] * len(sheet.kinds), kind_order=[])
    assert len({sheet.pictures[i] for i in figures.choose(one_kind, 5)}) == 5
    assert len({sheet.pictures[i] for i in figures.choose(no_kind, 5)}) == 5


def test_files(tmp_path):
    sheet = tiny_sheet()
    history = [{"step": s, "loss_vlm": 1 / s, "loss_att": 0.1 / s} for s in (1, 2, 3)]
    runs = [report.Run(names.PLAIN, f"p{i}", {}, history) for i in range(3)]
    runs += [report.Run(names.LAVENDER, f"l{i}", {}, history) for i in range(3)]
    models = {names.SD: [{"pointing.all": 0.9}], names.PLAIN: PLAIN, names.LAVENDER: LAVENDER}
    about = {
        "commands": ["python evaluate.py"],
        "versions": {"torch": "9.9"},
        "recipe": {"recipe": "paper"},
        "host": "some/model",
        "scenes": 6,
    }
    figures.draw_maps(
        tmp_path / "maps.png", sheet, figures.choose(sheet, 2), {names.SD: sheet.maps, names.LAVENDER: sheet.maps}
    )
    assert figures.draw_curves(tmp_path / "curves.png", runs)
    assert not figures.draw_curves(tmp_path / "none.png", [report.Run(names.PLAIN, "p", {}, [{"step": 1}])])
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
    assert content["minus_plain"]["Lavender"]["answers.all"]["winner"] == "plain tuning"
    assert not (tmp_path / "none.png").exists() and (tmp_path / "maps.png").stat().st_size > 10_000
    report.write(tmp_path, sheet, {**models, names.LAVENDER: LAVENDER[:2]}, runs[:-1], about, [])
    assert "No differences are given" in (tmp_path / "report.md").read_text()


def test_reports_of_several_hosts_as_one_table(tmp_path, capsys):
    runs = [{"answers.all": 0.25, "answers.color": 0.5, "pointing.shape": 0.125, "pointing.all": 1.0}]
    for host, models in (("one", {names.SD: runs, names.UNTUNED: runs}), ("two", {names.PLAIN: runs * 2})):
        (tmp_path / host).mkdir()
        content = {"models": {name: {"runs": of} for name, of in models.items()}}
        (tmp_path / host / "report.json").write_text(json.dumps(content))
    assert side_by_side.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    head, _, first, second = capsys.readouterr().out.strip().splitlines()
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["one", "untuned", "25.0", "50.0", "12.5", "100.0"]
    assert [cell.strip() for cell in second.strip("|").split("|")][1:3] == ["plain tuning", "25.0 ± 0.0"]
    assert "pointing game (shape), %" in head
    assert side_by_side.main([str(tmp_path)]) == 2
