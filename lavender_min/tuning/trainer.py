"""The tuning: a collator that lines up text, picture and maps, and a `transformers.Trainer` that knows of two losses.

Which row speaks for a word? A decoder's row i has read tokens up to i and predicts token i + 1. `--attend predicting` (the
default, as the paper's code has it) takes the rows that predict the word's tokens, where the model decides to say it;
`--attend reading` takes the rows of the tokens themselves.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer

from lavender_min import hosts, sanity
from lavender_min.data import CAPTION_PROMPT, Example
from lavender_min.geometry import MAP_SIDE, minmax
from lavender_min.maps import MapStore, StoredMaps
from lavender_min.model import Lavender
from lavender_min.runs import ALIGN_FILE, load_align
from lavender_min.vision_cache import VisionCache
from lavender_min.words import token_spans

ATTEND = ("predicting", "reading")


class MappedExamples(Dataset):
    """Examples beside their maps. Without a store (plain tuning) there are no words to align."""

    def __init__(self, examples: list[Example], store: MapStore | None):
        self.store = store
        self.examples = examples if store is None else [e for e in examples if e.id in store]
        self.missing = len(examples) - len(self.examples)  # broken pictures, say
        if not self.examples:
            raise ValueError(
                f"none of the {len(examples)} examples has maps in the store; was it made from other data?"
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[Example, StoredMaps | None]:
        example = self.examples[i]
        if self.store is None:
            return example, None
        stored = self.store[example.id]
        if (stored.question, stored.answer) != (example.question, example.answer):
            raise ValueError(
                f"the maps of {example.id} were made for {stored.answer!r}, the data now says {example.answer!r}; extract again"
            )
        return example, stored


def chat(processor: Any, example: Example) -> tuple[str, int, dict[str, int]]:
    """The conversation as one string, where its labelled part starts, and where each field of the example starts in it.

    Only the answer and the end of its turn are labelled. A template may trim a text; the fields are found as they stand.
    """
    question = example.question or CAPTION_PROMPT
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}
    prefix = processor.apply_chat_template([asked], add_generation_prompt=True)
    text = processor.apply_chat_template([asked, said])
    if not text.startswith(prefix):
        raise ValueError("the chat template does not continue its own generation prompt with the answer")
    starts = {
        "question": prefix.rfind(example.question.strip()),
        "answer": text.find(example.answer.strip(), len(prefix)),
    }
    for field, start in starts.items():
        if start < 0:
            raise ValueError(f"the chat template changed the {field} of {example.id}, so its words cannot be found")
        value = getattr(example, field)
        starts[field] = start - (len(value) - len(value.lstrip()))
    return text, len(prefix), starts


def frame_box(width: int, height: int, frame: str) -> tuple[float, float, float, float]:
    """Top, bottom, left, right of what Stable Diffusion saw, as shares of the picture (see `diffusion.frame_image`)."""
    if frame == "whole":
        return 0.0, 1.0, 0.0, 1.0
    side = min(width, height)
    y, x = (height - side) / 2 / height, (width - side) / 2 / width
    return y, 1 - y, x, 1 - x


class Collator:
    """[(example, its maps)] ─► the keyword arguments of `Lavender.forward`."""

    def __init__(
        self,
        processor,
        config,
        host: ModuleType,
        frame: str = "whole",
        words: str = "answer",
        attend: str = "predicting",
    ):
        self.processor, self.config, self.host = processor, config, host
        self.frame, self.attend = frame, attend
        self.fields = ("answer",) if words == "answer" else ("question", "answer")
        self.vision: VisionCache | None = None  # instead of pixels, what the frozen vision tower said of them

    def __call__(self, rows: list[tuple[Example, StoredMaps | None]]) -> dict[str, Any]:
        pictures = [example.image() for example, _ in rows]
        chats = [chat(self.processor, example) for example, _ in rows]
        batch = dict(
            self.processor(
                text=[text for text, *_ in chats],
                images=[[picture] for picture in pictures],
                padding=True,
                padding_side="right",
                add_special_tokens=False,  # the template has put BOS already
                return_tensors="pt",
            )
        )
        if self.vision is not None:
            batch = {name: value for name, value in batch.items() if name not in self.host.PICTURE_INPUTS}
            batch["cross_attention_states"] = self.vision.read(pictures)
        ids = batch["input_ids"]
        labels, spans, maps = torch.full_like(ids, -100), [], []
        for i, ((text, answer_start, starts), (_, stored)) in enumerate(zip(chats, rows, strict=True)):
            encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            offsets = encoded["offset_mapping"]
            if encoded["input_ids"] != ids[i, : len(offsets)].tolist():
                raise ValueError("the processor and its tokenizer disagree on a text, so words cannot be found in it")
            for t, (start, _) in enumerate(offsets):
                if start >= answer_start:
                    labels[i, t] = ids[i, t]
            words = [] if stored is None else [word for word in stored.words if word.field in self.fields]
            found = token_spans([(starts[w.field] + w.start, starts[w.field] + w.end) for w in words], offsets)
            spans.append([tokens for tokens in found if tokens])
            of = {word: target for word, target in zip(stored.words, stored.maps, strict=True)} if stored else {}
            maps.append([of[word] for word, tokens in zip(words, found, strict=True) if tokens])
        batch["labels"] = labels
        batch["word_tokens"] = pad_words(spans)
        behind = 1 if self.attend == "predicting" else 0
        batch["word_rows"] = (batch["word_tokens"] - behind).where(batch["word_tokens"] >= 0, -1)
        batch["targets"] = torch.zeros(*batch["word_rows"].shape[:2], MAP_SIDE, MAP_SIDE)
        for i, targets in enumerate(maps):
            if targets:
                batch["targets"][i, : len(targets)] = minmax(torch.stack(targets).float())
        boxes = [frame_box(*picture.size, self.frame) for picture in pictures]
        layouts = [
            self.host.layout(*picture.size, self.processor, self.config, box)
            for picture, box in zip(pictures, boxes, strict=True)
        ]
        batch["layout"] = list(hosts.collate_layouts(layouts))
        return batch


def pad_words(spans: list[list[list[int]]]) -> Tensor:
    """int32 [b, w, k] of token positions, −1 where there is no word or no further token; w and k are at least 1."""
    w = max([1, *map(len, spans)])
    k = max([1, *(len(tokens) for words in spans for tokens in words)])
    padded = torch.full((len(spans), w, k), -1, dtype=torch.int32)
    for i, words in enumerate(spans):
        for j, tokens in enumerate(words):
            padded[i, j, : len(tokens)] = torch.tensor(tokens)
    return padded


class LavenderTrainer(Trainer):
    """`Trainer` with two losses, an Aligner that may be trained first, and checkpoints that hold adapter and Aligner apart."""

    def __init__(self, *args, pretrain_aligner_steps: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.pretrain_aligner_steps = pretrain_aligner_steps
        self.model_accepts_loss_kwargs = True  # we divide by num_items_in_batch, so the Trainer must not divide again
        self.sums: dict[str, Tensor] = {}
        self.seen = 0
        self.checked = self.is_deepspeed_enabled  # whose backward would take the step that `sanity` only looks at

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
        out = model(**inputs, num_items_in_batch=labels, accumulation_steps=steps)
        if model.training:
            for name, value in out.items():
                if name != "loss":
                    scale = steps if name == "loss_vlm" and labels is not None else 1
                    self.sums[name] = self.sums.get(name, 0) + value.float() * scale
            self.seen += 1
        return (out["loss"], out) if return_outputs else out["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.seen and "loss" in logs:
            for name, total in self.sums.items():
                mean = self.accelerator.gather(total / self.seen).mean().item()
                if name == "words":
                    name, mean = "words_per_sample", mean / self.args.per_device_train_batch_size
                logs[name] = round(mean, 6)
            self.sums, self.seen = {}, 0
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------- training the Aligner first

    def create_optimizer(self, model=None):
        """Splits each of the Trainer's parameter groups in two, host and align, so their learning rates can differ."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*([model] if model is not None else []))
        if fresh and self.pretrain_aligner_steps:
            host = {p for name, p in self.lavender.named_parameters() if name.startswith("vlm.")}
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
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        n = self.pretrain_aligner_steps
        if n:
            if not hasattr(scheduler, "lr_lambdas"):
                raise ValueError(
                    f"--pretrain_aligner_steps does not go with --lr_scheduler_type {self.args.lr_scheduler_type}"
                )

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
        if not self.args.should_save:  # one process writes
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.lavender
        state = model.state_dict() if state_dict is None else state_dict
        vlm = {name.removeprefix("vlm."): value for name, value in state.items() if name.startswith("vlm.")}
        model.vlm.save_pretrained(folder, state_dict=vlm)
        align = {name.removeprefix("align."): value for name, value in state.items() if name.startswith("align.")}
        if align:
            save_file({name: value.contiguous().cpu() for name, value in align.items()}, folder / ALIGN_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:  # its checkpoints hold the whole model once more, Aligner and all
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        super()._load_from_checkpoint(resume_from_checkpoint, model=self.lavender.vlm)
        if self.lavender.align is not None:
            load_align(self.lavender, resume_from_checkpoint)
