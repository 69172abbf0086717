"""A part of the data that is held out: which, what is logged of it, and what the Trainer does with it."""

import json

import pytest
import torch
from fitting import make
from safetensors.torch import load_file
from starting import flags_of, start, steps, weights
from torch.nn import functional as F

from lavender_min.data import Example
from lavender_min.maps import MapStore
from lavender_min.toy import data as toy
from lavender_min.tuning import checkpoints, parts
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.trainer import ByLength


@pytest.fixture(scope="module")
def command(vlm_folder, store_folder):
    return lambda out, *more: flags_of(vlm_folder, store_folder, out, *more)


def evaluations(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "eval_loss" in entry]


def test_pictures_are_held_out_and_never_single_texts():
    examples = [Example(f"{p}-{i}", lambda: None, "", "a", f"picture {p}") for p in range(20) for i in range(5)]
    examples += [Example(f"alone-{i}", lambda: None, "", "a") for i in range(20)]
    train, held_out = parts.share_out(examples, 0.1)
    assert sorted(map(parts.shown, [*train, *held_out])) == sorted(map(parts.shown, examples))
    assert not {*map(parts.shown, train)} & {*map(parts.shown, held_out)}
    assert len({*map(parts.shown, held_out)}) == 4
    # A larger share holds out these and more.
    assert {e.id for e in held_out} < {e.id for e in parts.share_out(examples, 0.3).held_out}
    with pytest.raises(ValueError, match="--eval_share 0.9 of 2 pictures leaves none to train on"):
        parts.share_out(examples[-2:], 0.9)


def test_losses_of_both_kinds_are_logged_and_are_those_of_the_saved_model(command, vlm_folder, store_folder, tmp_path):
    more = [
        "--eval_share",
        "0.25",
        "--per_device_eval_batch_size",
        "3",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
    ]
    assert start(command(tmp_path, *more)) == 0
    found = evaluations(tmp_path)
    assert [entry["step"] for entry in found] == [2, 4]

    held_out = parts.share_out(toy.load("tune")[:16], 0.25).held_out
    rows = MappedExamples(held_out, MapStore(store_folder))
    from lavender_min.tuning import runs

    model, processor = runs.build(runs.recall(tmp_path), trained=tmp_path)
    model.eval()
    collate = Collator(processor, model.family, model.base.config)
    sums = {"loss": 0.0, "loss_vlm": 0.0, "loss_att": 0.0}
    for at in range(0, len(rows), 3):
        chosen = [rows[i] for i in range(at, min(at + 3, len(rows)))]
        with torch.no_grad():
            out = model(**collate(chosen))
        sums = {name: total + float(out[name]) * len(chosen) for name, total in sums.items()}
    for name, total in sums.items():
        assert found[-1][f"eval_{name}"] == pytest.approx(total / len(rows), rel=1e-4), name


def test_a_validation_changes_no_step_of_plain_tuning_and_is_on_the_same_pictures(command, tmp_path):
    aligned, plain = tmp_path / "aligned", tmp_path / "plain"
    for folder, more in ((aligned, []), (plain, ["--plain"])):
        assert start(command(folder, "--eval_share", "0.25", *more)) == 0
    held = [json.loads((folder / "lavender.json").read_text())["decides"] for folder in (aligned, plain)]
    assert held[0]["the validation examples"] == held[1]["the validation examples"]
    # Once an epoch is the default.
    assert len(evaluations(plain)) >= 1 and "eval_loss_att" not in evaluations(plain)[0]


def test_pictures_that_are_held_out_are_cached_too(command, tmp_path):
    found = []
    for more in ([], ["--cache_vision"]):
        folder = tmp_path / str(len(more))
        assert start(command(folder, "--eval_share", "0.25", *more)) == 0
        found.append([entry["eval_loss"] for entry in evaluations(folder)])
    assert found[0] and found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("metric", ["loss", "loss_vlm"])
def test_the_best_checkpoint_is_what_is_left(command, tmp_path, metric):
    more = [
        "--eval_share",
        "0.25",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
        "--learning_rate",
        "0.3",
    ]
    more += ["--load_best_model_at_end", "true", "--metric_for_best_model", metric, "--save_total_limit", "4"]
    assert start(command(tmp_path, *more)) == 0
    by = {entry["step"]: entry[f"eval_{metric}"] for entry in evaluations(tmp_path)}
    best = tmp_path / f"checkpoint-{min(by, key=by.get)}"
    assert weights(tmp_path) == weights(best)
    # So too where it was killed just before it said so.
    (tmp_path / "trainer_state.json").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    assert start(command(tmp_path, *more)) == 0 and weights(tmp_path) == weights(best)


