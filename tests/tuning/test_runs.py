"""What the folder of a run remembers: that it is another run, that it is at its end, what of it can still be read."""

import dataclasses
import fcntl
import json
import shutil

import pytest
import torch
from PIL import Image
from starting import digests, flags_of, start, steps, weights
from transformers import TrainingArguments

from lavender_min import data
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps import MapWriter
from lavender_min.toy import data as toy
from lavender_min.tuning import arguments, checkpoints, runs, tune
from lavender_min.tuning.collator import MappedExamples
from lavender_min.tuning.flags import Flags
from lavender_min.words import find_words


@pytest.fixture(scope="module")
def command(vlm_folder, store_folder):
    return lambda out, *more: flags_of(vlm_folder, store_folder, out, *more)


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A run of 4 steps with a checkpoint at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    assert start(command(folder, "--save_steps", "2")) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


# ------------------------------------------------------------------------------------------------------- another run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--learning_rate", "0.5"], "--learning_rate 0.0001 ─► 0.5"),
        (["--seed", "7"], "--seed 42 ─► 7"),
        (["--per_device_train_batch_size", "2"], "--per_device_train_batch_size 4 ─► 2"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps 1 ─► 2"),
        (["--lr_scheduler_type", "cosine"], "--lr_scheduler_type linear ─► cosine"),
        (["--optim", "sgd"], "--optim adamw_torch_fused ─► sgd"),
        (["--weight_decay", "0.1"], "--weight_decay 0.0 ─► 0.1"),
        (["--bf16", "--use_cpu"], "--bf16 False ─► True"),
        (["--pretrain_aligner_steps", "1"], "--pretrain_aligner_steps 0 ─► 1"),
        (["--pretrain_aligner_steps", "0.25"], "--pretrain_aligner_steps 0 ─► 0.25"),
        (["--lambda_schedule", "linear"], "--lambda_schedule constant ─► linear"),
        (["--limit", "12"], "the examples 16 with sha256 "),
        (["--lora_r", "4"], "--lora_r 8 ─► 4"),
    ],
)
def test_a_run_with_another_result_is_refused_by_name(command, copy, capsys, more, said):
    before = digests(copy)
    assert start(command(copy, "--save_steps", "2", *more)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and digests(copy) == before


def test_a_run_of_several_processes_does_not_go_on_with_one(copy, command, capsys):
    """Its steps would take other batches, and be counted otherwise."""
    file = copy / "lavender.json"
    held = json.loads(file.read_text())
    held["decides"]["the number of processes"] = 2
    file.write_text(json.dumps(held))
    assert start(command(copy)) == 2 and "the number of processes 2 ─► 1" in capsys.readouterr().err


def test_other_maps_and_other_pictures_are_another_run(copy, command, store_folder, tmp_path, capsys, monkeypatch):
    others = shutil.copytree(store_folder, tmp_path / "others")
    (others / "recipe.json").write_text('{"frame": "crop"}')
    argv = command(copy)
    argv[argv.index(store_folder)] = str(others)
    assert start(argv) == 2 and "the maps' frame whole ─► crop" in capsys.readouterr().err
    examples = toy.load("tune", 8)
    painted = [example._replace(image=lambda e=example: e.image().rotate(180)) for example in examples]
    assert MappedExamples(examples, None).digest() == MappedExamples(list(examples), None).digest()
    assert MappedExamples(examples, None).digest() != MappedExamples(painted, None).digest()
    worded = [examples[0]._replace(answer="else"), *examples[1:]]
    assert MappedExamples(examples, None).digest() != MappedExamples(worded, None).digest()


def test_every_flag_of_the_trainer_decides_or_is_named_as_one_that_does_not():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert names >= arguments.NO_DIFFERENCE
    assert {
        "learning_rate",
        "seed",
        "data_seed",
        "optim",
        "bf16",
        "fp16",
        "max_grad_norm",
    } <= names - arguments.NO_DIFFERENCE


def test_more_steps_and_other_output_are_no_difference(command, copy, capsys):
    assert start(command(copy, "--save_steps", "3", "--max_steps", "6", "--logging_steps", "2")) == 0
    assert f"going on from {copy}/checkpoint-4" in capsys.readouterr().out
    assert checkpoints.step_of(copy) == 6


def test_a_run_of_an_older_version_is_still_known(copy, command, capsys):
    file = copy / "lavender.json"
    held = json.loads(file.read_text())
    del held["decides"], held["attend"]
    file.write_text(json.dumps(held))
    assert runs.recall(copy).attend == "predicting"
    assert start(command(copy)) == 0 and json.loads(file.read_text())["decides"]["--seed"] == 42
    capsys.readouterr()
    assert start(command(copy, "--seed", "1")) == 2 and "--seed 42 ─► 1" in capsys.readouterr().err


@pytest.mark.parametrize("held", ["{}", "null", "[1]", '{"vlm": 5}', '{"vlm": "x", "mode": "none"}', '{"vl', ""])
def test_a_memory_that_is_not_one_is_named(copy, command, capsys, held):
    (copy / "lavender.json").write_text(held)
    assert start(command(copy)) == 2
    err = capsys.readouterr().err
    assert f"{copy}/lavender.json" in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- at its end


def test_a_finished_run_started_again_changes_no_byte(command, copy, capsys):
    before = digests(copy)
    for more in ([], ["--max_steps", "3"], ["--max_steps", "-1", "--num_train_epochs", "1"]):
        capsys.readouterr()
        assert start(command(copy, "--save_steps", "2", *more)) == 0
        assert "finished with 4 steps: nothing is left to do" in capsys.readouterr().out
        assert digests(copy) == before


def test_a_run_killed_before_its_final_save_takes_no_more_step(command, finished, copy, capsys):
    for name in ("trainer_state.json", "lavender.safetensors"):
        (copy / name).unlink()
    (copy / "adapter_model.safetensors").write_bytes(b"half")
    assert start(command(copy, "--save_steps", "2")) == 0
    assert "checkpoint-4 is the end of this run" in capsys.readouterr().out
    assert weights(copy) == weights(finished) and steps(copy) == steps(finished)
    assert set(digests(copy)) == set(digests(finished))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("examples", "batch", "accumulation", "epochs"), [(16, 4, 1, 1), (15, 4, 3, 2), (7, 2, 4, 1.3)]
)
def test_steps_are_counted_as_the_trainer_counts_them(
    vlm_folder, tmp_path, examples, batch, accumulation, epochs, drop_last
):
    from fitting import make, trainer_of

    trainer = trainer_of(
        make(vlm_folder, plain=True), MappedExamples(toy.load("tune", 16)[:examples], None), tmp_path, steps=-1, batch=batch,
        gradient_accumulation_steps=accumulation, num_train_epochs=epochs, dataloader_drop_last=drop_last,
    )  # fmt: skip
    counted = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert checkpoints.total_steps(trainer.args, examples) == counted


