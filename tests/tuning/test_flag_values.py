"""Values of train.py's flags that cannot be are refused by name, before anything is loaded or written."""
# ruff: noqa: F811 (fixtures that another file has too)

import pytest
from starting import start
from test_faults import command, said  # noqa: F401

from lavender_min import cli
from lavender_min.tuning.flags import Flags


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("limit", "-1"), ("limit", "0"), ("lambda_att", "-1"), ("lambda_att", "nan"), ("lambda_att", "inf"),
        ("pretrain_aligner_steps", "-1"), ("parallel_rank", "-1"), ("lora_r", "0"), ("lora_alpha", "0"),
        ("lora_dropout", "nan"), ("lora_dropout", "1"), ("lora_dropout", "-0.1"), ("lora_targets", "("),
        ("picture_steps", "0"), ("per_device_train_batch_size", "0"), ("per_device_train_batch_size", "-4"),
        ("num_train_epochs", "0"), ("num_train_epochs", "nan"), ("num_train_epochs", "inf"), ("max_steps", "0"),
        ("max_steps", "-3"), ("gradient_accumulation_steps", "0"), ("learning_rate", "inf"), ("learning_rate", "nan"),
        ("learning_rate", "-1"), ("weight_decay", "nan"), ("adam_beta1", "1"), ("max_grad_norm", "nan"), ("seed", "-1"),
        ("save_total_limit", "0"), ("dataloader_num_workers", "-1"), ("warmup_steps", "-1"),
        ("label_smoothing_factor", "1.5"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_name(command, tmp_path, said, flag, value):
    argv = command(tmp_path / "out")
    if f"--{flag}" in argv:
        argv[argv.index(f"--{flag}") + 1] = value
    else:
        argv += [f"--{flag}", value]
    assert start(argv) == 2
    line = said()
    assert line.startswith(f"train.py: --{flag} ") and value in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            "--aggregate layer-mean --parallel_start noise",
            "--parallel_start noise would change nothing: --aggregate layer-mean",
        ),
        ("--aggregate flow-sum --parallel_rank 8", "--parallel_rank 8 would change nothing: --aggregate flow-sum"),
        ("--full --parallel_rank 8", "--parallel_rank 8 would change nothing: --full"),
        ("--aligner none --aligner_kernel 1", "--aligner_kernel 1 would change nothing: --aligner none"),
        ("--aligner none --aligner_norm batch", "--aligner_norm batch would change nothing: --aligner none"),
        ("--full --lora_r 4", "--lora_r 4 would change nothing: --full has no adapters"),
        ("--full --lora_targets language", "--lora_targets language would change nothing: --full has no adapters"),
    ],
)
def test_a_flag_that_nothing_would_read_is_refused(command, tmp_path, said, given, why):
    assert start(command(tmp_path / "out", *given.split())) == 2
    assert why in said() and not (tmp_path / "out").exists()


def test_the_baseline_is_the_same_command_with_plain():
    """So flags of the alignment may stay, those that another one leaves idle too are still refused."""
    aligned = ["--trust", "contrast", "--aggregate", "learn", "--parallel_start", "noise", "--lambda_att", "3"]
    assert cli.parse(Flags, "train.py", "", [*aligned, "--plain"]).plain


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("nothing_like_it", "names no module of"),
        (".*vision_model", "names model.vision_model, a MllamaVisionModel; adapters go to linear layers"),
        ("", "names the whole host, a MllamaForConditionalGeneration; adapters go to linear"),
    ],
)
def test_targets_that_cannot_have_adapters_are_one_short_line(command, tmp_path, said, targets, message):
    assert start(command(tmp_path, f"--lora_targets={targets}")) == 2
    line = said()
    assert message in line and len(line) < 250
