"""Texts, pictures and maps, lined up: one batch for `model.Lavender` from a few examples and what is stored of them.

Which row speaks for a word? A decoder's row i has read tokens up to i and predicts token i + 1. `--attend predicting` (the
default, as the paper's code has it) takes the rows that predict the word's tokens, where the model decides to say it;
`--attend reading` takes the rows of the tokens themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lavender_min.align.trust import word_trust
from lavender_min.data import CAPTION_PROMPT, Example
from lavender_min.failing import naming, one_line
from lavender_min.geometry import MAP_SIDE, minmax
from lavender_min.hosts.base import Box, Family, collate_views
from lavender_min.maps import MapStore, StoredMaps
from lavender_min.tuning import grammar
from lavender_min.tuning.vision_cache import VisionCache
from lavender_min.words import token_spans

# (maps of a text's words, their tokens, how many tokens the text has) ─► trust in each word
WordTrust = Callable[[Tensor, Sequence[Sequence[int]], int], Tensor]
ALIKE = partial(word_trust, "none", False)
# So many pictures of a list of examples go into its digest, at most.
DIGESTED = 8


def opened(picture: Image.Image) -> Image.Image:
    return picture


class MappedExamples(Dataset):
    """Examples beside their maps, their pictures opened. Plain tuning takes the examples of the store too, but no maps.

    An example whose picture cannot be read is replaced by the next that can, so that batches stay full and runs on the same data
    take the same steps. It is named once on stderr.
    """

    def __init__(self, examples: list[Example], store: MapStore | None, plain: bool = False):
        self.store, self.plain = store, plain
        self.examples = examples if store is None else [e for e in examples if e.id in store]
        # Broken pictures, for one.
        self.missing = len(examples) - len(self.examples)
        if not self.examples:
            raise ValueError(
                f"none of the {len(examples)} examples has maps in the store; was it made from other data?"
            )
        # Shared with the workers of a DataLoader.
        self.unreadable = torch.zeros(len(self.examples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[Example, StoredMaps | None]:
        for k in chain(range(i, len(self)), range(i)):
            example, picture = self.examples[k], self.picture(k)
            if picture is not None:
                return example._replace(image=partial(opened, picture)), self.stored(example)
        raise ValueError(f"none of the {len(self)} pictures can be read")

    def picture(self, i: int) -> Image.Image | None:
        """The picture of example i; None, and a line on stderr the first time, if it cannot be read."""
        if self.unreadable[i]:
            return None
        try:
            with naming(self.examples[i].id):
                return self.examples[i].image()
        except (ValueError, OSError) as error:
            self.unreadable[i] = True
            print(f"broken picture, the next example stands in for it: {one_line(error)}", file=sys.stderr, flush=True)
            return None

    def stored(self, example: Example) -> StoredMaps | None:
        """What the store holds of an example. Raises ValueError, which names it, if that was made for another text."""
        if self.store is None or self.plain:
            return None
        with naming(example.id):
            stored = self.store[example.id]
        if (stored.question, stored.answer) != (example.question, example.answer):
            raise ValueError(
                f"the maps of {example.id} were made for {stored.answer!r}, the data now says {example.answer!r}; extract again"
            )
        if not stored.maps.isfinite().all():
            raise ValueError(
                f"the maps of {example.id} in {self.store.path} hold values that are no numbers; extract them again"
            )
        return stored

    @property
    def frame(self) -> str:
        """The part of a picture that the maps cover (see `frame_box`); without maps it makes no difference."""
        return "whole" if self.store is None or self.plain else self.store.recipe["frame"]

    def recipe(self) -> dict[str, Any]:
        """How the maps were made, as far as it decides them."""
        return {} if self.store is None else {k: v for k, v in self.store.recipe.items() if k != "made_with"}

    def lengths(self) -> list[int]:
        """Of each text, in characters."""
        return [len(example.question) + len(example.answer) for example in self.examples]

    def digest(self) -> str:
        """Tells lists of examples apart: by ids and texts, and by the pixels of a few pictures, as all would take too long."""
        made = sha256()
        for example in self.examples:
            made.update(json.dumps([example.id, example.question, example.answer]).encode())
        for i in range(0, len(self), -(-len(self) // DIGESTED)):
            picture = self.picture(i)
            made.update(b"" if picture is None else repr(picture.size).encode() + picture.tobytes())
        return f"{len(self)} with sha256 {made.hexdigest()[:16]}"


class Chat(NamedTuple):
    """A conversation as one string."""

    text: str
    answer_start: int  # from this character on it is labelled: the answer, and the end of its turn
    starts: dict[str, int]  # where each field of the example starts in the text


# Stands in for a question. It is no character of any language, so no template holds it.
MARK = "\ue000"


def chat(processor: Any, example: Example) -> Chat:
    """The example through the host's chat template. A template may trim a text; the fields are found as they stand."""
    question = example.question or CAPTION_PROMPT
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}
    prefix = processor.apply_chat_template([user], add_generation_prompt=True)
    text = processor.apply_chat_template([user, assistant])
    if not text.startswith(prefix):
        # LLaVA-OneVision's has one space more than its generation prompt, and that is what the host will be asked with.
        answer = text.find(example.answer.strip(), len(commonprefix([prefix, text])))
        if text[: max(answer, 0)].split() != prefix.split():
            raise ValueError("the chat template does not continue its own generation prompt with the answer")
        text = prefix + text[answer:]
    # A short question ("is", "user") also stands in the template's own words, so the search begins where a mark comes out.
    marked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": MARK}]}
    header, mark, _ = processor.apply_chat_template([marked], add_generation_prompt=True).partition(MARK)
    starts = {
        "question": prefix.find(example.question.strip(), len(header)) if mark and prefix.startswith(header) else -1,
        "answer": text.find(example.answer.strip(), len(prefix)),
    }
    for field, start in starts.items():
        if start < 0:
            raise ValueError(f"the chat template changed the {field} of {example.id}, so its words cannot be found")
        value = getattr(example, field)
        starts[field] = start - (len(value) - len(value.lstrip()))
    return Chat(text, len(prefix), starts)


