"""Every flag of TrainingArguments works, or is refused by name: the table says which, and each row is tried."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from starting import flags_of, start, steps
from transformers import TrainingArguments

WORKS = None
# (flag, its value, what it is refused with, or WORKS; more flags that it goes with)
TABLE = [
    ("per_device_train_batch_size", "2", WORKS),
    ("per_device_train_batch_size", "0", "--per_device_train_batch_size must be a whole number of at least 1"),
    ("num_train_epochs", "0.5", WORKS),
    ("num_train_epochs", "0", "--num_train_epochs must be a finite number above 0"),
    ("max_steps", "1", WORKS),
    ("max_steps", "0", "--max_steps must be a whole number of at least 1"),
    ("learning_rate", "1e-3", WORKS),
    ("learning_rate", "inf", "--learning_rate must be a finite number of at least 0"),
    ("lr_scheduler_type", "cosine", WORKS),
    ("lr_scheduler_type", "constant", WORKS),
    ("lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_type reduce_lr_on_plateau needs a validation part"),
    ("lr_scheduler_type", "reduce_lr_on_plateau", WORKS, "--eval_share", "0.2"),
    ("lr_scheduler_type", "greedy", "--lr_scheduler_type greedy needs a validation part"),
    ("lr_scheduler_type", "greedy", WORKS, "--eval_share", "0.2"),
    ("lr_scheduler_kwargs", '{"num_cycles": 2}', WORKS, "--lr_scheduler_type", "cosine_with_restarts"),
    ("lr_scheduler_kwargs", '{"no": 2}', "--lr_scheduler_kwargs"),
    ("lr_scheduler_kwargs", "{", "--lr_scheduler_kwargs"),
    ("lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs None: "),
    ("warmup_steps", "2", WORKS),
    ("warmup_steps", "-1", "--warmup_steps must be"),
    ("optim", "adafactor", WORKS),
    ("optim", "sgd", WORKS),
    ("optim", "galore_adamw", "--optim galore_adamw needs the package galore-torch: pip install galore-torch"),
    ("optim", "lomo", "--optim lomo needs the package lomo-optim"),
    ("optim", "schedule_free_adamw", "--optim schedule_free_adamw needs the package schedulefree"),
    ("optim", "nothing", "--optim"),
    ("optim_args", "momentum=0.9", WORKS, "--optim", "sgd"),
    ("optim_args", "momentum", "--optim_args"),
    ("weight_decay", "0.1", WORKS),
    ("weight_decay", "nan", "--weight_decay must be"),
    ("adam_beta1", "0.8", WORKS),
    ("adam_beta1", "1", "--adam_beta1 must be at least 0 and below 1"),
    ("adam_beta2", "0.9", WORKS),
    ("adam_beta2", "-1", "--adam_beta2 must be"),
    ("adam_epsilon", "1e-6", WORKS),
    ("adam_epsilon", "nan", "--adam_epsilon must be"),
    ("optim_target_modules", "q_proj", WORKS),
    ("gradient_accumulation_steps", "2", WORKS),
    ("gradient_accumulation_steps", "0", "--gradient_accumulation_steps must be"),
    ("average_tokens_across_devices", "false", WORKS),
    ("max_grad_norm", "0.5", WORKS),
    ("max_grad_norm", "nan", "--max_grad_norm must be"),
    ("label_smoothing_factor", "0.3", WORKS),
    ("label_smoothing_factor", "1", "--label_smoothing_factor must be at least 0 and below 1"),
    ("bf16", "true", WORKS, "--use_cpu"),
    ("bf16", "true", "bf16"),
    ("fp16", "true", "--fp16 needs a GPU"),
    ("bf16_full_eval", "true", "--bf16_full_eval has no meaning here"),
    ("fp16_full_eval", "true", "--fp16_full_eval has no meaning here"),
    ("tf32", "true", "--tf32"),
    ("activation_checkpointing", "true", WORKS),
    ("activation_checkpointing_kwargs", '{"use_reentrant": false}', WORKS, "--activation_checkpointing"),
    ("gradient_checkpointing", "true", WORKS),
    ("gradient_checkpointing_kwargs", '{"use_reentrant": false}', WORKS, "--gradient_checkpointing"),
    ("torch_compile", "true", "--torch_compile has no meaning here"),
    ("torch_compile_backend", "eager", "--torch_compile_backend has no meaning here"),
    ("torch_compile_mode", "default", "--torch_compile_mode has no meaning here"),
    ("use_liger_kernel", "true", "--use_liger_kernel True needs the package liger-kernel"),
    ("liger_kernel_config", '{"rope": true}', "argument --liger_kernel_config/--liger-kernel-config: invalid dict value"),
    ("use_cache", "true", "--use_cache has no meaning here"),
    ("neftune_noise_alpha", "5", WORKS),
    ("neftune_noise_alpha", "nan", "--neftune_noise_alpha must be"),
    ("torch_empty_cache_steps", "1", WORKS),
    ("torch_empty_cache_steps", "0", "--torch_empty_cache_steps must be"),
    ("auto_find_batch_size", "true", WORKS),
    ("logging_strategy", "epoch", WORKS),
    ("logging_strategy", "never", "--logging_strategy"),
    ("logging_steps", "2", WORKS),
    ("logging_steps", "nan", "--logging_steps must be"),
    ("logging_first_step", "true", WORKS),
    ("log_on_each_node", "false", WORKS),
    ("logging_nan_inf_filter", "false", WORKS),
    ("include_num_input_tokens_seen", "true", WORKS),
    ("log_level", "error", WORKS),
    ("log_level", "loud", "--log_level"),
    ("log_level_replica", "error", WORKS),
    ("disable_tqdm", "false", WORKS),
    ("report_to", "tensorboard", WORKS),
    ("report_to", "wandb", "--report_to wandb needs the package wandb: pip install wandb"),
    ("report_to", "nobody", "--report_to"),
    ("run_name", "mine", WORKS),
    ("project", "mine", WORKS),
    ("trackio_space_id", "mine", "--trackio_space_id mine needs the package trackio"),
    ("trackio_bucket_id", "mine", WORKS),
    ("trackio_static_space_id", "mine", WORKS),
    ("eval_strategy", "epoch", "--eval_strategy epoch needs a validation part: give --eval_share 0.05 or --eval_split"),
    ("eval_strategy", "epoch", WORKS, "--eval_share", "0.2"),
    ("eval_steps", "2", WORKS, "--eval_share", "0.2", "--eval_strategy", "steps"),
    ("eval_steps", "nan", "--eval_steps must be"),
    ("eval_delay", "1", WORKS, "--eval_share", "0.2"),
    ("per_device_eval_batch_size", "3", WORKS, "--eval_share", "0.2"),
    ("per_device_eval_batch_size", "0", "--per_device_eval_batch_size must be"),
    ("prediction_loss_only", "true", WORKS, "--eval_share", "0.2"),
    ("eval_on_start", "true", "--eval_on_start True needs a validation part"),
    ("eval_on_start", "true", WORKS, "--eval_share", "0.2"),
    ("eval_do_concat_batches", "false", WORKS, "--eval_share", "0.2"),
    ("eval_use_gather_object", "true", WORKS, "--eval_share", "0.2"),
    ("eval_accumulation_steps", "1", WORKS, "--eval_share", "0.2"),
    ("include_for_metrics", "loss", "--include_for_metrics has no meaning here"),
    ("batch_eval_metrics", "true", "--batch_eval_metrics has no meaning here"),
    ("save_only_model", "true", WORKS),
    ("save_strategy", "no", WORKS),
    ("save_strategy", "best", "--save_strategy best needs a validation part"),
    ("save_strategy", "best", WORKS, "--eval_share", "0.2", "--metric_for_best_model", "loss"),
    ("save_steps", "1", WORKS),
    ("save_steps", "0", "--save_steps must be above 0"),
    ("save_on_each_node", "true", WORKS),
    ("save_total_limit", "1", WORKS),
    ("save_total_limit", "0", "--save_total_limit must be"),
    ("enable_jit_checkpoint", "true", "--enable_jit_checkpoint has no meaning here"),
    ("push_to_hub", "true", "--push_to_hub"),
    ("hub_token", "hf_x", WORKS),
    ("hub_private_repo", "true", WORKS),
    ("hub_model_id", "me/mine", WORKS),
    ("hub_strategy", "end", WORKS),
    ("hub_always_push", "true", WORKS),
    ("hub_revision", "main", WORKS),
    ("load_best_model_at_end", "true", "--load_best_model_at_end True needs a validation part"),
    ("load_best_model_at_end", "true", WORKS, "--eval_share", "0.2", "--save_strategy", "epoch"),
    ("metric_for_best_model", "loss_att", WORKS, "--eval_share", "0.2"),
    ("metric_for_best_model", "bleu", "--metric_for_best_model must be one of loss, loss_vlm, loss_att", "--eval_share", "0.2"),
    ("greater_is_better", "false", WORKS),
    ("ignore_data_skip", "true", WORKS),
    ("restore_callback_states_from_checkpoint", "true", WORKS),
    ("full_determinism", "true", WORKS),
    ("seed", "7", WORKS),
    ("seed", "-1", "--seed must be"),
    ("data_seed", "7", WORKS),
    ("use_cpu", "true", WORKS),
    ("accelerator_config", '{"even_batches": false}', WORKS),
    ("accelerator_config", "nowhere.json", "--accelerator_config nowhere.json: "),
    ("accelerator_config", '{"no": 1}', "AcceleratorConfig.__init__() got an unexpected"),
    ("parallelism_config", "x", "--parallelism_config"),
    ("dataloader_drop_last", "true", WORKS),
    ("dataloader_drop_last", "true", "--dataloader_drop_last true leaves nothing", "--per_device_train_batch_size", "99"),
    ("dataloader_num_workers", "1", WORKS),
    ("dataloader_num_workers", "-1", "--dataloader_num_workers must be"),
    ("dataloader_pin_memory", "false", WORKS),
    ("dataloader_persistent_workers", "true", WORKS, "--dataloader_num_workers", "1"),
    ("dataloader_persistent_workers", "true", "--dataloader_persistent_workers needs --dataloader_num_workers"),
    ("dataloader_prefetch_factor", "2", WORKS, "--dataloader_num_workers", "1"),
    ("dataloader_prefetch_factor", "2", "--dataloader_prefetch_factor"),
    ("dataloader_multiprocessing_context", "fork", WORKS, "--dataloader_num_workers", "1"),
    ("dataloader_multiprocessing_context", "no", "--dataloader_multiprocessing_context", "--dataloader_num_workers", "1"),
    ("dataloader_in_order", "false", WORKS, "--dataloader_num_workers", "1"),
    ("remove_unused_columns", "true", "--remove_unused_columns has no meaning here"),
    ("label_names", "labels", "--label_names has no meaning here"),
    ("train_sampling_strategy", "sequential", WORKS),
    ("train_sampling_strategy", "group_by_length", WORKS),
    ("train_sampling_strategy", "batch_rebalance", "--train_sampling_strategy must be one of random, sequential, group_by_length"),
    ("length_column_name", "words", "--length_column_name has no meaning here"),
    ("ddp_find_unused_parameters", "false", WORKS),
    ("ddp_bucket_cap_mb", "10", WORKS),
    ("ddp_broadcast_buffers", "false", WORKS),
    ("ddp_static_graph", "false", WORKS),
    ("ddp_backend", "gloo", "--ddp_backend gloo needs several processes"),
    ("ddp_timeout", "60", WORKS),
    ("fsdp", "full_shard", "--fsdp full_shard needs several processes"),
    ("fsdp_config", "nowhere.json", "--fsdp_config nowhere.json needs several processes"),
    ("deepspeed", "x", "--deepspeed x needs the package deepspeed: pip install deepspeed"),
    ("debug", "underflow_overflow", WORKS),
    ("debug", "no", "--debug"),
    ("skip_memory_metrics", "false", WORKS),
    ("do_train", "true", WORKS),
    ("do_eval", "true", "--do_eval True needs a validation part"),
    ("do_predict", "true", "--do_predict has no meaning here"),
    ("resume_from_checkpoint", "nowhere", "nowhere"),
    ("local_rank", "-1", WORKS),
    ("output_dir", "{tmp}/else", WORKS),
]  # fmt: skip


def test_the_table_holds_every_flag():
    assert {row[0] for row in TABLE} == {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.fixture
def usual_settings():
    """What --full_determinism and --log_level change of the process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}={row[1]}")
