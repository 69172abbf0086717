"""train.py as a user starts it: runs that are broken off, several processes, flags and what follows from them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT, run_script
from safetensors.torch import load_file
from transformers import TrainingArguments

from lavender_min import cli
from lavender_min.hosts.mllama import Mllama
from lavender_min.tuning import arguments, checkpoints, runs
from lavender_min.tuning import command as tuning_command
from lavender_min.tuning.flags import Flags, ModelFlags


@pytest.fixture(scope="module")
def command(vlm_folder, store_folder):
    def of(out, *more):
        return [
            "train.py", "--data", "toy", "--vlm", vlm_folder, "--maps", store_folder, "--limit", "16", "--match", "all",
            "--output_dir", str(out), "--max_steps", "8", "--logging_steps", "1", "--per_device_train_batch_size", "4",
            "--disable_tqdm", "true", *more,
        ]  # fmt: skip

    return of


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    done = run_script(*command(folder))
    assert done.returncode == 0, done.stderr
    return folder


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def assert_same_losses(one, two, rel=1e-5):
    for a, b in zip(losses(one), losses(two), strict=True):
        for name in ("step", "loss", "loss_vlm", "loss_att", "words_per_sample"):
            assert a[name] == pytest.approx(b[name], rel=rel), (a, b)


WITHOUT_US = """
import sys
class Nobody:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lavender_min":
            raise ImportError(name)
sys.meta_path.insert(0, Nobody())
from transformers import AutoModelForImageTextToText
from peft import PeftModel
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
print("adapter of", sum(p.abs().sum().item() > 0 for n, p in model.named_parameters() if "lora_B" in n), "moved layers")
"""


def test_a_killed_run_ends_as_an_unbroken_one(command, unbroken, vlm_folder, tmp_path):
    """SIGKILL after the first checkpoint; Aligner, optimiser and random state come back with the host's adapter."""
    broken = tmp_path / "broken"
    flags = command(broken, "--save_steps", "2")
    process = subprocess.Popen([sys.executable, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while checkpoints.last_checkpoint(broken) is None and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "trainer_state.json").exists()  # it was killed in the middle
    again = run_script(*flags)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    assert [entry["step"] for entry in losses(unbroken)] == list(range(1, 9))
    assert_same_losses(unbroken, broken)

    adapter = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, vlm_folder, str(broken)], cwd=tmp_path, capture_output=True, text=True
    )
    assert "adapter of 12 moved layers" in adapter.stdout, adapter.stderr