def test_a_batch_that_is_never_full_is_refused(command, tmp_path, capsys):
    more = ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "32"]
    assert start(command(tmp_path / "out", *more)) == 2
    assert "--dataloader_drop_last true leaves nothing to train on: 16 examples" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- what can still be read


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "lavender.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_cut_checkpoint_is_named_and_the_one_before_taken(command, finished, copy, capsys, name):
    (copy / "trainer_state.json").unlink()
    file = copy / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-100])
    assert start(command(copy, "--save_steps", "2")) == 0
    said = capsys.readouterr()
    assert f"checkpoint-4 is passed over: {file}: " in said.err and "checkpoint-2" in said.out
    assert weights(copy) == weights(finished)


def test_a_checkpoint_without_its_optimiser_is_an_end_and_no_beginning(command, tmp_path, capsys):
    more = ["--save_steps", "2", "--save_only_model", "true"]
    assert start(command(tmp_path, *more)) == 0
    (tmp_path / "trainer_state.json").unlink()
    assert start(command(tmp_path, *more)) == 0 and "checkpoint-4 is the end of this run" in capsys.readouterr().out
    assert start(command(tmp_path, *more, "--max_steps", "6")) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}/checkpoint-4 holds a model alone, as --save_only_model wants it" in err


def test_no_checkpoint_that_can_be_read_is_one_line(command, copy, capsys):
    (copy / "trainer_state.json").unlink()
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    assert start(command(copy, "--save_steps", "2")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        f"no checkpoint in {copy} can be read" in lines[-1]
        and "delete them" in lines[-1]
        and "Traceback" not in str(lines)
    )


