"""The family contract can say what a self-attention host needs: a small LLaVA, written down here, goes through everything.

Its picture stands among the text as 16 tokens, attention is causal, q and k come rotated, texts of a batch are padded.
"""

import pytest
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lavender_min import hosts
from lavender_min.data import CAPTION_PROMPT
from lavender_min.geometry import MAP_SIDE, PatchLayout, resize_matrix
from lavender_min.hosts.base import Family, Imagined, WordRows, collate_views, expanded_offsets
from lavender_min.hosts.load import load
from lavender_min.hosts.reading import Sink
from lavender_min.maps import MapStore
from lavender_min.toy import data, models
from lavender_min.tuning import runs
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import word_rows

SIDE = 4
_LAYERS = r".*language_model\.layers\.\d+\."


class Llava(Family):
    name = "llava"
    picture_inputs = ("pixel_values",)
    lora_targets = {"cross": _LAYERS + r"self_attn\.[qkvo]_proj"}

    def layers(self, host):
        return {i: layer.self_attn for i, layer in enumerate(self.decoder(host).layers)}

    def project(self, attention, layer_inputs, words, query_of, key_of):
        hidden, (cos, sin) = layer_inputs["hidden_states"], layer_inputs["position_embeddings"]
        d, at = self.heads(attention).dim, (words.texts, words.rows.long().clamp(min=0))
        query = rearrange(query_of(attention, hidden[at]), "n (h d) -> n h d", d=d)
        key = rearrange(key_of(attention, hidden), "b t (h d) -> b h t d", d=d)
        turns = [turn.expand(len(hidden), -1, -1) for turn in (cos, sin)]
        query, _ = apply_rotary_pos_emb(query, query, *(turn[at] for turn in turns))
        _, key = apply_rotary_pos_emb(key, key, *turns)
        return query, key

    def views(self, size, processor, config, ids, box):
        """The whole picture is squeezed into the square, so each side resamples alike."""
        slots = (ids == config.image_token_id).nonzero()[:, 0]
        top, bottom, left, right = (share * SIDE for share in box)
        y, x = torch.arange(SIDE)[:, None], torch.arange(SIDE)[None]
        inside = (y + 1 > top) & (y < bottom) & (x + 1 > left) & (x < right)
        index = slots.view(SIDE, SIDE).where(inside, -1).int()[None]
        resize_y, resize_x = (resize_matrix(SIDE, MAP_SIDE, *ends)[None] for ends in ((top, bottom), (left, right)))
        return [PatchLayout(index, resize_y, resize_x)]

    def vision(self, host):
        return [host.model.vision_tower, host.model.multi_modal_projector]

    def picture_states(self, host, inputs):
        found = host.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
        return [{"states": states} for states in found]

    def cached_inputs(self, states):
        output = BaseModelOutputWithPooling(pooler_output=[of["states"] for of in states])
        return {"mm_encoder_outputs": {"image": output}}

    def imagine(self, config, b, tokens):
        return Imagined({}, [], "not planned here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, large enough that attention is far from uniform."""
    torch.manual_seed(0)
    lines = [f"{e.question} {e.answer}" for e in data.load("tune", 100)] + [f"{CAPTION_PROMPT} user assistant"]
    tokenizer = models.chat_tokenizer(lines * 3)
    images = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=models.CHAT_TEMPLATE, image_token=models.IMAGE_TOKEN,
    )  # fmt: skip
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": 56, "patch_size": 14, **small},
        text_config={
            "model_type": "llama", "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id, **small,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(models.IMAGE_TOKEN), image_seq_length=16,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    where = tmp_path_factory.mktemp("llava")
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return str(where)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(hosts.FAMILIES, "llava", hosts.FamilyRow("test_contract:Llava", "for this test"))


@pytest.fixture
def examples(store_folder):
    """Two pictures that are not square, and a caption and a question about each."""
    mapped = MappedExamples(data.load("tune", 2), MapStore(store_folder))
    return [
        (e._replace(image=lambda e=e: e.image().resize((150, 90))), stored)
        for e, stored in map(mapped.__getitem__, range(4))
    ]


def batch_of(host, examples, **options):
    return Collator(host.processor, host.family, host.model.config, **options)(examples)


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "words")}


def test_words_are_found_in_a_text_that_grew(folder, examples):
    host = load(folder)
    batch, start = batch_of(host, examples, words="all"), 0
    assert (batch["input_ids"] == host.model.config.image_token_id).sum(1).tolist() == [16] * 4
    assert batch["attention_mask"].sum(1).unique().numel() > 1
    spoken = [word for _, stored in examples for word in stored.words]
    words = batch["words"]
    for word, length in zip(spoken, words["lengths"].tolist(), strict=True):
        tokens, text = words["tokens"][start : start + length], words["texts"][start]
        assert host.processor.tokenizer.decode(batch["input_ids"][text, tokens.long()]).strip(" ,.?") == word.text
        start += length
    for ids, labels, (example, _) in zip(batch["input_ids"], batch["labels"], examples, strict=True):
        assert host.processor.tokenizer.decode(ids[labels != -100]) == example.answer + "<|eot_id|>"