def test_sigterm_saves_and_the_same_command_goes_on(command, unbroken, tmp_path):
    """In the middle of the steps, with no checkpoint due; dropout is on, so random state must come back too."""
    flags = command(tmp_path)
    process = subprocess.Popen(
        [sys.executable, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "'loss'" in line:
            process.send_signal(signal.SIGTERM)
            break
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    step = int(re.search(r"stopped by SIGTERM at step (\d+), which is saved: run the same command to go on", said)[1])
    assert checkpoints.last_checkpoint(tmp_path).step == step and step < 8
    assert "Traceback" not in errors and not (tmp_path / "trainer_state.json").exists()
    again = run_script(*flags)
    assert again.returncode == 0 and f"going on from {tmp_path}/checkpoint-{step}" in again.stdout, again.stderr
    assert_same_losses(unbroken, tmp_path)


@pytest.mark.slow
def test_two_processes_of_fsdp_train_as_one_does(command, tmp_path):
    """FSDP2 on two CPUs (gloo) from the config file, against one process that takes both batches of a step in turn.

    Losses agree to 1e-5, and a run that goes on from the first checkpoint ends with those of the whole one.
    """
    alike = ["--lora_dropout", "0", "--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_script(*command(one, *alike, "--gradient_accumulation_steps", "2"))
    assert done.returncode == 0, done.stderr
    launch = [
        "-m", "accelerate.commands.launch", "--config_file", "configs/fsdp.yaml", "--num_processes", "2",
        "--mixed_precision", "no", "--main_process_port", "0", "tests/tuning/fsdp_on_cpu.py", *command(two, *alike),
    ]  # fmt: skip
    done = run_script(*launch, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert (two / "checkpoint-4" / "pytorch_model_fsdp.bin").exists()  # it was not quietly DDP
    assert_same_losses(one, two)
    for name in ("adapter_model.safetensors", "lavender.safetensors"):
        for key, value in load_file(one / name).items():
            torch.testing.assert_close(load_file(two / name)[key], value, atol=1e-5, rtol=1e-3, msg=key)
    whole = losses(two)
    for name in ("trainer_state.json", "checkpoint-4"):
        (two / name).rename(tmp_path / name)
    done = run_script(*launch, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0 and f"going on from {two}/checkpoint-2" in done.stdout, done.stderr
    for a, b in zip(whole, losses(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_the_fsdp_recipe_names_the_hosts_layers(vlm_folder):
    from transformers import AutoModelForImageTextToText

    recipe = yaml.safe_load((ROOT / "configs" / "fsdp.yaml").read_text())["fsdp_config"]
    named = set(recipe["fsdp_transformer_layer_cls_to_wrap"].split(","))
    model = AutoModelForImageTextToText.from_pretrained(vlm_folder)
    assert named == set(model._no_split_modules) and named <= {type(module).__name__ for module in model.modules()}
    assert Mllama().layers(model)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, whole in ((2, True), (4, False), (10, True)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_st')
    assert checkpoints.last_checkpoint(tmp_path) == (10, tmp_path / "checkpoint-10")


def test_flags_are_remembered_with_the_run(tmp_path):
    flags = ModelFlags(vlm="somewhere", aligner="deep")
    runs.remember(flags, tmp_path)
    runs.remember(flags, tmp_path)
    assert runs.recall(tmp_path) == flags
    with pytest.raises(ValueError, match="--aligner deep ─► sim"):
        runs.remember(replace(flags, aligner="sim"), tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--qlora"], "Flickr30k in data/flickr30k"),
        (["--qlora", "--full", "--data", "toy"], "--qlora and --full exclude each other"),
        (
            ["--data", "toy", "--maps", "nowhere"],
            "no maps in nowhere; make them first: python extract.py --data toy --maps",
        ),
    ],
)
def test_bad_requests_are_named(capsys, flags, message):
    assert tuning_command.main(flags) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_bad_request_ends_in_one_line():
    done = run_script("train.py", "--data", "toy", "--maps", "nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: no maps in nowhere; make them first")


@pytest.mark.parametrize(
    ("flags", "card", "expected"),
    [
        (["--qlora"], "bf16", ("paged_adamw_8bit", True, False, True)),
        (["--qlora"], "fp16", ("paged_adamw_8bit", False, True, True)),  # a T4
        (["--qlora"], None, ("adamw_torch_fused", False, False, False)),
        (["--lora"], "bf16", ("adamw_torch_fused", True, False, True)),
        (["--qlora", "--optim", "sgd", "--gradient_checkpointing", "false"], "bf16", ("sgd", True, False, False)),
        (["--qlora", "--fp16"], "bf16", ("paged_adamw_8bit", False, True, True)),
        (["--qlora", "--bf16", "false"], "bf16", ("paged_adamw_8bit", False, False, True)),
    ],
)
def test_what_is_not_said_follows_from_the_machine(monkeypatch, flags, card, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: card == "bf16")
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    own, rest = cli.parse_known(Flags, "train.py", None, [*flags, "--data", "toy"])
    training_args = arguments.parse(rest, own)
    newer = getattr(training_args, "activation_checkpointing", None)
    checkpointing = training_args.gradient_checkpointing if newer is None else newer
    assert (training_args.optim, training_args.bf16, training_args.fp16, checkpointing) == expected
    assert training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == 4