def test_a_checkpoint_asked_for_by_name_is_taken_whole_or_named(command, finished, copy, tmp_path, capsys):
    before = copy / "checkpoint-2"
    assert start(command(tmp_path / "new", "--resume_from_checkpoint", before)) == 0
    assert f"going on from {before}" in capsys.readouterr().out and weights(tmp_path / "new") == weights(finished)
    (before / "scheduler.pt").write_bytes(b"PK half")
    assert start(command(tmp_path / "other", "--resume_from_checkpoint", before)) == 2
    assert f"{before}/scheduler.pt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ nobody writes over anything


def test_two_runs_do_not_share_a_folder(command, copy, capsys):
    with open(copy / checkpoints.LOCK_FILE, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert start(command(copy)) == 2
    err = capsys.readouterr().err
    assert f"another train.py is at work in {copy}" in err and err.count("\n") == 1


def test_no_output_replaces_an_input(vlm_folder, store_folder, tmp_path, capsys):
    host = shutil.copytree(vlm_folder, tmp_path / "host")
    before = digests(host)
    assert start(flags_of(str(host), store_folder, host, "--full")) == 2
    assert f"--output_dir {host} would write over --vlm {host}" in capsys.readouterr().err and digests(host) == before
    assert start(flags_of(vlm_folder, store_folder, store_folder)) == 2
    assert "would write over --maps" in capsys.readouterr().err
    of_run = shutil.copytree(vlm_folder, tmp_path / "run" / "checkpoint-9")
    assert start(flags_of(str(of_run), store_folder, tmp_path / "run", "--full")) == 2


def test_maps_of_another_picture_or_text_are_refused(tmp_path):
    """The same file names and texts, another picture: training would take its maps for this one's."""
    (tmp_path / "data.jsonl").write_text('{"id": "one", "image": "1.png", "text": "a red dog"}\n')
    Image.new("RGB", (40, 30), "red").save(tmp_path / "1.png")
    [example] = data.load("folder", tmp_path)
    words = find_words(example.fields)
    with MapWriter(tmp_path / "maps", {"frame": "whole"}) as writer:
        maps = torch.rand(len(words), MAP_SIDE, MAP_SIDE)
        writer.add("one", "", "a red dog", words, maps, 0.5, data.picture_digest(example))
    [own] = Flags(data=["folder"], maps=[str(tmp_path / "maps")]).sets
    assert len(tune.chosen(own, False, [example], "examples")) == 1
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="1 of 1 examples have changed since their maps were made .the picture of one"):
        tune.chosen(own, False, [example], "examples")
    with pytest.raises(
        ValueError, match=r"the text of one, for one.: make those again by python extract.py --data folder"
    ):
        tune.chosen(own, False, [example._replace(answer="a red cat")], "examples")
    # Plain tuning uses no maps.
    assert len(tune.chosen(own, True, [example], "examples")) == 1


def test_a_checkpoint_whose_state_lacks_what_the_trainer_asks_for_is_passed_over(tmp_path, capsys):
    for step, callbacks in ((1, {"TrainerControl": {}}), (2, {})):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "stateful_callbacks": callbacks}))
    assert checkpoints.last_checkpoint(tmp_path).step == 1
    said = capsys.readouterr().err
    assert "checkpoint-2 is passed over" in said and "stateful_callbacks.TrainerControl: field required" in said