def frame_box(width: int, height: int, frame: str) -> Box:
    """The part of a picture that Stable Diffusion saw (see `teachers.attention_maps.frame_image`)."""
    if frame == "whole":
        return 0.0, 1.0, 0.0, 1.0
    side = min(width, height)
    y, x = (height - side) / 2 / height, (width - side) / 2 / width
    return y, 1 - y, x, 1 - x


class MappedWord(NamedTuple):
    """A word of a text, with its tokens there and its map."""

    tokens: list[int]
    map: Tensor  # [g, g], as stored
    trust: float  # how much its error counts


class Collator:
    """[(example, its maps)] ─► the keyword arguments of `Lavender.forward`.

    `frame` is what the maps cover, `words` which fields are aligned (answer, or all), `attend` which rows speak for a word, `pos`
    which parts of speech are aligned, with commas between (see `grammar.PARTS`; "": every word), `trust` how much each word's
    error counts.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        config: Any,
        frame: str = "whole",
        words: str = "answer",
        attend: str = "predicting",
        pos: str = "",
        trust: WordTrust = ALIKE,
    ):
        self.processor, self.family, self.config = processor, family, config
        self.frame = frame
        self.fields = ("answer",) if words == "answer" else ("question", "answer")
        self.pos = pos.split(",") if pos else []
        self.trust = trust
        # A row predicts the token after it.
        self.behind = 1 if attend == "predicting" else 0
        # If there is one, it says what the frozen vision tower made of a picture, in place of pixels.
        self.vision: VisionCache | None = None

    def __call__(self, examples: Sequence[tuple[Example, StoredMaps | None]]) -> dict[str, Any]:
        pictures = [example.image() for example, _ in examples]
        chats = [chat(self.processor, example) for example, _ in examples]
        starts = [said.answer_start for said in chats]
        # A processor refuses some texts and pictures (a token of a picture in a question), and knows no example by its name.
        with naming("the host's processor", f"it was given {', '.join(example.id for example, _ in examples)}"):
            encoded = self.family.encode(self.processor, [said.text for said in chats], pictures, answer_starts=starts)
        batch: dict[str, Any] = dict(encoded.inputs)
        if self.vision is not None:
            batch = {name: value for name, value in batch.items() if name not in self.family.picture_inputs}
            batch |= self.family.cached_inputs([self.vision.read(picture) for picture in pictures])
        ids = batch["input_ids"]
        batch["labels"] = torch.full_like(ids, -100)
        for i, (said, offsets) in enumerate(zip(chats, encoded.offsets, strict=True)):
            # One token may hold a space that ends the prompt and the answer's first word.
            answered = [t for t, (_, end) in enumerate(offsets) if end > said.answer_start]
            batch["labels"][i, answered] = ids[i, answered]
        words = [
            self.mapped(said, stored, offsets)
            for said, (_, stored), offsets in zip(chats, examples, encoded.offsets, strict=True)
        ]
        batch["words"] = lined_up(words, self.behind)
        views = []
        for picture, own_ids in zip(pictures, ids, strict=True):
            box = frame_box(*picture.size, self.frame)
            views.append(self.family.views(picture.size, self.processor, self.config, own_ids, box))
        batch["words"]["views"] = [list(view) for view in collate_views(views)]
        return batch

    def mapped(self, said: Chat, stored: StoredMaps | None, offsets: list[tuple[int, int]]) -> list[MappedWord]:
        """The words of one text that have a map and are to be aligned. A word without a token is left out."""
        if stored is None:
            return []
        wanted = [i for i, word in enumerate(stored.words) if word.field in self.fields]
        if self.pos:
            parts = {field: grammar.parts_of_speech(getattr(stored, field)) for field in self.fields}
            wanted = [i for i in wanted if parts[stored.words[i].field].get(stored.words[i].start) in self.pos]
        placed = [stored.words[i] for i in wanted]
        spans = [(said.starts[word.field] + word.start, said.starts[word.field] + word.end) for word in placed]
        found = [(i, tokens) for i, tokens in zip(wanted, token_spans(spans, offsets), strict=True) if tokens]
        trust = self.trust(stored.maps[[i for i, _ in found]], [tokens for _, tokens in found], len(offsets))
        return [MappedWord(tokens, stored.maps[i], t) for (i, tokens), t in zip(found, trust.tolist(), strict=True)]


def lined_up(texts: list[list[MappedWord]], behind: int) -> dict[str, Any]:
    """The fields of a WordRows but for its views, of a batch's texts. A token's row stands so many rows `behind` it.

    A batch without a word gets one that has no row: its map is 0 and it never counts, but gradients then reach the Aligner in
    every process, as DDP wants.
    """
    words = list(chain.from_iterable(texts))
    counts = [sum(len(word.tokens) for word in text) for text in texts]
    tokens = torch.tensor([token for word in words for token in word.tokens], dtype=torch.int32)
    targets = minmax(torch.stack([word.map for word in words]).float()) if words else torch.zeros(1, MAP_SIDE, MAP_SIDE)
    if not words:
        counts[0], tokens = 1, torch.tensor([-1], dtype=torch.int32)
    return {
        "rows": (tokens - behind).where(tokens >= 0, -1),
        "counts": counts,
        "texts": torch.arange(len(texts)).repeat_interleave(torch.tensor(counts)),
        "tokens": tokens,
        "lengths": torch.tensor([len(word.tokens) for word in words] or [1]),
        "targets": targets,
        "trust": torch.tensor([word.trust for word in words] or [0.0]),
    }
