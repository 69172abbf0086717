"""Stage 2: fine-tunes a vision-language model with its attention pulled towards Stable Diffusion's.

    python train.py --data toy --qlora                  the toy model, on any machine
    python train.py --qlora                             Llama-3.2-11B-Vision on Flickr30k, on one 24 GB GPU

The maps must be there (python extract.py --data …). Every flag of transformers.TrainingArguments works as well. A run that
was stopped goes on from its last checkpoint when it is started again; SIGTERM makes it save one first, and exit with status
143, so that a scheduler knows the run is not over. Several GPUs: see configs/.
"""

import os
import signal
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lavender_min  # noqa: F401  first: it keeps bitsandbytes quiet

# isort: split
import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed

from lavender_min import data
from lavender_min.align.aligner import AGGREGATES, ALIGNERS
from lavender_min.maps import MapStore
from lavender_min.tuning import collator, memory, runs
from lavender_min.tuning.callbacks import StopOnSigterm, WordMapPictures
from lavender_min.tuning.model import MATCHES
from lavender_min.tuning.trainer import LavenderTrainer
from lavender_min.tuning.vision_cache import cache_vision


def one_of(default: str, choices, help: str):
    return field(default=default, metadata={"choices": list(choices), "help": help})


def yes_or_no(help: str):
    """A flag that is None where it is not given: `--bf16` and `--bf16 false` both say something."""
    return field(default=None, metadata={"nargs": "?", "const": True, "help": help})


@dataclass
class Arguments:
    data: str = one_of("flickr30k", data.SOURCES, "the examples")
    data_root: str | None = field(default=None, metadata={"help": "their folder or hub id (default: data/<data>)"})
    split: str | None = field(default=None, metadata={"help": "a part of them"})
    captions: str | None = field(default=None, metadata={"help": "first or all, as the maps were made"})
    maps: str | None = field(default=None, metadata={"help": "the store extract.py made (default: maps/<data>)"})
    vlm: str | None = field(default=None, metadata={"help": "hub id or folder of the host"})
    qlora: bool = field(default=False, metadata={"help": "4-bit host (NF4, double quantisation) with LoRA adapters"})
    lora: bool = field(default=False, metadata={"help": "LoRA adapters; what is done when nothing else is asked"})
    full: bool = field(default=False, metadata={"help": "train every weight of the host"})
    lora_r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: str = field(default="cross", metadata={"help": "cross, language, released, or a regular expression"})
    plain: bool = field(default=False, metadata={"help": "fine-tune without alignment: the baseline"})
    aggregate: str = one_of("learn", AGGREGATES, "whose attention is aligned: parallel projections', or the host's own")
    parallel_rank: int = field(default=64, metadata={"help": "rank of the parallel projections; 0: full copies"})
    aligner: str = one_of("sim", ALIGNERS, "depth of the Aligner; none: the heads' mean is aligned")
    aligner_kernel: int = field(default=3, metadata={"choices": [3, 1], "help": "3 is the paper's conv, 1 its mlp"})
    aligner_norm: str = one_of("instance", ("instance", "batch", "none"), "norm inside the Aligner")
    lambda_att: float = field(default=10.0, metadata={"help": "weight of the alignment loss; 0 only measures it"})
    match: str = one_of("exact", MATCHES, "align the words the model predicts right, or all")
    words: str = one_of("answer", ("answer", "all"), "align words of the answer, or of question and answer")
    attend: str = one_of("predicting", collator.ATTEND, "the rows that predict a word, or that read it")
    pretrain_aligner_steps: int = field(default=0, metadata={"help": "steps that train the Aligner only"})
    limit: int | None = field(default=None, metadata={"help": "take only the first N examples"})
    plan: bool = field(default=False, metadata={"help": "only say where a GPU's memory would go, and load nothing"})
    cache_vision: bool = field(
        default=False, metadata={"help": "ask the frozen vision tower once a picture, and keep its states on disk"}
    )
    picture_steps: int = field(
        default=100, metadata={"help": "with --report_to tensorboard: steps between pictures of word maps"}
    )


@dataclass
class Training(TrainingArguments):
    """TrainingArguments with the paper's learning rate, and defaults that log and save to this machine only.

    What is None here follows from the machine, in `settle`. Whatever is given wins.
    """

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
    remove_unused_columns: bool = False

    def __post_init__(self):
        pass  # the output folder follows from other flags: `settle` finishes the job


