"""A small run of the trainer in this process, for the tests of what happens in and beside it."""

import torch
from transformers import TrainingArguments

from lavender_min.tuning import runs
from lavender_min.tuning.collator import Collator
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.trainer import LavenderTrainer


def make(vlm_folder, dtype=torch.float32, **flags):
    """(Lavender, processor), the same every time."""
    torch.manual_seed(0)
    return runs.build(ModelFlags(vlm=vlm_folder, **{"lora_dropout": 0.0, "match": "all", **flags}), dtype)


def trainer_of(made, rows, tmp_path, *, steps=3, batch=4, pretrain=0, shuffle=True, **arguments):
    lavender, processor = made
    defaults = {"report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-3, logging_steps=1,
        remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
        train_sampling_strategy="random" if shuffle else "sequential", **{**defaults, **arguments},
    )  # fmt: skip
    return LavenderTrainer(
        model=lavender, args=args, train_dataset=rows, pretrain_aligner_steps=pretrain,
        data_collator=Collator(processor, lavender.family, lavender.base.config), processing_class=processor,
    )  # fmt: skip


def fit(vlm_folder, rows, tmp_path, *, flags=None, model=None, prepare=lambda trainer: None, **options):
    """The tuned model, and what was logged of each step. `prepare` sees the trainer before it starts."""
    trainer = trainer_of(model or make(vlm_folder, **(flags or {})), rows, tmp_path, **options)
    prepare(trainer)
    trainer.train()
    return trainer.lavender, [entry for entry in trainer.state.log_history if "loss" in entry]


def inputs_of(batch):
    """What transformers' own forward takes of a batch."""
    return {name: value for name, value in batch.items() if name not in ("labels", "words")}


def words_of(batch):
    """(text, tokens, rows) of every word of a batch."""
    words, found, start = batch["words"], [], 0
    for length in words["lengths"].tolist():
        part = slice(start, start + length)
        found.append((int(words["texts"][start]), words["tokens"][part].tolist(), words["rows"][part].tolist()))
        start += length
    return found


def host_state(model):
    return {name: p.detach().clone() for name, p in model.host.named_parameters() if "lora" in name}


def state(model):
    """All that a run may have changed."""
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: b.clone() for name, b in model.align.named_buffers()}
