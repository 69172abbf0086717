"""What happens beside the steps of a run: a clean end when the machine is taken away, and pictures to look at."""

import signal
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from lavender_min import draw


class StopOnSigterm(TrainerCallback):
    """SIGTERM, a spot machine's notice, ends the step, saves a checkpoint and leaves the training loop.

    (TrainingArguments has --enable_jit_checkpoint for this; it saves between a gradient and its step, so that dropout is
    drawn anew for the repeated batch, and each process for itself.)
    """

    def __init__(self, trainer: Any):
        self.trainer, self.asked = trainer, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # the notice reaches processes at different times, and they must stop together
            self.asked = bool(self.trainer.accelerator.reduce(torch.tensor(float(self.asked), device=args.device)))
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.before)


class WordMapPictures(TrainerCallback):
    """Every `steps` steps, for TensorBoard: the words of the first `count` examples, Stable Diffusion's map and the host's."""

    def __init__(self, trainer: Any, steps: int, count: int = 2):
        self.trainer, self.steps = trainer, steps
        rows = [trainer.train_dataset[i] for i in range(min(count, len(trainer.train_dataset)))]
        self.pictures = [example.image() for example, _ in rows]
        self.batch = trainer.data_collator(rows)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.is_fsdp_enabled:
            torch.distributed.fsdp.register_fsdp_forward_method(self.trainer.lavender, "read")
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        model = self.trainer.lavender
        batch = self.trainer._prepare_inputs(self.batch)
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "word_tokens", "targets")}
        model.eval()
        with self.trainer.accelerator.autocast():
            maps = {"Stable Diffusion": batch["targets"], **model.read(**inputs)}  # each [b, w, g, g]
        model.train()
        for writer in (
            c.tb_writer for c in self.trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)
        ):
            for i, picture in enumerate(self.pictures if writer else ()):  # the first process alone has a writer
                tokens = [[t for t in word if t >= 0] for word in self.batch["word_tokens"][i].tolist()]
                words = [
                    self.trainer.processing_class.tokenizer.decode(self.batch["input_ids"][i, t]) for t in tokens if t
                ]
                if words:
                    figure = draw.word_maps(picture, words, {kind: of[i, : len(words)] for kind, of in maps.items()})
                    writer.add_figure(f"words/{i}", figure, state.global_step)