def test_offsets_of_a_text_whose_placeholder_is_replaced(folder):
    """Some processors put other tokens in the placeholder's place: rows, newlines. Then it matches nothing."""
    tokenizer = load(folder).processor.tokenizer
    text = f"ab {models.IMAGE_TOKEN} cd"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    place = ids.index(tokenizer.convert_tokens_to_ids(models.IMAGE_TOKEN))
    grown = [*ids[:place], 7, 8, 9, 7, *ids[place + 1 :]]
    offsets = expanded_offsets(tokenizer, text, grown)
    assert len(offsets) == len(grown) and offsets[place : place + 4] == [(0, 0)] * 4
    for own, offset in [*zip(ids[:place], offsets, strict=False), *zip(ids[:place:-1], offsets[::-1], strict=False)]:
        assert text[slice(*offset)] == tokenizer.decode([own])
    with pytest.raises(ValueError, match="the processor and its tokenizer disagree on a text"):
        expanded_offsets(tokenizer, text, [5, 6, 7])


def test_logits_are_bit_equal_with_and_without_hooks(folder, examples):
    host = load(folder)
    batch = batch_of(host, examples)
    plain = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
    sink = Sink(host.family, word_rows(batch["words"]), [0, 1, 2], None, lambda maps: maps)
    with torch.no_grad():
        expected = plain(**inputs_of(batch)).logits
        hidden = host.family.hidden_states(host.model.eval(), inputs_of(batch), sink)
        assert torch.equal(host.family.logits(host.model, hidden), expected)
        assert torch.equal(host.model(**inputs_of(batch)).logits, expected)


@pytest.mark.parametrize("together", [True, False])
def test_maps_equal_those_of_eager_attention(folder, examples, together):
    """A padded batch comes with a mask, one text alone with none, which means causal."""
    host = load(folder)
    eager = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    for some in [examples] if together else [examples[:1], examples[1:2]]:
        batch = batch_of(host, some)
        words = word_rows(batch["words"])
        sink = Sink(host.family, words, [0, 1, 2], None, lambda maps: maps)
        with torch.no_grad():
            host.family.hidden_states(host.model.eval(), inputs_of(batch), sink)
            attentions = eager(**inputs_of(batch), output_attentions=True).attentions
        assert list(sink.own_maps) == [0, 1, 2] == list(range(len(attentions)))
        slots = torch.stack([(ids == eager.config.image_token_id).nonzero()[:, 0] for ids in batch["input_ids"]])
        for layer, maps in sink.own_maps.items():
            for found, text, row in zip(maps, words.texts, words.rows, strict=True):
                canvas = attentions[layer][text][:, row, slots[text]].unflatten(-1, (SIDE, SIDE))
                resized = F.interpolate(canvas[None], size=(MAP_SIDE, MAP_SIDE), mode="bilinear")[0]
                torch.testing.assert_close(found / SIDE**2, resized, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("rank", [0, 8])
def test_parallel_attention_starts_as_the_hosts_own(folder, examples, rank, together):
    """Rotation and mask included: the maps of the parallel projections are the host's own at the start."""
    host = load(folder)
    model, _ = runs.build(ModelFlags("", parallel_rank=rank), loaded=host)
    batch = batch_of(host, examples if together else examples[1:2])
    sink = model.sink(word_rows(batch["words"]), model.layers)
    with torch.no_grad():
        host.family.hidden_states(model.eval().base, inputs_of(batch), sink)
    for layer, own in sink.own_maps.items():
        torch.testing.assert_close(sink.parallel_maps[layer], own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aggregate", ["learn", "layer-mean"])
def test_both_losses_in_4_bits_with_adapters_and_checkpointing(folder, examples, aggregate):
    """Every trainable part is reached, and checkpointing changes no gradient."""
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        flags = ModelFlags(folder, mode="qlora", aggregate=aggregate, match="all", lora_dropout=0.0)
        model, processor = runs.build(flags)
        packed = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
        assert len(packed) > 3 * 7
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        made = Collator(processor, model.family, model.base.config)(examples)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        out = model(**made)
        assert out["loss_vlm"] > 0 and out["loss_att"] > 0 and out["words"] == len(made["words"]["lengths"])
        out["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    reached = [name for name, gradient in gradients[0].items() if gradient.abs().sum() > 0]
    # Of a low-rank correction the first factor waits for the second, which starts at 0.
    waiting = [name for name in gradients[0] if name not in reached]
    assert all(".parallel." in name and name.endswith("0.weight") for name in waiting)


def test_cached_picture_states_give_the_same_hidden_states(folder, examples):
    host = load(folder)
    batch = batch_of(host, examples)
    with torch.no_grad():
        expected = host.family.hidden_states(host.model.eval(), inputs_of(batch))
        states = host.family.picture_states(host.model, batch)
        rest = {k: v for k, v in inputs_of(batch).items() if k not in host.family.picture_inputs}
        found = host.family.hidden_states(host.model, rest | host.family.cached_inputs(states))
    assert torch.equal(found, expected)


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
    sink = Sink(Llava(), words, [0], None, lambda maps: maps)
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
    text = f"{models.IMAGE_TOKEN} a"
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
