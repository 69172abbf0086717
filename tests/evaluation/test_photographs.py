"""Stage 3 on photographs with boxes: teacher, untuned, plain and Lavender on a small Flickr30k with Entities."""

import json
import subprocess

import pytest
from entities_folder import toy_flickr
from mask_maps import store_of
from tiny_sd import build_tiny_sd

from lavender_min import data
from lavender_min.evaluation import calibration, command, compare, localise
from lavender_min.evaluation.metrics import pointing
from lavender_min.evaluation.sheet import make_sheet
from lavender_min.maps import MapStore
from lavender_min.teachers import find_recipe
from lavender_min.tuning.command import main as train

SCENES = 6


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
    """The flags that name the data, and its examples. Picture 2 is broken."""
    pictures, entities = toy_flickr(tmp_path_factory.mktemp("photographs"), SCENES)
    (pictures / "flickr30k-images" / "2.jpg").write_bytes(b"<html>gone</html>")
    flags = ["--data", "flickr30k", "--data_root", str(pictures), "--split", "all", "--entities", str(entities)]
    return flags, data.load("flickr30k", pictures, "all", entities=entities)


@pytest.fixture(scope="module")
def store(flickr, tmp_path_factory):
    """What extract.py would leave of it: each word's map is its mask, or noise."""
    folder = tmp_path_factory.mktemp("store")
    store_of(folder, [example for example in flickr[1] if example.picture != "2.jpg"])
    return str(folder)


@pytest.fixture(scope="module")
def runs(vlm_folder, store_folder, tmp_path_factory):
    """A finished run without alignment and one with it."""
    root = tmp_path_factory.mktemp("runs")
    for name, more in {"plain": ["--plain"], "lavender": ["--match", "all"]}.items():
        flags = ["--data", "toy", "--vlm", vlm_folder, "--maps", store_folder, "--limit", "6", "--max_steps", "1"]
        assert train([*flags, "--disable_tqdm", "true", "--output_dir", str(root / name), *more]) == 0
    return root


def test_the_four_are_measured_by_type_of_phrase(flickr, store, runs, tmp_path, monkeypatch, capsys):
    flags, examples = flickr
    called = []

    def run(words):
        called.append(words[3:])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    models = ["--plain", str(runs / "plain"), "--lavender", str(runs / "lavender")]
    argv = [*flags, *models, "--maps", store, "--scenes", str(SCENES), "--out", str(tmp_path)]
    assert command.main(argv) == 0
    # extract.py is asked for what is missing. It reads pictures and captions, and needs no boxes.
    assert called == [[*flags[:2], "--split", "all", *flags[2:4], "--limit", str(SCENES), "--maps", store]]
    out, err = capsys.readouterr()
    assert f"1 of {SCENES} examples have no maps in {store} and are left out" in err
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["models"]
    assert list(found) == [
        "an even map (chance)", "Stable Diffusion", "untuned", "plain tuning", "Lavender", "Lavender, through the Aligner"
    ]  # fmt: skip
    for measure in ("pointing", "mass", "entropy"):
        for kind in ("people", "other", "all"):
            assert all(f"{measure}.{kind}" in of["mean"] for of in found.values())
    assert found["Stable Diffusion"]["mean"]["pointing.people"] == 1 and "answers.all" not in found["untuned"]["mean"]
    # An even map points as often as the boxes are large.
    areas = [r.mask.mean() for e in examples if e.picture != "2.jpg" for r in e.regions(32) if r.kind == "people"]
    assert found["an even map (chance)"]["mean"]["pointing.people"] == pytest.approx(sum(areas) / len(areas))
    assert report["words"] == {"other": sum(report["words"].values()) - len(areas), "people": len(areas)}
    assert "pointing: other, %" in out


def test_a_teacher_alone(flickr, tmp_path, monkeypatch, capsys):
    """The broken picture is left out; without boxes the command ends in one line."""
    monkeypatch.setattr(localise, "TRIALS", {"noise": find_recipe("noise", timesteps=[9])})
    sd = str(build_tiny_sd(tmp_path))
    flags = flickr[0]
    assert localise.main([*flags, "--sd", sd, "--scenes", str(SCENES - 1)]) == 0
    out, err = capsys.readouterr()
    head, _, chance, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines())
    assert "1 pictures cannot be read and are left out; the first: " in err and "2.jpg: not a picture" in err
    assert set(head[2:4]) == {"pointing, people", "pointing, other"} and [row[1] for row in rows[:3]] == [
        "all",
        "8²",
        "4²",
    ]
    whole = [example for example in flickr[1] if example.picture != "2.jpg"]
    areas = [r.mask.mean() for e in whole for r in e.regions(32) if f"pointing, {r.kind}" == head[2]]
    assert float(chance[2]) == pytest.approx(sum(areas) / len(areas), abs=1e-3)
    assert localise.main([*flags[:-2], "--sd", sd]) == 2
    assert "localise: --data flickr30k has no regions" in capsys.readouterr().err


def test_words_of_no_kind_have_one_column(tmp_path, flickr, monkeypatch, capsys):
    examples = [
        example._replace(regions=lambda side, of=example.regions: [r._replace(kind="") for r in of(side)])
        for example in flickr[1][:2]
    ]
    monkeypatch.setattr(localise, "TRIALS", {"noise": find_recipe("noise", timesteps=[9])})
    table, _ = localise.localisation_table(examples, str(build_tiny_sd(tmp_path)))
    assert "| pointing, all | mass, all |" in table.splitlines()[0]


def test_trust_is_calibrated_on_it(flickr, store, tmp_path, capsys):
    argv = [*flickr[0], "--maps", store, "--out", str(tmp_path / "plot.png")]
    assert calibration.main(argv) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("|").split("|")]
    words = sum(len(example.regions(32)) for example in flickr[1] if example.picture != "2.jpg")
    assert cells[1] == str(words) and cells[2:8] == ["100.0"] * 6


def test_maps_of_a_square_are_not_measured_by_whole_pictures(flickr, store, tmp_path):
    whole = MapStore(store)
    sheet = make_sheet([example for example in flickr[1] if example.id in whole], whole)
    assert pointing(sheet.maps, sheet.masks).mean() == 1
    (tmp_path / "recipe.json").write_text('{"frame": "crop"}')
    with pytest.raises(ValueError, match="has maps of parts of pictures .--frame crop.: extract with --frame whole"):
        make_sheet([], MapStore(tmp_path))
