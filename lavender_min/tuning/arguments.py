"""The Trainer's flags: `transformers.TrainingArguments` with the paper's learning rate, logging and saving to this machine only."""
# mypy: disable-error-code="assignment"

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from lavender_min import cli
from lavender_min.failing import naming
from lavender_min.tuning import admitted
from lavender_min.tuning.flags import Flags

# The flags of TrainingArguments that a run may be started again with changed: its result stays the same, or it only goes on for
# longer. All others decide the result.
NO_DIFFERENCE = frozenset(
    """
    max_steps num_train_epochs
    output_dir resume_from_checkpoint restore_callback_states_from_checkpoint do_train do_eval do_predict
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
    include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id debug skip_memory_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name
    use_cpu local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed parallelism_config
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cache use_liger_kernel
    liger_kernel_config
    """.split()
)


def yes_or_no(help: str) -> Any:
    """A flag that is None where it is not given: `--bf16` and `--bf16 false` both say something."""
    return field(default=None, metadata={"nargs": "?", "const": True, "help": help})


@dataclass
class Training(TrainingArguments):
    """What is None here follows from the machine, in `settle`. Whatever is given wins."""

    output_dir: str | None = field(default=None, metadata={"help": "default: runs/<data>-<mode>"})
    optim: str | None = field(
        default=None, metadata={"help": "default: paged_adamw_8bit with --qlora on a GPU, PyTorch's AdamW elsewhere"}
    )
    bf16: bool | None = yes_or_no("default: on a GPU that has it")
    fp16: bool | None = yes_or_no("default: on a GPU without bf16 (T4), with loss scaling")
    gradient_checkpointing: bool | None = yes_or_no("default: on a GPU")
    learning_rate: float = 1e-4
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "default: 1, four times a step"})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "default: 1, if a batch size is given"}
    )
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: str = "none"
    eval_strategy: str | None = field(
        default=None, metadata={"help": "default: epoch with --eval_share or --eval_split, no without"}
    )
    remove_unused_columns: bool = False

    def __post_init__(self):
        """Left to `settle`: the output folder, for one, follows from other flags."""


def parse(argv: list[str], flags: Flags) -> Training:
    training_args = cli.parse(Training, "train.py", "The flags of transformers.TrainingArguments.", argv)
    settle(training_args, flags)
    return training_args


def one_gpu(args: Training) -> None:
    """One process drives one GPU. The Trainer alone would spread each batch over all it sees, which a 4-bit host cannot bear."""
    if args.n_gpu > 1:
        print(
            f"{args.n_gpu} GPUs are here and this process uses one; all of them: "
            f"accelerate launch --num_processes {args.n_gpu} train.py … (see configs/)"
        )
        args._n_gpu = 1


def settle(args: Training, flags: Flags) -> None:
    """Fills in what follows from other flags and from the machine."""
    on_gpu = flags.plan or (torch.cuda.is_available() and not args.use_cpu)
    usual = {field.name: field.default for field in fields(Training) if field.default is not MISSING}
    usual |= {field.name: field.default_factory() for field in fields(Training) if field.default_factory is not MISSING}
    admitted.check(args, usual, on_gpu, flags.validates)
    args.output_dir = args.output_dir or flags.output_dir
    # The collator takes whole examples.
    args.remove_unused_columns = False
    if args.eval_strategy is None:
        args.eval_strategy = "epoch" if flags.validates else "no"
    # All of them are losses.
    if args.metric_for_best_model and args.greater_is_better is None:
        args.greater_is_better = False
    # 4 is the paper's batch; 1 at a time fits the smallest cards.
    if args.gradient_accumulation_steps is None:
        args.gradient_accumulation_steps = 1 if args.per_device_train_batch_size else 4
    args.per_device_train_batch_size = args.per_device_train_batch_size or 1
    # bitsandbytes does run on a CPU, but its optimiser pages nothing there and the toy model's state is small.
    if args.optim is None:
        args.optim = "paged_adamw_8bit" if on_gpu and flags.mode == "qlora" else TrainingArguments.optim
    if args.bf16 is None and args.fp16 is None and on_gpu and not flags.plan:
        args.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        args.fp16 = not args.bf16
    args.bf16, args.fp16 = bool(args.bf16), bool(args.fp16)
    given = args.gradient_checkpointing
    # What newer versions of transformers call it.
    name = "activation_checkpointing"
    name = name if hasattr(args, name) else "gradient_checkpointing"
    if getattr(args, name) is None:
        setattr(args, name, on_gpu if given is None else given)
    with naming("the Trainer's flags"):
        TrainingArguments.__post_init__(args)