def settle(args: Arguments, training_args: Training) -> runs.ModelFlags:
    """Fills in what follows from other flags; says in one line what does not go together."""
    modes = [mode for mode in ("qlora", "lora", "full") if getattr(args, mode)] or ["lora"]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]} exclude each other")
    source = data.SOURCES[args.data]
    args.vlm = args.vlm or source.vlm
    args.maps = args.maps or f"maps/{args.data}"
    training_args.output_dir = training_args.output_dir or f"runs/{args.data}-{'plain' if args.plain else modes[0]}"
    training_args.remove_unused_columns = False  # the collator takes whole examples
    on_gpu = args.plan or (torch.cuda.is_available() and not training_args.use_cpu)
    if training_args.gradient_accumulation_steps is None:  # 4 is the paper's batch, 1 at a time fits the smallest cards
        training_args.gradient_accumulation_steps = 1 if training_args.per_device_train_batch_size else 4
    training_args.per_device_train_batch_size = training_args.per_device_train_batch_size or 1
    if training_args.optim is None:
        # bitsandbytes does run on CPU, but its optimiser pages nothing there and the toy model's state is small
        training_args.optim = "paged_adamw_8bit" if on_gpu and modes[0] == "qlora" else TrainingArguments.optim
    if training_args.bf16 is None and training_args.fp16 is None and on_gpu and not args.plan:
        training_args.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        training_args.fp16 = not training_args.bf16
    training_args.bf16, training_args.fp16 = bool(training_args.bf16), bool(training_args.fp16)
    asked = training_args.gradient_checkpointing
    name = "activation_checkpointing"  # what newer versions of transformers call it
    name = name if hasattr(training_args, name) else "gradient_checkpointing"
    if getattr(training_args, name) is None:
        setattr(training_args, name, on_gpu if asked is None else asked)
    TrainingArguments.__post_init__(training_args)
    known = {f.name for f in fields(runs.ModelFlags)}
    return runs.ModelFlags(mode=modes[0], **{k: v for k, v in vars(args).items() if k in known})


def main() -> None:
    args, training_args = HfArgumentParser((Arguments, Training), description=__doc__).parse_args_into_dataclasses()
    flags = settle(args, training_args)
    if args.plan:
        print(memory.describe(flags, training_args))
        return
    examples = data.load(args.data, args.data_root, args.split, args.captions)[: args.limit]
    store, frame = None, "whole"
    if not args.plain:
        if not Path(args.maps).exists():
            raise FileNotFoundError(
                f"no maps in {args.maps}; make them first: python extract.py --data {args.data} --maps {args.maps}"
            )
        store = MapStore(args.maps)
        frame = store.recipe["frame"]
    dataset = collator.MappedExamples(examples, store)
    if dataset.missing:
        print(f"{dataset.missing} of {len(examples)} examples have no maps and are left out", file=sys.stderr)
    with training_args.main_process_first():
        runs.remember(flags, Path(training_args.output_dir))

    half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    set_seed(training_args.seed)
    # Weights that train themselves stay in float32 under mixed precision: half of it would round small steps away.
    model, processor, host = runs.build(flags, torch.float32 if flags.mode == "full" else half)
    model.vlm.config.use_cache = False
    count = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in model.named_children()}

    trainer = LavenderTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        data_collator=collator.Collator(processor, model.host.config, host, frame, args.words, args.attend),
        processing_class=processor,
        pretrain_aligner_steps=args.pretrain_aligner_steps,
    )

    def say(text: str) -> None:
        if trainer.is_world_process_zero():
            print(text)

    beside = f"{count['vlm']:,} parameters of the host, {count.get('align', 0):,} beside it"
    say(f"{len(dataset)} examples; training {beside}")
    if args.cache_vision:
        cache_vision(trainer, Path(training_args.output_dir) / "vision")
    if "tensorboard" in training_args.report_to and not args.plain:
        trainer.add_callback(WordMapPictures(trainer, args.picture_steps))
    stop = StopOnSigterm(trainer)
    trainer.add_callback(stop)
    resume = training_args.resume_from_checkpoint or runs.last_checkpoint(Path(training_args.output_dir))
    if resume:
        say(f"going on from {resume}")
    trainer.train(resume_from_checkpoint=resume)
    if stop.asked:
        say(f"stopped by SIGTERM at step {trainer.state.global_step}, which is saved: run the same command to go on")
        sys.exit(128 + signal.SIGTERM)
    trainer.save_model()
    trainer.save_state()
    say(f"adapter and {runs.ALIGN_FILE} are in {training_args.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
