"""A `transformers.Trainer` that knows of two losses: their logs, the Aligner trained first, checkpoints that hold both parts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lavender_min.failing import naming
from lavender_min.tuning import card, sanity
from lavender_min.tuning.checkpoints import STATE_FILE
from lavender_min.tuning.model import Lavender
from lavender_min.tuning.runs import ALIGN_FILE, FLAGS_FILE, load_align, load_whole
from lavender_min.tuning.schedules import LAMBDA_SCHEDULES, aligner_steps

NO_NUMBERS = "does a lower --learning_rate help, with another --output_dir?"


class ByLength(LengthGroupedSampler):
    """Texts of about one length in a batch, in an order that follows from seed and epoch, so that it comes back on resuming."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class LavenderTrainer(Trainer):
    """`Trainer` with two losses, an Aligner that may be trained first, and checkpoints that hold adapter and Aligner apart.

    `pretrain_aligner_steps` below 1 is a share of the run's steps. `lambda_schedule` is one of `schedules.LAMBDA_SCHEDULES`.
    """

    def __init__(self, *args, pretrain_aligner_steps: float = 0, lambda_schedule: str = "constant", **kwargs):
        super().__init__(*args, **kwargs)
        self.pretrain_aligner_steps, self.lambda_schedule = pretrain_aligner_steps, lambda_schedule
        # We divide by num_items_in_batch, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        # Since the last log: each output of the model, added up, and over how many batches.
        self.sums: dict[str, Tensor] = {}
        self.seen = 0
        # The same of a validation, each batch times its examples.
        self.measured: dict[str, Tensor] = {}
        # DeepSpeed's backward would take the step that `sanity` only tries.
        self.checked = self.is_deepspeed_enabled

    @property
    def lavender(self) -> Lavender:
        return self.accelerator.unwrap_model(self.model)

    def create_accelerator_and_postprocess(self):
        """FSDP's own mixed precision would also round targets, layouts and the Aligner; autocast leaves them alone."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def compute_loss_context_manager(self):
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().compute_loss_context_manager()

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.checked:
            self.checked = True
            sanity.check(self, model)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        steps = self.current_gradient_accumulation_steps if model.training else 1
        labels = num_items_in_batch
        if labels is not None and self.args.average_tokens_across_devices:
            # The Trainer counts labels over all processes, and gradients are averaged over them once more.
            labels = labels / self.accelerator.num_processes
        # A validation takes the model's own λ at every step, so that its losses can be compared.
        scale = self.lambda_scale(self.state.global_step) if model.training else 1.0
        out = model(**inputs, num_items_in_batch=labels, accumulation_steps=steps, lambda_scale=scale)
        if not model.training:
            # Weighted as the Trainer weighs `eval_loss`.
            share = torch.tensor(float(len(inputs["input_ids"])), device=out["loss"].device)
            for name, value in {**out, "examples": torch.ones_like(out["loss"])}.items():
                self.measured[name] = self.measured.get(name, 0) + value.detach().float() * share
        else:
            for name, value in out.items():
                if name != "loss":
                    # Divided by the labels of the whole accumulated batch, it is one part of so many.
                    parts = steps if name == "loss_vlm" and labels is not None else 1
                    self.sums[name] = self.sums.get(name, 0) + value.float() * parts
            self.seen += 1
        return (out["loss"], out) if return_outputs else out["loss"]

    def lambda_scale(self, step: int) -> float:
        """What λ is multiplied by in the step that follows on `step` steps."""
        return LAMBDA_SCHEDULES[self.lambda_schedule](step / self.state.max_steps)

    def evaluation_loop(self, *args, **kwargs):
        """Beside the loss, its two parts: eval_loss_vlm and, with alignment, eval_loss_att."""
        self.measured = {}
        found = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        totals = {name: self.accelerator.gather(total).sum() for name, total in self.measured.items()}
        parts = [name for name in ("loss_vlm", "loss_att") if name in totals]
        means = {f"{prefix}_{name}": (totals[name] / totals["examples"]).item() for name in parts}
        return found._replace(metrics={**(found.metrics or {}), **means})

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        dataset: Any = self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ByLength(batch, dataset.lengths(), seed)

    def _get_eval_sampler(self, eval_dataset) -> None:
        """A validation goes in order. The Trainer would group it by length as well, and knows no length of an example."""

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.seen and "loss" in logs:
            for name, total in self.sums.items():
                mean = self.accelerator.gather(total / self.seen).mean().item()
                if name == "words":
                    name, mean = "words_per_sample", mean / self.args.per_device_train_batch_size
                if not math.isfinite(mean):
                    raise ValueError(f"stopped at step {self.state.global_step}: {name} is {mean}; {NO_NUMBERS}")
                logs[name] = round(mean, 6)
            if self.lambda_schedule != "constant" and "loss_att" in self.sums:
                # Of the last step that is logged.
                logs["lambda_att"] = self.lavender.lambda_att * self.lambda_scale(self.state.global_step - 1)
            self.require_numbers()
            self.sums, self.seen = {}, 0
        super().log(logs, start_time)

    def require_numbers(self) -> None:
        """Raises ValueError, which names the step, if a weight that trains has become infinite or not a number."""
        trained = {name: p for name, p in self.lavender.named_parameters() if p.requires_grad}
        finite = torch.stack([sanity.whole(p.detach().isfinite().all()) for p in trained.values()])
        if not finite.all():
            name = list(trained)[int(finite.int().argmin())]
            raise ValueError(
                f"stopped at step {self.state.global_step}: {name} holds no numbers any more; {NO_NUMBERS}"
            )

    # ------------------------------------------------------------------------------------- training the Aligner first

    def create_optimizer(self, model=None):
        """Splits each of the Trainer's parameter groups in two, host and align, so their learning rates can differ."""
        fresh = self.optimizer is None
        with naming(f"--optim {OptimizerNames(self.args.optim).value} --optim_args {self.args.optim_args}"):
            optimizer = super().create_optimizer(*([model] if model is not None else []))
        if fresh and self.pretrain_aligner_steps:
            host = {p for name, p in self.lavender.named_parameters() if name.startswith("host.")}
            groups = []
            for group in optimizer.param_groups:
                for mine in (True, False):
                    params = [p for p in group["params"] if (p in host) == mine]
                    groups += [{**group, "params": params, "host": mine}] if params else []
            optimizer.param_groups = groups
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """For the first N steps the host's learning rate is 0, and with it its weight decay: not a bit of it moves.

        Freezing by requires_grad would not do: the optimiser and DDP look at it once, at the start.
        """
        kind = SchedulerType(self.args.lr_scheduler_type).value
        with naming(f"--lr_scheduler_type {kind} --lr_scheduler_kwargs {self.args.lr_scheduler_kwargs}"):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        n = aligner_steps(self.pretrain_aligner_steps, num_training_steps)
        if n:
            if not hasattr(scheduler, "lr_lambdas"):
                raise ValueError(f"--pretrain_aligner_steps does not go with --lr_scheduler_type {kind}")

            def held(usual):
                return lambda step: 0.0 if step < n else usual(step)

            scheduler.lr_lambdas = [
                held(usual) if group["host"] else usual
                for usual, group in zip(scheduler.lr_lambdas, scheduler.optimizer.param_groups, strict=True)
            ]
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * rate(0)
        return scheduler

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # One process writes.
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.lavender
        state = model.state_dict() if state_dict is None else state_dict
        host = {name.removeprefix("host."): value for name, value in state.items() if name.startswith("host.")}
        model.host.save_pretrained(folder, state_dict=host)
        align = {name.removeprefix("align."): value for name, value in state.items() if name.startswith("align.")}
        if align:
            save_file({name: value.contiguous().cpu() for name, value in align.items()}, folder / ALIGN_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        # A Trainer that is used from Python may have no run that remembers its flags.
        run = Path(str(self.args.output_dir))
        if (run / FLAGS_FILE).exists():
            card.write(folder, run, self.state.log_history)

    def create_model_card(self, *args, **kwargs) -> None:
        """What --push_to_hub would write over the card that `_save` has left."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A run is finished once its folder has trainer_state.json again, which comes last."""
        if output_dir is None and self.args.should_save:
            (Path(str(self.args.output_dir)) / STATE_FILE).unlink(missing_ok=True)
        self.require_numbers()
        with naming(Path(str(output_dir or self.args.output_dir)), "is there room on the disk?"):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with naming(output_dir, "is there room on the disk?"):
            super()._save_optimizer_and_scheduler(output_dir)

    def save_state(self) -> None:
        if self.args.should_save:
            out = Path(str(self.args.output_dir))
            self.state.save_to_json(str(out / f".tmp-{STATE_FILE}"))
            os.replace(out / f".tmp-{STATE_FILE}", out / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # FSDP's checkpoints hold the whole model once more, Aligner and all.
        with naming(resume_from_checkpoint):
            if self.is_fsdp_enabled:
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
            if hasattr(self.lavender.host, "peft_config"):
                super()._load_from_checkpoint(resume_from_checkpoint, model=self.lavender.host)
            else:
                load_whole(self.lavender.host, resume_from_checkpoint)
            if self.lavender.align is not None:
                load_align(self.lavender, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with naming(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with naming(str(checkpoint)):
            super()._load_rng_state(checkpoint)
