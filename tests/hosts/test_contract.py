"""What families share: words found in a text that grew, and views of one picture that become one map."""

import pytest
import torch

from lavender_min.geometry import MAP_SIDE, PatchLayout, resize_matrix
from lavender_min.hosts.base import WordRows, collate_views, expanded_offsets
from lavender_min.hosts.mllama import Mllama
from lavender_min.hosts.reading import Sink
from lavender_min.toy import hosts
from lavender_min.toy.tokenizers import chat_tokenizer


def test_offsets_of_a_text_whose_placeholder_is_replaced():
    """Some processors put other tokens in the placeholder's place: rows, newlines. Then it matches nothing."""
    tokenizer = chat_tokenizer(["ab cd"], hosts.LLAMA)
    text = "ab <|image|> cd"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    place = ids.index(tokenizer.convert_tokens_to_ids("<|image|>"))
    grown = [*ids[:place], 7, 8, 9, 7, *ids[place + 1 :]]
    offsets = expanded_offsets(tokenizer, text, grown)
    assert len(offsets) == len(grown) and offsets[place : place + 4] == [(0, 0)] * 4
    for own, offset in [*zip(ids[:place], offsets, strict=False), *zip(ids[:place:-1], offsets[::-1], strict=False)]:
        assert text[slice(*offset)] == tokenizer.decode([own])
    with pytest.raises(ValueError, match="the processor and its tokenizer disagree on a text"):
        expanded_offsets(tokenizer, text, [5, 6, 7])


def test_views_are_added_each_times_its_patches():
    """A picture seen twice, as 4 × 4 patches and as a thumbnail of 2 × 2; a second one seen once."""
    torch.manual_seed(0)
    square = [resize_matrix(n)[None] for n in (4, 2)]
    large = PatchLayout(torch.arange(16).view(1, 4, 4).int(), square[0], square[0])
    small = PatchLayout(16 + torch.arange(4).view(1, 2, 2).int(), square[1], square[1])
    views = collate_views([[small, large], [large]])
    assert len(views) == 2 and (views[1].index[1] == -1).all()
    query, key = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 20, 8)
    rows, texts = torch.tensor([0, 2, 1]), torch.tensor([0, 0, 1])
    words = WordRows(rows, [2, 1], texts, rows, torch.ones(3).long(), torch.zeros(3, MAP_SIDE, MAP_SIDE), views)
    sink = Sink(Mllama(), words, [0], None, lambda maps: maps)
    maps = sink.maps(query=query, key=key, rows=rows, attn_mask=None, is_causal=False, scale=None)
    attention = (query @ key.mT * 8**-0.5).softmax(-1)
    for found, text, row in zip(maps, texts, rows, strict=True):
        seen = 0
        for view in [small, large] if text == 0 else [large]:
            canvas = attention[text][:, row][:, view.index[0].long()]
            seen = seen + view.index[0].numel() * (view.resize_y[0] @ canvas @ view.resize_x[0].mT)
        torch.testing.assert_close(found, seen)
