"""One run of train.py, from its flags to a finished folder."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed
from transformers.integrations.liger import apply_liger_kernel

from lavender_min.align import AGGREGATIONS
from lavender_min.align.trust import word_trust
from lavender_min.data import Example
from lavender_min.failing import naming, one_line
from lavender_min.maps import MapStore, find_stale
from lavender_min.tuning import arguments, checkpoints, runs
from lavender_min.tuning.arguments import NO_DIFFERENCE, Training
from lavender_min.tuning.callbacks import StopOnSigterm, WordMapPictures
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import Flags
from lavender_min.tuning.mixing import Mixture
from lavender_min.tuning.parts import Parts
from lavender_min.tuning.sets import DataSet
from lavender_min.tuning.trainer import LavenderTrainer
from lavender_min.tuning.vision_cache import cache_vision

Examples = MappedExamples | Mixture


class Datasets(NamedTuple):
    train: Examples
    # None without a validation part.
    held_out: Examples | None


def run(flags: Flags, args: Training, parts: list[Parts]) -> int:
    """Trains, goes on training, or finds nothing left to do; the exit code."""
    arguments.one_gpu(args)
    out = Path(str(args.output_dir))
    checkpoints.refuse_inputs(flags, out)
    datasets = read(flags, args, parts)
    steps = checkpoints.total_steps(args, len(datasets.train))
    # One process writes, and one holds the lock.
    with checkpoints.locked(out) if args.should_save else nullcontext():
        with args.main_process_first():
            runs.remember(flags.of_model, out, decided(flags, args, *datasets))
        if checkpoints.is_finished(out, steps):
            return done(
                args, f"{out} holds this run, finished with {checkpoints.step_of(out)} steps: nothing is left to do"
            )
        resume = checkpoints.given(args.resume_from_checkpoint) or checkpoints.last_checkpoint(out)
        if resume and resume.step >= steps:
            if args.should_save:
                checkpoints.finish(resume, out, args.load_best_model_at_end)
            return done(args, f"{resume.folder} is the end of this run: its adapter and {runs.ALIGN_FILE} are in {out}")
        if resume:
            checkpoints.require_optimizer(resume.folder)
        return train(flags, args, datasets, resume)


def done(args: Training, line: str) -> int:
    if args.process_index == 0:
        print(line)
    return 0


def read(flags: Flags, args: Training, parts: list[Parts]) -> Datasets:
    """What trains, mixed if it is several sets, and every example that is held out, once. The seed of the draw is the Trainer's."""
    seed = args.seed if args.data_seed is None else args.data_seed
    held_out = [
        chosen(one, flags.plain, part.held_out, "validation examples")
        for one, part in zip(flags.sets, parts, strict=True)
        if part.held_out
    ]
    train = [chosen(one, flags.plain, part.train, "examples") for one, part in zip(flags.sets, parts, strict=True)]
    weights = [one.weight for one in flags.sets if one.weight is not None]
    return Datasets(mixed(train, weights, seed), mixed(held_out, [], seed) if held_out else None)


def mixed(sets: list[MappedExamples], weights: list[float], seed: int) -> Examples:
    return sets[0] if len(sets) == 1 else Mixture(sets, weights, seed)


def chosen(one: DataSet, plain: bool, examples: list[Example], what: str) -> MappedExamples:
    """The examples of a set that have maps. Plain tuning takes the same, if the store is there, to be compared like for like.

    Raises ValueError if a text or a picture has changed since its maps were made.
    """
    there = not plain or (Path(one.maps) / "recipe.json").exists()
    with naming(one.maps):
        dataset = MappedExamples(examples, MapStore(one.maps) if there else None, plain)
    if not there:
        print(
            f"no maps in {one.maps}: --plain takes all {len(examples)} {what}, a run with maps may not",
            file=sys.stderr,
        )
    if dataset.store is not None and not plain:
        stale = find_stale(dataset.examples, dataset.store.origins())
        for id, changed in stale.items():
            raise ValueError(
                f"{len(stale)} of {len(dataset)} {what} have changed since their maps were made (the {changed} of {id}, for one): "
                f"make those again by {one.extract_command}, with the flags it had"
            )
    if dataset.missing:
        print(
            f"{dataset.missing} of {len(examples)} {what} have no maps in {one.maps} and are left out", file=sys.stderr
        )
    return dataset


