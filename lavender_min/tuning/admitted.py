"""Which values of the Trainer's flags mean something here. The others are refused by name, before anything is loaded."""

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from lavender_min import cli
from lavender_min.failing import naming

# By the beginning of a flag's value ("": of any): the module that transformers imports for it, and the package that brings it.
PACKAGES = {
    "report_to": {
        "azure_ml": ("azureml", "azureml-core"),
        "clearml": ("clearml", "clearml"),
        "codecarbon": ("codecarbon", "codecarbon"),
        "comet_ml": ("comet_ml", "comet-ml"),
        "dagshub": ("dagshub", "dagshub"),
        "dvclive": ("dvclive", "dvclive"),
        "flyte": ("flytekit", "flytekit"),
        "kubeflow": ("kubeflow", "kubeflow"),
        "mlflow": ("mlflow", "mlflow"),
        "neptune": ("neptune", "neptune"),
        "swanlab": ("swanlab", "swanlab"),
        "tensorboard": ("tensorboard", "tensorboard"),
        "trackio": ("trackio", "trackio"),
        "wandb": ("wandb", "wandb"),
    },
    "optim": {
        "adalomo": ("lomo_optim", "lomo-optim"),
        "adamw_anyprecision": ("torchdistx", "torchdistx"),
        "adamw_torch_4bit": ("torchao", "torchao"),
        "adamw_torch_8bit": ("torchao", "torchao"),
        "adamw_torch_npu": ("torch_npu", "torch-npu"),
        "adamw_torch_xla": ("torch_xla", "torch-xla"),
        "apollo": ("apollo_torch", "apollo-torch"),
        "galore": ("galore_torch", "galore-torch"),
        "grokadamw": ("grokadamw", "grokadamw"),
        "lomo": ("lomo_optim", "lomo-optim"),
        "schedule_free": ("schedulefree", "schedulefree"),
        "stable_adamw": ("optimi", "torch-optimi"),
    },
    "use_liger_kernel": {"True": ("liger_kernel", "liger-kernel")},
    "deepspeed": {"": ("deepspeed", "deepspeed")},
    "trackio_space_id": {"": ("trackio", "trackio")},
}

# Flags that nothing here reads, or that would break what we rely on, and why.
WITHOUT_MEANING = {
    "include_for_metrics": "there are no metrics beside the losses",
    "batch_eval_metrics": "there are no metrics beside the losses",
    "label_names": "the batches are this package's own",
    "remove_unused_columns": "the examples have no columns",
    "length_column_name": "the examples have no columns; lengths are those of the texts",
    "do_predict": "evaluate.py does that",
    "fp16_full_eval": "validation happens while it trains, in the precision of the training",
    "bf16_full_eval": "validation happens while it trains, in the precision of the training",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint without it",
    "torch_compile": "a compiled host no longer shows its attention",
    "torch_compile_backend": "a compiled host no longer shows its attention",
    "torch_compile_mode": "a compiled host no longer shows its attention",
    "use_cache": "training reads no cache of keys and values",
    "parallelism_config": "a process holds the whole sequence; several GPUs: see configs/",
}
# Losses that a checkpoint can be the best by.
METRICS = ("loss", "loss_vlm", "loss_att")
CHOICES = {
    "optim": [name.value for name in OptimizerNames],
    "report_to": ["none", "all", *PACKAGES["report_to"]],
    "eval_strategy": ["no", "steps", "epoch"],
    "train_sampling_strategy": ["random", "sequential", "group_by_length"],
    "metric_for_best_model": [*METRICS, *(f"eval_{name}" for name in METRICS)],
}


def check(args: Any, usual: dict[str, Any], on_gpu: bool, validates: bool) -> None:
    """Raises ValueError for the first value that cannot work.

    `usual` are the defaults of all flags; `on_gpu` says whether there is one, `validates` whether there is a validation part.
    """
    for name, why in WITHOUT_MEANING.items():
        if getattr(args, name) != usual[name]:
            raise ValueError(f"--{name} has no meaning here: {why}")
    for name, choices in CHOICES.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in choices:
                raise ValueError(f"--{name} must be one of {', '.join(choices)}; got {value}")
    check_packages(args)
    check_numbers(args)
    check_texts(args)
    if args.fp16 and not on_gpu:
        raise ValueError("--fp16 needs a GPU; without one take --bf16 --use_cpu, or neither")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ValueError("--dataloader_persistent_workers needs --dataloader_num_workers of at least 1")
    if not validates:
        check_no_validation(args)
    # As accelerate launch and torchrun set it.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        for name in ("fsdp", "fsdp_config", "ddp_backend"):
            if value := getattr(args, name):
                raise ValueError(
                    f"--{name} {value} needs several processes: accelerate launch train.py … (see configs/)"
                )


def check_packages(args: Any) -> None:
    for name, values in PACKAGES.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            for begins, (module, package) in values.items():
                if value and str(value).startswith(begins) and importlib.util.find_spec(module) is None:
                    raise ValueError(f"--{name} {value} needs the package {package}: pip install {package}")


def check_numbers(args: Any) -> None:
    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names}

    counts = (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "save_total_limit",
    )
    cli.at_least(
        1, **given(*counts, "torch_empty_cache_steps", "eval_accumulation_steps", "dataloader_prefetch_factor")
    )
    cli.at_least(1, **given("ddp_bucket_cap_mb", "ddp_timeout"))
    cli.at_least(0, **given("dataloader_num_workers", "seed", "data_seed"))
    cli.between(0, math.inf, **given("learning_rate", "weight_decay", "warmup_steps", "adam_epsilon", "max_grad_norm"))
    cli.between(0, math.inf, **given("neftune_noise_alpha", "eval_delay", "eval_steps", "logging_steps", "save_steps"))
    cli.between(0, 1, **given("adam_beta1", "adam_beta2", "label_smoothing_factor"))
    if not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"--num_train_epochs must be a finite number above 0; got {args.num_train_epochs}")
    if args.max_steps != -1:
        cli.at_least(1, max_steps=args.max_steps)
    if args.save_strategy == "steps" and not args.save_steps:
        raise ValueError("--save_steps must be above 0; take --save_strategy no for no checkpoints")


def check_texts(args: Any) -> None:
    """Flags whose value is JSON, or a list of assignments."""
    for name in TrainingArguments._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if isinstance(value, str) and value.startswith("{"):
            with naming(f"--{name} {value}"):
                json.loads(value)
    config = args.accelerator_config
    if isinstance(config, str) and not config.startswith("{"):
        with naming(f"--accelerator_config {config}"):
            json.loads(Path(config).read_text(encoding="utf-8"))
    for part in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        if "=" not in part:
            raise ValueError(f"--optim_args must be like momentum=0.9,nesterov=True; got {args.optim_args}")


def check_no_validation(args: Any) -> None:
    """What needs a validation part where there is none."""
    wants = {
        "eval_strategy": args.eval_strategy not in (None, "no"),
        "eval_on_start": args.eval_on_start,
        "do_eval": args.do_eval,
        "load_best_model_at_end": args.load_best_model_at_end,
        "metric_for_best_model": args.metric_for_best_model,
        "save_strategy": args.save_strategy == "best",
        "lr_scheduler_type": args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
    }
    for name, wanted in wants.items():
        if wanted:
            raise ValueError(
                f"--{name} {getattr(args, name)} needs a validation part: give --eval_share 0.05 or --eval_split NAME"
            )
