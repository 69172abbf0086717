"""Words and token spans, against slow and obvious definitions."""

import string

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lavender_min.words import Word, find_words, token_spans


def texts(sentence: str) -> list[str]:
    return [word.text for word in find_words({"answer": sentence})]


@pytest.mark.parametrize(
    "sentence, words",
    [
        ("Two dogs, running.", ["Two", "dogs", "running"]),
        ("a child's T-shirt -- 'red'", ["a", "child's", "T-shirt", "red"]),
        ("the dogs’ bowl isn’t full", ["the", "dogs", "bowl", "isn’t", "full"]),
        ("1,000.5 balls in 3D_space", ["1,000.5", "balls", "in", "3D", "space"]),
        ("Ein Öl-Gemälde, naïve cafe\u0301", ["Ein", "Öl-Gemälde", "naïve", "cafe\u0301"]),
        ("एक हिन्दी वाक्य", ["एक", "हिन्दी", "वाक्य"]),
        ("红色 圆形。", ["红色", "圆形"]),
        ("end. Start", ["end", "Start"]),
        ("", []),
        ("?! – ☃", []),
        # Marks alone are no word: the heart's emoji style, a stray accent, a keycap without its digit.
        ("I \u2764\ufe0f you", ["I", "you"]),
        ("\u2764\ufe0fyou", ["you"]),
        ("\u0301 \ufe0f\u20e3 -\ufe0f", []),
        ("a-\ufe0f b", ["a", "b"]),
        ("1\ufe0f\u20e3", ["1\ufe0f\u20e3"]),
        # Bengali ra, joiner, virama, ya: a mark right after the joiner.
        ("\u09b0\u200d\u09cd\u09af\u09be\u09ac", ["\u09b0\u200d\u09cd\u09af\u09be\u09ac"]),
    ],
)
def test_what_is_a_word(sentence, words):
    assert texts(sentence) == words


def test_fields_stay_apart_and_ordered():
    words = find_words({"question": "Is it red?", "answer": "red"})
    assert words[-2:] == [Word("red", "question", 6, 9), Word("red", "answer", 0, 3)]


@given(st.text(max_size=80))
@settings(deadline=None)
def test_every_word_is_its_stretch_of_text(text):
    words = find_words({"answer": text})
    assert all(text[word.start : word.end] == word.text for word in words)
    assert all(a.end <= b.start for a, b in zip(words, words[1:], strict=False))
    # `regex` knows letters of a later Unicode than Python does.
    assert all(regex.search(r"[\p{L}\p{N}]", word.text) for word in words)
    # No letter or digit is lost, whatever stands around it.
    covered = {i for word in words for i in range(word.start, word.end)}
    assert {i for i, c in enumerate(text) if c.isalnum()} <= covered


@given(st.data())
@settings(deadline=None)
def test_token_spans_are_the_overlapping_tokens(data):
    text = data.draw(st.text(alphabet=string.ascii_letters + " '.-é", max_size=60))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    cuts = [0, *cuts, len(text)]
    offsets = [(0, 0), *zip(cuts, cuts[1:], strict=False), (0, 0)]  # a tokenizer that cuts anywhere, specials around
    spans = [(word.start, word.end) for word in find_words({"answer": text})]
    slow = [[i for i, (s, e) in enumerate(offsets) if s < end and e > start and s < e] for start, end in spans]
    assert token_spans(spans, offsets) == slow


def test_tokens_of_one_character_and_tokens_across_words():
    # Byte-level tokenizers give several tokens the same single character; some tokens hold the space before a word.
    assert token_spans([(0, 1), (2, 4)], [(0, 1), (0, 1), (1, 4)]) == [[0, 1], [2]]
    assert token_spans([(0, 2), (3, 5)], [(0, 5)]) == [[0], [0]]


def test_offsets_out_of_order_are_refused():
    with pytest.raises(ValueError, match="reading order"):
        token_spans([(0, 1)], [(3, 4), (0, 1)])
