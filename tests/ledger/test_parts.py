"""Hosts put together anew: their parts are the shipped host's to the last bit, and what is asked of them is what it says."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionModel

from lavender_min import data
from lavender_min.evaluation import models
from lavender_min.evaluation.pre_alignment import text_loss
from lavender_min.hosts.architectures import BidirectionalLlavaForConditionalGeneration, VlmPerceiver
from lavender_min.hosts.load import load
from lavender_min.ledger import parts, plan
from lavender_min.tuning.flags import ModelFlags

SHIPPED = plan.host_folder("idefics3")


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as short:
        short.setattr(parts, "read", lambda language, tokenizer: None)
        parts.take_apart(SHIPPED, folder)
    return folder


def test_parts_are_those_of_the_shipped_host(apart):
    host, processor, _ = load(str(SHIPPED), dtype=torch.float32)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = torch.ones(2, 8, 8, dtype=torch.bool)
    seen = host.model.vision_model(pixel_values=pixels, patch_attention_mask=whole).last_hidden_state
    assert torch.equal(SiglipVisionModel.from_pretrained(apart / parts.VISION)(pixels).last_hidden_state, seen)
    tokenizer = AutoTokenizer.from_pretrained(apart / parts.LANGUAGE)
    ids = tokenizer("a small green star left of a ring", return_tensors="pt")["input_ids"]
    spoken = AutoModelForCausalLM.from_pretrained(apart / parts.LANGUAGE)(ids).logits
    assert torch.equal(spoken, host(input_ids=ids).logits)
    # Without a picture the template says what the host's own says.
    text = "what color is the star?"
    asked = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    own = processor.apply_chat_template(asked, add_generation_prompt=True)
    said = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False) == own


def test_hosts_of_each_kind_and_what_is_asked_of_them(apart, tmp_path):
    captions = [example for example in data.load("toy", split="heldout")[:18] if not example.question]
    language = AutoModelForCausalLM.from_pretrained(apart / parts.LANGUAGE)
    found = {}
    for kind in ("causal", "bidirectional", "perceiver"):
        parts.put_together(kind, apart, tmp_path / "causal", 3, tmp_path / kind)
        loaded = models.load(ModelFlags(str(tmp_path / kind)), torch.float32)
        found[kind] = parts.numbers(loaded, apart, captions)
        host = loaded.model.base
        assert isinstance(host, BidirectionalLlavaForConditionalGeneration) == (kind == "bidirectional")
        assert isinstance(host.model.vision_tower, VlmPerceiver) == (kind == "perceiver")
        # Before it is tuned, no language is lost.
        assert found[kind]["lost.all"] == pytest.approx(0, abs=1e-6)
        assert found[kind]["gap.all"] > 0.05 and 0 < found[kind]["loss.all"] < 3 * math.log(440)
        # A second call leaves what is there.
        before = (tmp_path / kind / "config.json").stat().st_mtime_ns
        parts.put_together(kind, apart, tmp_path / "causal", 3, tmp_path / kind)
        assert (tmp_path / kind / "config.json").stat().st_mtime_ns == before
    # The projectors of the first two are one, so their pictures enter alike, and only layers tell them apart.
    assert found["causal"]["loss.all"] != found["bidirectional"]["loss.all"]
    with torch.no_grad():
        for parameter in host.model.language_model.parameters():
            parameter.mul_(1.1)
    worse = parts.numbers(loaded, apart, captions)
    texts = AutoTokenizer.from_pretrained(apart / parts.LANGUAGE)([parts.listing(e.id) for e in captions])["input_ids"]
    losses = []
    for model in (host, language):
        costs = [
            model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            for ids in texts
        ]
        losses.append(-torch.cat(costs).mean().item())
    assert worse["lost.all"] == pytest.approx(losses[0] - losses[1], rel=1e-4) and worse["lost.all"] > 0


def test_a_language_model_that_reads_expects_what_it_read(apart, monkeypatch):
    monkeypatch.setattr(parts, "STEPS", 20)
    language = AutoModelForCausalLM.from_pretrained(apart / parts.LANGUAGE)
    tokenizer = AutoTokenizer.from_pretrained(apart / parts.LANGUAGE)
    texts = [parts.listing(f"heldout-{i:05d}-caption") for i in range(8)]
    before = text_loss(language, tokenizer, texts)
    parts.read(language, tokenizer)
    # It had never spoken without a picture.
    assert text_loss(language, tokenizer, texts) < 0.6 * before