def test_each_flag_works_or_is_refused_by_name(vlm_folder, store_folder, tmp_path, capfd, usual_settings, row):
    name, value, refused, *more = row
    if refused and "needs the package" in refused and installed(refused):
        pytest.skip("it is installed")
    if value == "tensorboard":
        pytest.importorskip("tensorboard")
    argv = flags_of(vlm_folder, store_folder, tmp_path / "out")
    for flag in [f"--{name}", *[word for word in more if word.startswith("--")]]:
        while flag in argv:
            at = argv.index(flag)
            del argv[at : at + 2]
    if name == "num_train_epochs":
        argv[argv.index("--max_steps") + 1] = "-1"
    code = start([*argv, f"--{name}", value.replace("{tmp}", str(tmp_path)), *more])
    out, err = capfd.readouterr()
    last = err.strip().rsplit("\n", 1)[-1]
    assert "Traceback" not in err
    if refused is WORKS:
        assert code == 0, last
        folder = tmp_path / ("else" if name == "output_dir" else "out")
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] > 0 and steps(folder) is not None
    else:
        assert code == 2 and refused in last and len(last) < 900, last


def installed(refused):
    package = refused.split("needs the package ")[1].split(":")[0].replace("-", "_")
    return importlib.util.find_spec(package) is not None


