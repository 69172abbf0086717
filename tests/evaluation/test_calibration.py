"""Calibration against counts made by hand: pairs one by one, fifths by sorting."""

import math

import numpy as np
import pytest
import torch

from lavender_min.evaluation import calibration
from lavender_min.toy import data as toy


def test_auc_counts_pairs():
    draw = torch.Generator().manual_seed(0)
    # Few values, so that many tie.
    scores, right = torch.randint(0, 6, (57,), generator=draw).float(), torch.rand(57, generator=draw) < 0.4
    pairs = [(a, b) for a in scores[right].tolist() for b in scores[~right].tolist()]
    assert calibration.auc(scores, right) == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert calibration.auc(torch.tensor([1.0, 2.0]), torch.tensor([False, True])) == 1
    assert math.isnan(calibration.auc(scores, torch.ones(57, dtype=torch.bool)))


def test_fifths_go_from_flat_maps_to_sharp_ones():
    """Ten words: word i has one cell of i + 1 above the rest, so its contrast grows with i; the last six are right."""
    maps, masks = torch.ones(10, 8, 8), torch.zeros(10, 8, 8, dtype=torch.bool)
    masks[:, 0, 0] = True
    for i in range(10):
        maps[i, *((0, 0) if i >= 4 else (5, 5))] += i + 1
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    found = calibration.calibrate(maps[order], masks[order])
    assert (found.words, found.right, found.auc, found.by_fifth) == (10, 0.6, 1.0, [0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="4 words with a mask cannot be cut into fifths"):
        calibration.calibrate(maps[:4], masks[:4])


def test_the_command_prints_a_row_a_store(store_folder, tmp_path, capsys, monkeypatch):
    """The fixture's maps are exact masks where a word has one, so every map is right."""
    monkeypatch.setattr(toy, "TUNING_SCENES", 8)
    out = tmp_path / "new" / "plot.png"
    assert calibration.main(["--maps", store_folder, store_folder, "--out", str(out)]) == 0
    head, _, row, *_ = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:8] == ["100.0"] * 6 and int(cells[1]) > 10 and cells[8] == "nan" and "AUC" in head
    assert out.stat().st_size > 1000
    assert calibration.main(["--maps", str(tmp_path)]) == 2
    assert calibration.main(["--data", "flickr30k", "--maps", store_folder]) == 2
