"""The tokenizers of the toy models: byte-level BPE learned on the toy world's own sentences.

Short words are one token, longer ones ("turquoise", "crescent") are kept in two or three, so that words of several tokens occur.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

# Tokens that Stable Diffusion's text encoder takes; 77 in v1.4.
TEXT_LENGTH = 40
# Letters that a word may have and still be one token.
LONGEST_WORD = 6


class Specials(NamedTuple):
    """The special tokens of a family of hosts."""

    first: tuple[str, ...]  # in the order of their ids
    bos: str | None  # one of the first, as are the next two
    eos: str
    pad: str
    # After every other token: Llama's image token lies outside the range of lm_head.
    last: tuple[str, ...] = ()
    # By the attribute of the tokenizer under which a processor looks for a token.
    named: Mapping[str, str] = MappingProxyType({})


def learn_merges(corpus: Iterable[str], pre_tokenizer, alphabet: list[str], suffix: str = "") -> list[tuple[str, str]]:
    """BPE merges learned on `corpus`, without the last merge of every word of more than LONGEST_WORD letters."""
    ending: Any = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**ending))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=100, initial_alphabet=alphabet, show_progress=False, **ending
    )
    texts = list(corpus)
    tokenizer.train_from_iterator(texts, trainer)
    words = {piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    long = {word + suffix for word in words if sum(map(str.isalpha, word.lstrip("Ġ"))) > LONGEST_WORD}
    learned = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return [(a, b) for a, b in learned if a + b not in long]


def clip_tokenizer(corpus: Iterable[str], folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer (lower case, `</w>` ends a word, EOS pads), trained on `corpus`, written to `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[a-z]+|[^\s\w]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(False, False, False),
        ]
    )
    merges = learn_merges(corpus, split, alphabet, "</w>")
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return tokenizer


def chat_tokenizer(corpus: Iterable[str], special: Specials) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a family's own special tokens; `special.last` come after all others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = learn_merges(corpus, split, alphabet)
    tokens = [*special.first, *alphabet, *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([*special.first, *special.last])
    bos: Any = special.bos
    if bos:
        # Like Llama's tokenizer, it puts BOS first unless told not to.
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=special.eos,
        pad_token=special.pad,
        extra_special_tokens=dict(special.named),
        clean_up_tokenization_spaces=False,
    )
