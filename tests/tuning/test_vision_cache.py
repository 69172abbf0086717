"""A cached vision tower runs once a picture and changes no loss."""

import shutil

import pytest
import torch
from fitting import fit, host_state, make, trainer_of
from safetensors.torch import load_file

from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning.collator import MappedExamples
from lavender_min.tuning.vision_cache import cache_vision


@pytest.fixture(scope="module")
def rows(store_folder):
    return MappedExamples(data.load("tune", 8), MapStore(store_folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_those_of_the_uncached_run(vlm_folder, rows, tmp_path, dtype):
    """Two epochs over 8 pictures with a caption and a question each; kept as computed, so bfloat16 loses nothing either."""
    model = make(vlm_folder, dtype)
    runs, seen = [], []
    model[0].base.model.vision_model.register_forward_hook(lambda module, args, out: runs.append(seen[:]))

    def cache(trainer):
        cache_vision(trainer, tmp_path / "vision")
        assert len(runs) == 8  # once a picture
        cache_vision(trainer, tmp_path / "vision")
        seen.append("and never again")

    options = {"steps": 8, "bf16": dtype == torch.bfloat16}
    cached, one = fit(vlm_folder, rows, tmp_path, model=model, prepare=cache, **options)
    assert len(runs) == 8
    files = list((tmp_path / "vision").iterdir())
    assert len(files) == 8
    assert load_file(files[0])["states"].dtype == dtype
    plain, two = fit(vlm_folder, rows, tmp_path, model=make(vlm_folder, dtype), **options)
    for a, b in zip(one, two, strict=True):
        for name in ("loss_vlm", "loss_att"):
            assert a[name] == pytest.approx(b[name], rel=1e-5 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:
        for name, p in host_state(plain).items():
            torch.testing.assert_close(host_state(cached)[name], p, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("flags", [{"mode": "full"}, {"lora_targets": ".*(multi_modal_projector|lm_head)"}])
def test_a_tower_that_trains_is_not_cached(vlm_folder, rows, tmp_path, flags):
    trainer = trainer_of(make(vlm_folder, **flags), rows, tmp_path)
    with pytest.raises(ValueError, match="--cache_vision keeps what a frozen vision tower says, but .* parameters"):
        cache_vision(trainer, tmp_path / "vision")


def test_a_disk_that_is_too_small_is_named(vlm_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    trainer = trainer_of(make(vlm_folder), rows, tmp_path)
    with pytest.raises(OSError, match="--cache_vision needs 0.0 GB in .*vision, which has 0.0 GB free"):
        cache_vision(trainer, tmp_path / "vision")
