"""Roots and parts of speech of English words, for `--match root` and `--pos`.

Both are what the Hanover Tagger says (the package HanTa; Wartena, KONVENS 2019). Its model of English was learnt from the British
National Corpus, whose tags it gives, and comes inside its wheel: nothing is downloaded. The package is optional, so it is imported
when it is first needed.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

from lavender_min.words import find_words

# A part of speech ─► how its tags begin. A verb is a lexical one: be, do, have and the modals show nothing in a picture.
PARTS = {"noun": "N", "adjective": "AJ", "verb": "VV"}
# (what is said in place of a word, the word), as ids of tokens ─► whether they have a root in common.
SameRoot = Callable[[list[int], list[int]], bool]

# The corpus, and so the tagger, takes "child's" for two words and "don't" for "do" and "n't".
_CLITIC = re.compile(r"(?<=.)(n['’]t|['’]\w*)$", re.IGNORECASE)


def require(flag: str) -> None:
    """Raises ValueError, which names the flag that asks for it, if the tagger is not installed."""
    if importlib.util.find_spec("HanTa") is None:
        raise ValueError(f"{flag} needs the package HanTa: pip install 'lavender-min[grammar]'")


@functools.cache
def tagger() -> Any:
    """Loaded once a process, in a second."""
    from HanTa.HanoverTagger import HanoverTagger

    return HanoverTagger("morphmodel_en.pgz")


@functools.lru_cache(maxsize=100_000)
def roots(word: str) -> frozenset[str]:
    """The lemmas that a word may have, in lower case: one for each part of speech that it may be.

    >>> sorted(roots("painting"))
    ['paint', 'painting']
    """
    tags = [tag for tag, _ in tagger().tag_word(word)]
    return frozenset(tagger().analyze(word, tag)[0].lower() for tag in tags)


@functools.lru_cache(maxsize=100_000)
def parts_of_speech(text: str) -> dict[int, str]:
    """Where each word of a text starts ─► its part of speech, "" where that is none of PARTS.

    The words beside it decide with it, so an answer of one word is only a guess: "Blue" is a noun.

    >>> parts_of_speech("A man paints the paints red")
    {0: '', 2: 'noun', 6: 'verb', 13: '', 17: 'noun', 24: 'adjective'}
    """
    words = find_words({"text": text})
    pieces: list[str] = []
    # Where in `pieces` each word begins.
    heads: list[int] = []
    for word in words:
        heads.append(len(pieces))
        pieces += [piece.replace("’", "'") for piece in _CLITIC.split(word.text) if piece]
    tags = tagger().tag_sent(pieces, taglevel=0)
    parts = [next((part for part, start in PARTS.items() if tags[i].startswith(start)), "") for i in heads]
    return {word.start: part for word, part in zip(words, parts, strict=True)}


def same_root(processor: Any) -> SameRoot:
    """Whether the first words that two lists of a host's tokens spell have a root in common. Case does not count.

    The host's processor is looked at only when words are compared, because the planner, which compares none, has no processor.
    """

    @functools.lru_cache(maxsize=100_000)
    def roots_of(ids: tuple[int, ...]) -> frozenset[str]:
        spelled = find_words({"text": processor.tokenizer.decode(list(ids), skip_special_tokens=True)})
        return roots(spelled[0].text) if spelled else frozenset()

    return lambda said, word: not roots_of(tuple(said)).isdisjoint(roots_of(tuple(word)))
