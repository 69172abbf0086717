"""One run of train.py, from its flags to a finished folder."""

import signal
import sys
from pathlib import Path

import torch
from transformers import set_seed

from lavender_min.data import Example
from lavender_min.maps import MapStore
from lavender_min.tuning import runs
from lavender_min.tuning.arguments import Training
from lavender_min.tuning.callbacks import StopOnSigterm, WordMapPictures
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import Flags
from lavender_min.tuning.trainer import LavenderTrainer
from lavender_min.tuning.vision_cache import cache_vision


def run(flags: Flags, args: Training, examples: list[Example]) -> int:
    """Trains, or goes on training; the exit code."""
    store = None if flags.plain else MapStore(flags.maps)
    dataset = MappedExamples(examples, store)
    if dataset.missing:
        print(f"{dataset.missing} of {len(examples)} examples have no maps and are left out", file=sys.stderr)
    out = Path(str(args.output_dir))
    with args.main_process_first():
        runs.remember(flags.of_model, out)
    trainer = make_trainer(flags, args, dataset)
    say = print if trainer.is_world_process_zero() else lambda text: None

    count = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in trainer.lavender.named_children()}
    beside = f"{count['host']:,} parameters of the host, {count.get('align', 0):,} beside it"
    say(f"{len(dataset)} examples; training {beside}")
    if flags.cache_vision:
        cache_vision(trainer, out / "vision")
    if "tensorboard" in args.report_to and not flags.plain:
        trainer.add_callback(WordMapPictures(trainer, flags.picture_steps))
    stop = StopOnSigterm(trainer)
    trainer.add_callback(stop)
    resume = args.resume_from_checkpoint or runs.last_checkpoint(out)
    if resume:
        say(f"going on from {resume}")
    trainer.train(resume_from_checkpoint=resume)
    if stop.received:
        say(f"stopped by SIGTERM at step {trainer.state.global_step}, which is saved: run the same command to go on")
        return 128 + signal.SIGTERM
    trainer.save_model()
    trainer.save_state()
    say(f"adapter and {runs.ALIGN_FILE} are in {out}")
    return 0


def make_trainer(flags: Flags, args: Training, dataset: MappedExamples) -> LavenderTrainer:
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    set_seed(args.seed)
    # Weights that train themselves stay in float32 under mixed precision: half of it would round small steps away.
    model, processor = runs.build(flags.of_model, torch.float32 if flags.mode == "full" else half)
    model.host.config.use_cache = False
    frame = "whole" if dataset.store is None else dataset.store.recipe["frame"]
    return LavenderTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(processor, model.family, model.base.config, frame, flags.words, flags.attend),
        processing_class=processor,
        pretrain_aligner_steps=flags.pretrain_aligner_steps,
    )
