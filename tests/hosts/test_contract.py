"""What the contract itself does for every family: offsets in a text that grew, views added, chat templates, BOS."""

import pytest
import torch
import zoo
from PIL import Image

from lavender_min.data import Example
from lavender_min.geometry import MAP_SIDE, PatchLayout, resize_matrix
from lavender_min.hosts.base import WordRows, collate_views, expanded_offsets
from lavender_min.hosts.load import family_of, load
from lavender_min.hosts.reading import Sink
from lavender_min.tuning.collator import chat

IMAGE = "<image>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return zoo.save("llava", tmp_path_factory.mktemp("llava"))


def test_offsets_of_a_text_whose_placeholder_is_replaced(folder):
    """Some processors put other tokens in the placeholder's place: rows, newlines. Then it matches nothing."""
    tokenizer = load(folder).processor.tokenizer
    text = f"ab {IMAGE} cd"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    place = ids.index(tokenizer.convert_tokens_to_ids(IMAGE))
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
    words = WordRows(
        rows, [2, 1], texts, rows, torch.ones(3).long(), torch.zeros(3, MAP_SIDE, MAP_SIDE), views, torch.ones(3)
    )
    sink = Sink(family_of("llava", "llava"), words, [0], None, lambda maps: maps)
    maps = sink.maps(query=query, key=key, rows=rows, attn_mask=None, is_causal=False, scale=None)
    attention = (query @ key.mT * 8**-0.5).softmax(-1)
    for found, text, row in zip(maps, texts, rows, strict=True):
        seen = 0
        for view in [small, large] if text == 0 else [large]:
            canvas = attention[text][:, row][:, view.index[0].long()]
            seen = seen + view.index[0].numel() * (view.resize_y[0] @ canvas @ view.resize_x[0].mT)
        torch.testing.assert_close(found, seen)


def test_pictures_are_only_looked_at_by_whom_they_belong_to(folder):
    """One picture a text, in order: a batch's text sees its own."""
    host, colors = load(folder), [(255, 0, 0), (0, 0, 255)]
    pictures = [Image.new("RGB", (60, 60), color) for color in colors]
    text = f"{IMAGE} a"
    with torch.no_grad():
        both, alone = (
            [
                host.family.hidden_states(
                    host.model.eval(), host.family.encode(host.processor, [text] * len(some), some).inputs
                )
            ]
            for some in (pictures, pictures[1:])
        )
    torch.testing.assert_close(both[0][1], alone[0][0], atol=1e-4, rtol=1e-4)


def test_newlines_that_a_processor_adds_join_those_of_the_text():
    """Gemma 3 puts two of them on either side of a picture."""
    tokenizer = zoo.tokenizer_of(zoo.KINDS["llava"])
    text, grown = f"user\n{IMAGE}cat", f"user\n\n\n{IMAGE * 4}\n\ncat"
    ids = tokenizer(grown, add_special_tokens=False)["input_ids"]
    assert len(tokenizer("\n\n\n", add_special_tokens=False)["input_ids"]) == 1
    offsets = expanded_offsets(tokenizer, text, ids)
    assert "".join(text[slice(*offset)] for offset in offsets) == "usercat"


def test_a_tokenizer_puts_bos_where_the_template_does_not(folder):
    host = load(folder)
    bos = host.processor.tokenizer.bos_token
    for text in (f"a {IMAGE} cat", f"{bos}a {IMAGE} cat"):
        encoded = host.family.encode(host.processor, [text], [Image.new("RGB", (60, 60))])
        assert encoded.inputs["input_ids"][0, 0] == host.processor.tokenizer.bos_token_id
        assert (encoded.inputs["input_ids"] == host.processor.tokenizer.bos_token_id).sum() == 1
        assert "".join(text[slice(*offset)] for offset in encoded.offsets[0]).removeprefix(bos) == f"a {IMAGE} cat"


def test_an_answer_follows_the_generation_prompt():
    """LLaVA-OneVision's template has a space more before an answer. A template that changes more than space is refused."""
    _, processor = zoo.built("llava_onevision")
    example = Example("1", None, "what is it?", "a cat")
    said = chat(processor, example)
    assert said.text.endswith("<|im_start|>assistant\na cat<|im_end|>")
    assert said.text[said.answer_start :] == "a cat<|im_end|>" and said.starts["answer"] == said.answer_start
    processor.chat_template = processor.chat_template.replace("assistant\\n", "model\\n").replace(
        "assistant\n", "model\n"
    )
    with pytest.raises(ValueError, match="does not continue its own generation prompt"):
        chat(processor, example)


def test_a_host_without_a_chat_template_gets_its_familys(tmp_path):
    host = load(zoo.save("paligemma", tmp_path))
    assert not (tmp_path / "chat_template.jinja").exists()
    assert chat(host.processor, Example("1", None, "what is it?", "a cat")).text == f"{IMAGE}what is it?\na cat<eos>"


def test_capped_scores_are_refused_in_one_line(tmp_path):
    """PaliGemma 2's text model."""
    model, processor = zoo.built("paligemma")
    model.config.text_config.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="^its text model .gemma. caps its attention scores") as error:
        family_of("paligemma", "paligemma").layers(model)
    assert "\n" not in str(error.value)