def test_liger_is_applied_to_the_host_and_not_to_its_wrapper(vlm_folder, store_folder, tmp_path, monkeypatch):
    """With the package there, or so it seems. The loss that Liger fuses with the logits is not the one that is trained."""
    applied, warned = [], []
    monkeypatch.setattr("lavender_min.tuning.admitted.check_packages", lambda args: None)
    monkeypatch.setattr(
        "lavender_min.tuning.tune.apply_liger_kernel",
        lambda model, config: applied.append((type(model).__name__, config)),
    )
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: warned.append(model))
    assert start(flags_of(vlm_folder, store_folder, tmp_path / "a", "--use_liger_kernel", "true")) == 0
    assert applied == [("MllamaForConditionalGeneration", {"fused_linear_cross_entropy": False})] and not warned


def test_what_liger_cannot_do_is_one_line(vlm_folder, store_folder, tmp_path, monkeypatch, capsys):
    """Its 0.8.5 has parts that do not fit transformers 5.23."""

    def fails(model, config):
        raise ImportError("cannot import name 'LigerQwen2VLCausalLMOutputWithPast'")

    monkeypatch.setattr("lavender_min.tuning.admitted.check_packages", lambda args: None)
    monkeypatch.setattr("lavender_min.tuning.tune.apply_liger_kernel", fails)
    assert start(flags_of(vlm_folder, store_folder, tmp_path, "--use_liger_kernel", "true")) == 2
    assert (
        "--use_liger_kernel: ImportError: cannot import name 'Liger" in capsys.readouterr().err.strip().splitlines()[-1]
    )