def test_the_rate_falls_when_the_loss_stands_still(command, tmp_path):
    more = [
        "--eval_share",
        "0.25",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--lr_scheduler_type",
        "reduce_lr_on_plateau",
    ]
    more += ["--lr_scheduler_kwargs", '{"patience": 0, "threshold": 100, "factor": 0.5}', "--learning_rate", "1e-4"]
    assert start(command(tmp_path, *more)) == 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates[-1] < rates[0] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval_split", "tune"], "--eval_split tune shares"),
        (["--eval_split", "tune", "--eval_share", "0.1"], "--eval_share and --eval_split exclude each other"),
        (["--eval_share", "0"], "--eval_share must be above 0 and below 1; got 0.0"),
        (["--eval_share", "nan"], "--eval_share must be above 0"),
        (["--eval_split", "heldout"], "none of the"),
    ],
)
def test_a_part_that_cannot_be_is_one_line(command, tmp_path, capsys, more, message):
    assert start(command(tmp_path / "out", *more)) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


# ------------------------------------------------------------------------------------------- other flags of the Trainer


def test_texts_of_one_length_go_together_and_come_back_on_resuming(command, tmp_path):
    lengths = [int(n) for n in torch.randint(1, 99, (64,), generator=torch.Generator().manual_seed(0))]
    sampler = ByLength(8, lengths, 42)
    order = list(sampler)
    assert sorted(order) == list(range(64)) and order == list(sampler)
    spread = [
        max(lengths[i] for i in order[k : k + 8]) - min(lengths[i] for i in order[k : k + 8]) for k in range(0, 64, 8)
    ]
    # Of 98, and of about 80 in any order.
    assert sum(spread) / len(spread) < 50
    sampler.set_epoch(1)
    assert order != list(sampler)

    more = ["--train_sampling_strategy", "group_by_length", "--save_steps", "1", "--max_steps", "6"]
    assert start(command(tmp_path / "whole", *more)) == 0
    assert start(command(tmp_path / "broken", *more, "--max_steps", "5")) == 0
    assert checkpoints.step_of(tmp_path / "broken") == 5
    # The schedule knows of the fewer steps, the order of the texts does not.
    assert start(command(tmp_path / "broken", *more)) == 0
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")
    assert logged(tmp_path / "broken")[-1]["words_per_sample"] == logged(tmp_path / "whole")[-1]["words_per_sample"]


def test_a_validation_goes_in_order_whatever_the_training_does(command, tmp_path):
    more = ["--eval_share", "0.25", "--per_device_eval_batch_size", "3", "--eval_on_start", "--max_steps", "1"]
    for name in ("group_by_length", "random"):
        assert start(command(tmp_path / name, *more, "--train_sampling_strategy", name)) == 0
    [one, *_], [two, *_] = (evaluations(tmp_path / name) for name in ("group_by_length", "random"))
    assert (one["eval_loss_vlm"], one["eval_loss_att"]) == (two["eval_loss_vlm"], two["eval_loss_att"])


def logged(folder):
    return [e for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss_vlm" in e]


def test_label_smoothing_is_that_of_the_cross_entropy(vlm_folder, store_folder):
    model, processor = make(vlm_folder, plain=True)
    rows = MappedExamples(toy.load("tune", 2), MapStore(store_folder))
    batch = Collator(processor, model.family, model.base.config)([rows[0], rows[1]])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "words")}
    plain = model.train()(**batch)["loss_vlm"]
    model.label_smoothing = 0.3
    logits = model.host(**inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    of_label = -logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100].mean()
    of_all = -logits.mean(-1)[labels != -100].mean()
    torch.testing.assert_close(model(**batch)["loss_vlm"], 0.7 * of_label + 0.3 * of_all)
    torch.testing.assert_close(plain, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(model.eval()(**batch)["loss_vlm"], plain)


def test_noise_on_the_embeddings_changes_the_run_and_leaves_with_it(command, tmp_path):
    for name, more in (("with", ["--neftune_noise_alpha", "5"]), ("without", [])):
        assert start(command(tmp_path / name, *more)) == 0
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without"))
    assert a.keys() == b.keys() and any(not torch.equal(a[name], b[name]) for name in a)
