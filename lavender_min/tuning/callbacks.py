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
        self.trainer, self.received = trainer, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "received", True))

    def on_step_end(self, args, state, control, **kwargs):
        # The notice reaches processes at different times, and they must stop together.
        if args.world_size > 1:
            self.received = bool(
                self.trainer.accelerator.reduce(torch.tensor(float(self.received), device=args.device))
            )
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.before)


class WordMapPictures(TrainerCallback):
    """Every `steps` steps, for TensorBoard: the words of the first `count` examples, Stable Diffusion's map and the host's."""

    def __init__(self, trainer: Any, steps: int, count: int = 2):
        self.trainer, self.steps = trainer, steps
        examples = [trainer.train_dataset[i] for i in range(min(count, len(trainer.train_dataset)))]
        self.pictures = [example.image() for example, _ in examples]
        self.batch = trainer.data_collator(examples)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.is_fsdp_enabled:
            torch.distributed.fsdp.register_fsdp_forward_method(self.trainer.lavender, "read")
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        model = self.trainer.lavender
        batch = self.trainer._prepare_inputs(self.batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        model.eval()
        with self.trainer.accelerator.autocast():
            maps = {"Stable Diffusion": batch["words"]["targets"], **model.read(**inputs)}
        model.train()
        # The first process alone has a writer.
        callbacks = (c for c in self.trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback))
        for writer in filter(None, (callback.tb_writer for callback in callbacks)):
            for i, (picture, words) in enumerate(zip(self.pictures, self.words(), strict=True)):
                if words:
                    found = {kind: of[list(words)] for kind, of in maps.items()}
                    figure = draw.word_maps(picture, list(words.values()), found)
                    writer.add_figure(f"words/{i}", figure, state.global_step)

    def words(self) -> list[dict[int, str]]:
        """The words of each picture's text, by their place among all words of the batch."""
        words = self.batch["words"]
        found: list[dict[int, str]] = [{} for _ in self.pictures]
        ends = words["lengths"].cumsum(0).tolist()
        for place, (end, length) in enumerate(zip(ends, words["lengths"].tolist(), strict=True)):
            tokens, text = words["tokens"][end - length : end], int(words["texts"][end - 1])
            if (tokens >= 0).all():
                ids = self.batch["input_ids"][text, tokens.long()]
                found[text][place] = self.trainer.processing_class.tokenizer.decode(ids)
        return found
