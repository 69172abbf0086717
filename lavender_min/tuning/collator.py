"""Texts, pictures and maps, lined up: one batch for `model.Lavender` from a few examples and what is stored of them.

Which row speaks for a word? A decoder's row i has read tokens up to i and predicts token i + 1. `--attend predicting` (the
default, as the paper's code has it) takes the rows that predict the word's tokens, where the model decides to say it;
`--attend reading` takes the rows of the tokens themselves.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lavender_min.data import CAPTION_PROMPT, Example
from lavender_min.geometry import MAP_SIDE, minmax
from lavender_min.hosts import base as hosts
from lavender_min.maps import MapStore, StoredMaps
from lavender_min.tuning.vision_cache import VisionCache
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
