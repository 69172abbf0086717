"""Pictures of word maps for TensorBoard, which change nothing of the run."""

import pytest
import torch
from fitting import fit, state

from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning.callbacks import WordMapPictures
from lavender_min.tuning.collator import MappedExamples


def test_pictures_come_every_n_steps_and_change_nothing(vlm_folder, store_folder, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = MappedExamples(data.load("tune", 8), MapStore(store_folder))
    flags = {"lora_dropout": 0.1, "aligner_norm": "batch"}
    seen, _ = fit(
        vlm_folder, rows, tmp_path / "seen", flags=flags, report_to="tensorboard",
        prepare=lambda trainer: trainer.add_callback(WordMapPictures(trainer, 2)),
    )  # fmt: skip
    unseen, _ = fit(vlm_folder, rows, tmp_path / "unseen", flags=flags)
    for (name, a), b in zip(state(seen).items(), state(unseen).values(), strict=True):
        assert torch.equal(a, b), name

    [folder] = {path.parent for path in (tmp_path / "seen").rglob("events.*")}
    log = events.EventAccumulator(str(folder))
    log.Reload()
    assert log.Tags()["images"] == ["words/0", "words/1"]
    shown = log.Images("words/0")
    assert [image.step for image in shown] == [0, 2]
    words = sum(word.field == "answer" for word in rows[0][1].words)
    assert shown[0].width == 160 * words and shown[0].height == 3 * 175  # Stable Diffusion's, the host's, the Aligner's
    assert shown[0].encoded_image_string != shown[1].encoded_image_string
