"""What toy hosts are told and asked about a picture, in token ids."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavender_min.data import CAPTION_PROMPT, Example
from lavender_min.toy import hosts, world
from lavender_min.toy.fitting import DEVICE

# The kinds of questions that a host is trained on, beside the list of what is there.
QUESTIONS = ("color", "exists")
# Questions in a conversation. For one pass through the tower a picture teaches several times which patch belongs to a question.
TURNS = 4
# Left out of the loss.
NO_LABEL = -100


class Turn(NamedTuple):
    question: str
    answer: str


class Text(NamedTuple):
    """A batch of conversations."""

    ids: Tensor  # [b, t]
    mask: Tensor  # [b, t], 0 where a text is filled up
    labels: Tensor  # [b, t], NO_LABEL outside the answers
    image_token_id: int


def listed(scene: world.Scene) -> list[Turn]:
    """What is there, in a conversation of its own: after it every question could be answered without looking."""
    return [Turn(CAPTION_PROMPT, world.listing(scene).text)]


def asked(scene: world.Scene, rng: np.random.Generator) -> list[Turn]:
    """TURNS questions, kinds in any order, none twice."""
    turns = dict[str, str]()
    while len(turns) < TURNS:
        question, answer = world.QUESTIONS[str(rng.choice(QUESTIONS))](scene, rng)
        turns[question.text] = answer.text
    return [Turn(*turn) for turn in turns.items()]


class Chats:
    """Conversations in token ids, with as many image tokens as a toy picture has."""

    def __init__(self, built: hosts.Built):
        self.built = built

    def encoded(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Token ids and labels. The picture stands before the first question."""
        template, messages = self.built.processor.apply_chat_template, list[dict[str, Any]]()
        ids, labels = list[int](), list[int]()
        for turn in turns:
            prompt = [{"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": prompt if messages else [{"type": "image"}, *prompt]})
            start = len(self.grown(template(messages, add_generation_prompt=True)))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            ids = self.grown(template(messages))
            labels += [NO_LABEL] * (start - len(labels)) + ids[start:]
        return ids, labels

    def grown(self, text: str) -> list[int]:
        ids = self.built.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        place = ids.index(self.built.image_token_id)
        return ids[:place] + self.built.image_ids + ids[place + 1 :]

    def batch(self, conversations: Sequence[Sequence[Turn]]) -> Text:
        texts = [self.encoded(turns) for turns in conversations]
        pad = self.built.processor.tokenizer.pad_token_id
        ids = torch.full((len(texts), max(len(own) for own, _ in texts)), pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_LABEL)
        for row, (own, told) in enumerate(texts):
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
            labels[row, : len(own)] = torch.tensor(told)
        return Text(ids.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE), self.built.image_token_id)


def single_turn(example: Example) -> list[Turn]:
    return [Turn(example.question or CAPTION_PROMPT, example.answer)]