def train(flags: Flags, args: Training, datasets: Datasets, resume: checkpoints.Checkpoint | None) -> int:
    """From the first step, or from a checkpoint, to a finished folder; the exit code."""
    out = Path(str(args.output_dir))
    dataset = datasets.train
    trainer = make_trainer(flags, args, datasets)
    say = print if trainer.is_world_process_zero() else lambda text: None

    count = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in trainer.lavender.named_children()}
    beside = f"{count['host']:,} parameters of the host, {count.get('align', 0):,} beside it"
    say(f"{len(dataset)} examples; training {beside}")
    if isinstance(dataset, Mixture):
        of = zip(dataset.counts, dataset.sets, flags.sets, strict=True)
        say("an epoch draws " + ", ".join(f"{n} from the {len(one)} of {named.maps}" for n, one, named in of))
    if flags.cache_vision:
        cache_vision(trainer, out / "vision")
    if "tensorboard" in args.report_to and not flags.plain:
        trainer.add_callback(WordMapPictures(trainer, flags.picture_steps))
    stop = StopOnSigterm(trainer)
    trainer.add_callback(stop)
    if resume:
        say(f"going on from {resume.folder}")
    with in_one_line():
        trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
    if broken := int(dataset.unreadable.sum()):
        say(f"{broken} of {len(dataset)} pictures could not be read; the examples after them stood in")
    if stop.received:
        say(f"stopped by SIGTERM at step {trainer.state.global_step}, which is saved: run the same command to go on")
        return 128 + signal.SIGTERM
    trainer.save_model()
    trainer.save_state()
    say(f"adapter and {runs.ALIGN_FILE} are in {out}")
    return 0


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a DataLoader's worker raises holds its traceback, and its last line says it. A full GPU is no fault of ours."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the GPU's memory is full ({one_line(error)[:80]} …): --plan says where it goes") from error
    except (ValueError, OSError) as error:
        if not str(error).startswith("Caught "):
            raise
        raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error


def make_trainer(flags: Flags, args: Training, datasets: Datasets) -> LavenderTrainer:
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    set_seed(args.seed)
    # Weights that train themselves stay in float32 under mixed precision: half of it would round small steps away.
    model, processor = runs.build(flags.of_model, torch.float32 if flags.mode == "full" else half)
    model.host.config.use_cache = False
    if args.use_liger_kernel:
        # The loss is taken from logits here, so Liger's fused one has no place.
        kernels = {"fused_linear_cross_entropy": False, **(args.liger_kernel_config or {})}
        with naming("--use_liger_kernel"):
            apply_liger_kernel(model.base, kernels)
        # The Trainer would look for a model of transformers, find Lavender around it, and warn that nothing was done.
        args.use_liger_kernel = False
    model.label_smoothing = args.label_smoothing_factor
    trust = partial(word_trust, flags.trust, AGGREGATIONS[flags.aggregate].regularised)
    choice = flags.words, flags.attend, flags.pos
    collate = Collator(processor, model.family, model.base.config, datasets.train.frame, *choice, trust)
    with naming("--push_to_hub") if args.push_to_hub else nullcontext():
        return LavenderTrainer(
            model=model,
            args=args,
            train_dataset=datasets.train,
            eval_dataset=datasets.held_out,
            data_collator=collate,
            processing_class=processor,
            pretrain_aligner_steps=flags.pretrain_aligner_steps,
            lambda_schedule=flags.lambda_schedule,
        )


def decided(flags: Flags, args: Training, dataset: Examples, held_out: Examples | None = None) -> dict[str, Any]:
    """What decides a run's result beside `ModelFlags`: examples, maps and the Trainer's flags, each under the name to show."""
    found = {
        "--data": " ".join(flags.data),
        "the examples": dataset.digest(),
        "the validation examples": None if held_out is None else held_out.digest(),
        "--pretrain_aligner_steps": flags.pretrain_aligner_steps,
        # A step takes a batch of each.
        "the number of processes": args.world_size,
        **{f"the maps' {key}": value for key, value in dataset.recipe().items()},
        **{f"--{name}": value for name, value in args.to_dict().items() if name not in NO_DIFFERENCE},
    }
    # As it will be read back.
    return json.loads(json.dumps(found, default=str))
