"""Every figure is drawn once its runs are there, and none before."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_ledger_runs import fill

from lavender_min import data
from lavender_min.evaluation import figures as shared
from lavender_min.ledger import declared, figures, measures, plan, runs, stores
from lavender_min.toy import data as toy


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """The declared claims on the one host that is there, with made-up numbers in the place of all runs."""
    monkeypatch.setattr(plan, "host_digest", lambda host: host)
    monkeypatch.setattr(figures, "is_there", lambda host: host == "mllama")
    for split, scenes in (("crowd_1024", 6), ("crowd_test", 2)):
        monkeypatch.setitem(toy.SPLITS, split, toy.SPLITS[split]._replace(scenes=scenes))
    setup = declared.setup()
    setup = setup._replace(seeds=[0, 1], measured=setup.measured | {"crowd_test": 2}, curve_scenes=2)
    found = runs.Ledger(tmp_path, setup, declared.claims(setup))
    for split in ("crowd_1024", "crowd_test"):
        fill(stores.folder(tmp_path, split, "sd"), data.load("toy", split=split))
    return found


def write(ledger, run, words, draw):
    names = [f"{split}/answers.all" for split in run.measured]
    names += [f"curve{quarter}/{name}" for quarter in range(1, 5) for name in ("answers.all", "mse.own")]
    kind = {"teacher": "sd", "masks": "masks"}.get(run.arm, "own")
    counts = torch.randint(0, 9, (measures.BINS,), generator=draw).tolist()
    maps = {f"{at}{kind}": torch.rand(words, 32, 32, generator=draw)
            for at in ("", *(f"curve{q}/" for q in range(1, 5))) for kind in ("own", "aligned")}  # fmt: skip
    file = ledger.file(run)
    file.parent.mkdir(exist_ok=True)
    save_file(maps, file.with_suffix(".safetensors"))
    numbers = {name: torch.rand((), generator=draw).item() for name in names}
    file.write_text(json.dumps({"measures": numbers, "extents": {kind: counts}}))


def test_every_figure_is_drawn_when_its_runs_are_there(ledger, tmp_path):
    split = next(iter(ledger.setup.measured))
    words = len(shared.choose(measures.sheet_of(stores.folder(ledger.out, split, "sd"), split, 2)))
    draw = torch.Generator().manual_seed(0)
    # Only what needs no run.
    assert [path.name for path in figures.draw_all(ledger, tmp_path / "few")] == ["trust.png"]
    # The trials of the choices first, then what depends on them.
    for _ in range(2):
        for run in ledger.known_plan().runs.values():
            if run.host == "mllama" and not ledger.file(run).exists():
                write(ledger, run, words, draw)
    assert not [
        run for run in ledger.whole_plan().runs.values() if run.host == "mllama" and not ledger.file(run).exists()
    ]
    drawn = figures.draw_all(ledger, tmp_path / "all")
    assert [path.name for path in drawn] == [*(f"{name}_mllama.png" for name in figures.FIGURES), "trust.png"]
    assert all(caption.endswith("(`mllama`).") for path, caption in drawn.items() if path.name != "trust.png")
    for path in drawn:
        with Image.open(path) as image:
            assert min(image.size) > 200


def test_gains_are_a_share_of_plain_tuning():
    gains = figures.relative([{"a": 0.4}, {"a": 0.6}], [{"a": 0.5}, {"a": 0.6}], "a")
    assert gains == pytest.approx([20, 0])
