"""Text ─► words ─► the tokens of a word, in the windows a text encoder takes.

Stable Diffusion's tokenizer and the VLM's tokenizer cut the same sentence at different places, and neither cuts at
words. What both agree on is the position of a character. So a word is a stretch of characters (`Word`), found once
from the text alone, and each model looks up which of *its* tokens overlap that stretch (`token_spans`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import regex  # the standard library's `re` knows no combining marks: it would cut Hindi and decomposed accents apart

# A letter or digit, then letters, digits and marks. A mark alone is no word: the heart of "I \u2764\ufe0f you" ends in one.
# Words are joined inside by an apostrophe or hyphen ("child's", "T-shirt"), by the joiners of Indic and Persian script (a mark may
# follow those), or, between digits, by a point or comma ("1,000.5"). Scripts written without spaces (Chinese, Thai) give one word
# per unbroken run.
_WORD = regex.compile(
    r"""[\p{L}\p{N}] [\p{L}\p{M}\p{N}]*
        (?: (?: ['’‐‑\-] (?=[\p{L}\p{N}]) | [\u200c\u200d] | (?<=\p{N})[.,](?=\p{N}) )  [\p{L}\p{M}\p{N}]+ )*""",
    regex.VERBOSE,
)


class Word(NamedTuple):
    """One word of an example: `fields[field][start:end] == text`."""

    text: str
    field: str  # "question" or "answer"
    start: int  # character offsets inside that field
    end: int


def find_words(fields: Mapping[str, str]) -> list[Word]:
    """All words of the named text fields, field by field in reading order; punctuation belongs to no word.

    >>> find_words({"answer": "A child's T-shirt."})
    [Word(text='A', field='answer', start=0, end=1), Word(text="child's", field='answer', start=2, end=9), \
Word(text='T-shirt', field='answer', start=10, end=17)]
    """
    return [
        Word(match.group(), field, match.start(), match.end())
        for field, text in fields.items()
        for match in _WORD.finditer(text)
    ]


def token_spans(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Which tokens overlap each stretch of characters.

    `spans`: (start, end) per word; `offsets`: (start, end) per token, in the same string, in reading order: what a
    tokenizer gives for `return_offsets_mapping=True`. Special tokens and padding stand at (0, 0), cover no
    character, and belong to no word. A token that covers two words belongs to both.

    >>> token_spans([(0, 1), (2, 9)], [(0, 0), (0, 1), (1, 5), (5, 9), (0, 0)])
    [[1], [2, 3]]
    """
    visible = [i for i, (start, end) in enumerate(offsets) if start < end]
    starts = [offsets[i][0] for i in visible]
    ends = [offsets[i][1] for i in visible]
    if any(a > b for side in (starts, ends) for a, b in zip(side, side[1:], strict=False)):
        raise ValueError("token offsets must be in reading order; got offsets that step back")
    # Both lists ascend, so the overlapping tokens are neighbours: from the first that ends after the stretch begins,
    # up to the first that starts where the stretch is over.
    return [visible[bisect_right(ends, start) : bisect_left(starts, end)] for start, end in spans]


class Window(NamedTuple):
    """A stretch of a text that fits the text encoder: SOS, tokens, EOS, padding; and where its words are."""

    ids: list[int]
    words: dict[int, list[int]]  # word index ─► positions in `ids`


def join_fields(fields: Mapping[str, str], words: Sequence[Word]) -> tuple[str, list[tuple[int, int]]]:
    """Stable Diffusion reads the fields one after another; where each word stands in that joined text."""
    prompt, begins = "", {}
    for field, text in fields.items():
        prompt += " " if prompt and text else ""
        begins[field] = len(prompt)
        prompt += text
    return prompt, [(begins[word.field] + word.start, begins[word.field] + word.end) for word in words]


def windows(tokenizer: Any, prompt: str, spans: Sequence[tuple[int, int]]) -> list[Window]:
    """Cut a prompt into windows of the tokenizer's length (77 for v1.4), between words, losing none.

    A word is split only if it alone is longer than a window; its tokens then stand in several windows.
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, tokens_of = encoded["input_ids"], token_spans(spans, encoded["offset_mapping"])
    inside = {token for tokens in tokens_of for token in tokens[1:]}  # no cut just before one of these
    words_of: dict[int, list[int]] = {}
    for i, tokens in enumerate(tokens_of):
        for token in tokens:
            words_of.setdefault(token, []).append(i)
    found: list[Window] = []
    room, start = tokenizer.model_max_length - 2, 0
    while start < len(ids) or not found:
        stop = min(start + room, len(ids))
        if stop < len(ids):
            stop = next((cut for cut in range(stop, start, -1) if cut not in inside), stop)
        padded = [tokenizer.bos_token_id, *ids[start:stop], tokenizer.eos_token_id]
        padded += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(padded))
        here: dict[int, list[int]] = {}
        for token in range(start, stop):
            for i in words_of.get(token, ()):
                # SOS comes first.
                here.setdefault(i, []).append(token - start + 1)
        found.append(Window(padded, here))
        start = stop
    return found
