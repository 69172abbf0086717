"""Hosts that are put together anew from the parts of a shipped one, for claims about how a host is built (18 and 19).

Those claims want a tower that has learnt to see and a language model that has learnt to speak. Both are inside the toy SmolVLM: its
tower is a SigLIP's to the last bit when a picture is one tile, and its language model is a Llama. Only a projector is new then. But
that Llama has only ever spoken below a picture; so that there is language to lose, it first reads for a while without one.

    causal          an ordinary LLaVA
    bidirectional   the same, with a picture's tokens seen in both directions (`hosts.architectures`)
    perceiver       a LLaVA that sees through another, whole LLaVA, which was trained before
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    get_cosine_schedule_with_warmup,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lavender_min.data import Example
from lavender_min.evaluation import models
from lavender_min.evaluation.names import Numbers
from lavender_min.evaluation.pre_alignment import modality_gap, text_loss
from lavender_min.hosts import assemble, perceiver
from lavender_min.hosts.load import load
from lavender_min.toy import data as toy
from lavender_min.toy import world

VISION, LANGUAGE = "siglip", "llama"
# What the toy SmolVLM's own template says around a text, without a picture.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# The part of the layers that "the first" are.
FIRST = 0.2
# How long the language model reads: steps of so many texts, and the learning rate. It costs the host sight (experiments/LOG.md).
STEPS, TEXTS, RATE = 150, 32, 3e-4


def take_apart(host_folder: Path, into: Path) -> None:
    """Writes the tower and the language model of a toy Idefics3, each as a model of its own; the latter has read (`read`)."""
    host, processor, _ = load(str(host_folder), dtype=torch.float32)
    seen, spoken = host.config.vision_config, host.config.text_config
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size hidden_act layer_norm_eps"
    config = SiglipVisionConfig(**{name: getattr(seen, name) for name in sizes.split()}, vision_use_head=False)
    tower, language = SiglipVisionModel(config), LlamaForCausalLM(spoken)
    tower.load_state_dict(host.model.vision_model.state_dict())
    language.model.load_state_dict(host.model.text_model.state_dict())
    language.lm_head.load_state_dict(host.lm_head.state_dict())
    side = {"height": seen.image_size, "width": seen.image_size}
    tower.save_pretrained(into / VISION)
    SiglipImageProcessorPil(size=side, resample=processor.image_processor.resample).save_pretrained(into / VISION)
    read(language, processor.tokenizer)
    language.save_pretrained(into / LANGUAGE)
    processor.tokenizer.chat_template = TEMPLATE
    processor.tokenizer.save_pretrained(into / LANGUAGE)


def listing(example_id: str) -> str:
    """What is in the scene of a toy example, as hosts were told in pretraining. No tuning shows such a text."""
    return world.listing(toy.make(example_id).scene).text


def read(language: LlamaForCausalLM, tokenizer: Any) -> None:
    """Trains a language model on listings of scenes, without their pictures."""
    optimizer = torch.optim.AdamW(language.parameters(), RATE)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    for step in range(STEPS):
        texts = [listing(f"pretrain-{i:05d}-caption") for i in range(step * TEXTS, (step + 1) * TEXTS)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        language(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def put_together(kind: str, parts: Path, trained: Path, seed: int, into: Path) -> None:
    """Makes a host of one of the kinds above in the folder `into`; does nothing if it is there.

    `parts` is what `take_apart` wrote; `trained` the LLaVA that a perceiver is made of.
    """
    if into.exists():
        return
    torch.manual_seed(seed)
    if kind == "perceiver":
        assemble.assemble(*perceiver.perceiver(str(trained)), str(parts / LANGUAGE), into)
    else:
        assemble.assemble(*assemble.siglip(str(parts / VISION)), str(parts / LANGUAGE), into, assemble.MASKS[kind])


@torch.no_grad()
def numbers(loaded: models.Loaded, parts: Path, examples: Sequence[Example]) -> Numbers:
    """What these claims are about, of captions and their pictures.

    gap    the mean `modality_gap` before the first fifth of the layers
    lost   by how many nats a token listings of the scenes, without pictures, cost more than before the tuning
    loss   cross entropy of the captions below their pictures, nats a token
    """
    host, processor = loaded.model.base, loaded.processor
    captions = [example for example in examples if not example.question]
    batch = models.collator(loaded, "whole")([(example, None) for example in captions])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "words")}
    states = torch.stack(host(**inputs, output_hidden_states=True).hidden_states)
    picture = inputs["input_ids"] == host.config.image_token_id
    gaps = modality_gap(states, picture, inputs["attention_mask"].bool() & ~picture)
    first = gaps[: math.ceil(FIRST * (len(gaps) - 1))]
    texts = [listing(example.id) for example in captions]
    before = text_loss(
        AutoModelForCausalLM.from_pretrained(parts / LANGUAGE),
        AutoTokenizer.from_pretrained(parts / LANGUAGE),
        texts,
    )
    return {
        "gap.all": statistics.fmean(first.tolist()),
        "lost.all": text_loss(host, processor.tokenizer, texts) - before,
        "loss.all": loaded.model.eval()(**batch)["loss_vlm"].item(),
    }
