"""What changes over a run: the Aligner trained alone at first, and λ."""

import math

import pytest
import torch
from fitting import fit, host_state, make, trainer_of
from starting import flags_of, start, weights

from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning import runs
from lavender_min.tuning.collator import MappedExamples
from lavender_min.tuning.flags import Flags
from lavender_min.tuning.schedules import aligner_steps
from lavender_min.tuning.trainer import LavenderTrainer


@pytest.fixture
def rows(store_folder):
    return MappedExamples(data.load("tune", 8), MapStore(store_folder))


@pytest.fixture(scope="module")
def command(vlm_folder, store_folder):
    return lambda out, *more: flags_of(vlm_folder, store_folder, out, *more)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# ----------------------------------------------------------------------------------------------- the Aligner trained alone


@pytest.mark.parametrize(
    ("given", "steps", "expected"),
    [(0, 50, 0), (0.1, 50, 5), (0.3, 7, 2), (0.01, 5, 1), (0.999, 5, 5), (1, 50, 1), (3, 50, 3)],
)
def test_a_share_of_the_run_is_so_many_steps(given, steps, expected):
    assert aligner_steps(given, steps) == expected


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_host_stays_bit_equal_for_a_share_of_the_run_and_not_a_step_longer(vlm_folder, rows, tmp_path, mode):
    """0.4 of 5 steps are 2. What is not `align.` is the host, whose every bit is compared, buffers too."""
    made, seen = make(vlm_folder, mode=mode), []

    class Watched(LavenderTrainer):
        def training_step(self, *args, **kwargs):
            seen.append({name: value.clone() for name, value in self.lavender.state_dict().items()})
            return super().training_step(*args, **kwargs)

    trainer = trainer_of(made, rows, tmp_path, steps=5, batch=2, pretrain=0.4, weight_decay=0.1)
    trainer.__class__ = Watched
    trainer.train()
    seen.append({name: value.clone() for name, value in trainer.lavender.state_dict().items()})
    for step, now in enumerate(seen):
        moved = {name for name, value in now.items() if not torch.equal(value, seen[0][name])}
        assert any(name.startswith("align.") for name in moved) == (step > 0)
        assert any(name.startswith("host.") for name in moved) == (step > 2)


@pytest.mark.parametrize("value", ["1.5", "-1", "-0.1", "nan", "inf", "2.0001"])
def test_what_is_neither_share_nor_steps_is_refused(command, tmp_path, capsys, value):
    assert start(command(tmp_path / "out", "--pretrain_aligner_steps", value)) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: --pretrain_aligner_steps must be a share of the run below 1, such as 0.1, or a ")
    assert f"got {value}" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_plain_tuning_has_no_aligner_to_train_first():
    with pytest.raises(ValueError, match="--pretrain_aligner_steps 3 trains the Aligner, and --plain has none"):
        Flags(plain=True, pretrain_aligner_steps=3.0)


# ------------------------------------------------------------------------------------------------------------------- λ


@pytest.mark.parametrize(
    ("schedule", "accumulated", "expected"),
    [
        ("linear", 1, [10, 7.5, 5, 2.5]),
        ("cosine", 2, [10, 5 + 5 * math.sqrt(0.5), 5, 5 - 5 * math.sqrt(0.5)]),
    ],
)
def test_lambda_falls_and_is_what_the_loss_takes(vlm_folder, rows, tmp_path, schedule, accumulated, expected):
    """The logged loss is the two parts with the λ of that step; batches of equal texts, so that means of parts are exact."""
    same_texts = [rows[0]] * 8

    def falling(trainer):
        trainer.lambda_schedule = schedule

    _, logged = fit(
        vlm_folder, same_texts, tmp_path, steps=4, batch=2, gradient_accumulation_steps=accumulated, prepare=falling
    )
    assert [entry["lambda_att"] for entry in logged] == pytest.approx(expected)
    for entry, value in zip(logged, expected, strict=True):
        assert entry["loss"] == pytest.approx(entry["loss_vlm"] + value * entry["loss_att"], rel=2e-4)


def test_a_step_equals_one_of_a_run_with_that_lambda(vlm_folder, rows, tmp_path):
    """Gradients of the second of two steps, λ = 10 · 1/2, are those of a constant λ of 5 on the same weights."""
    model, processor = make(vlm_folder)
    batch = trainer_of((model, processor), rows, tmp_path).data_collator([rows[0], rows[1]])
    found = []
    for value, scale in ((10.0, 0.5), (5.0, 1.0)):
        model.zero_grad()
        model.lambda_att = value
        model(**batch, lambda_scale=scale)["loss"].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert same(*found)


def test_a_validation_takes_the_whole_lambda(vlm_folder, rows, tmp_path):
    def measured(schedule):
        trainer = trainer_of(make(vlm_folder), rows, tmp_path, steps=4, batch=2)
        trainer.lambda_schedule, trainer.state.max_steps, trainer.state.global_step = schedule, 4, 3
        return trainer.evaluate(rows)["eval_loss"]

    assert measured("linear") == measured("constant")


def test_a_constant_lambda_logs_nothing_and_changes_no_bit(vlm_folder, rows, tmp_path):
    """Beside a trainer that passes the model no λ at all."""

    class Without(LavenderTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs, num_items_in_batch=num_items_in_batch)
            return (out["loss"], out) if return_outputs else out["loss"]

    def without(trainer):
        trainer.__class__ = Without

    now, logged = fit(vlm_folder, rows, tmp_path, steps=2, batch=2)
    before, _ = fit(vlm_folder, rows, tmp_path, steps=2, batch=2, prepare=without)
    assert same(host_state(now), host_state(before)) and "lambda_att" not in logged[0]


def test_a_falling_lambda_comes_back_on_resuming(command, tmp_path, monkeypatch):
    """Stopped after 2 of 4 steps, as a power cut would, and gone on: the same weights as of the unbroken run."""
    more = ["--lambda_schedule", "cosine", "--pretrain_aligner_steps", "0.25", "--save_steps", "1"]
    assert start(command(tmp_path / "whole", *more)) == 0
    step = LavenderTrainer.training_step

    def cut(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise OSError("the power is gone")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LavenderTrainer, "training_step", cut)
        assert start(command(tmp_path / "broken", *more)) == 2
    assert start(command(tmp_path / "broken", *more)) == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert runs.recall(tmp_path / "whole").lambda_schedule == "cosine"


def test_a_schedule_that_is_none_is_refused(command, tmp_path, capsys):
    assert start(command(tmp_path / "out", "--lambda_schedule", "step")) == 2
    said = capsys.readouterr().err
    assert "--lambda-schedule: invalid choice: 'step'" in said and said.count("\n") == 1
