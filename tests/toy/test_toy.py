"""The toy world tells the truth about itself, and the models shipped with it are what they are said to be."""

import pickle

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

from lavender_min.evaluation import localise
from lavender_min.evaluation.flags import MeasuredData
from lavender_min.teachers import attention_maps
from lavender_min.toy import data, models, world

seeds = st.integers(0, 3_000_000)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_a_scene_is_a_function_of_its_seed(seed):
    scene = world.make_scene(seed)
    assert scene == world.make_scene(seed)
    assert 2 <= len(scene.things) <= 4
    assert len({t.shape for t in scene.things}) == len({t.color for t in scene.things}) == len(scene.things)
    assert np.array_equal(np.asarray(world.render(scene, 40)), np.asarray(world.render(scene, 40)))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, side=st.sampled_from([64, 100, 128, 256]))
def test_masks_are_where_the_colour_is(seed, side):
    """Well inside a thing's mask every pixel has its colour, at any size of the picture."""
    scene = world.make_scene(seed)
    pixels = np.asarray(world.render(scene, side)).astype(float) / 255
    for thing, mask in zip(scene.things, world.visible_masks(scene, side), strict=True):
        inside = mask & (world.outline(thing, side) < -1.5 / side)
        for later in scene.things[scene.things.index(thing) + 1 :]:
            inside &= world.outline(later, side) > 1.5 / side
        assert np.abs(pixels[inside] - world.COLORS[thing.color]).max(initial=0) < 0.01
    assert not world.visible_masks(scene, side).sum(0).max() > 1  # a cell belongs to the front-most thing only


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_mentions_stand_in_the_text_and_name_what_they_say(seed):
    scene, rng = world.make_scene(seed), np.random.default_rng(seed)
    spoken = [world.caption(scene, rng), world.relation(scene, rng), world.listing(scene)]
    spoken += [line for ask in world.QUESTIONS.values() for line in ask(scene, rng)]
    for line in spoken:
        for start, end, things in line.mentions:
            word = line.text[start:end]
            for i in things:
                thing = scene.things[i]
                assert word in (thing.shape, thing.color, thing.size, "shapes"), line
        assert "[" not in line.text and "  " not in line.text


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_answers_are_true(seed):
    scene, rng = world.make_scene(seed), np.random.default_rng(seed)
    by_shape = {t.shape: t for t in scene.things}

    question, answer = world.ask_color(scene, rng)
    assert answer.text.endswith(by_shape[question.text.split()[-1].strip("?")].color)
    question, answer = world.ask_exists(scene, rng)
    assert answer.text.startswith("yes") == (question.text.split()[-1].strip("?") in by_shape)
    question, answer = world.ask_count(scene, rng)
    size = question.text.split()[2]
    assert world.NUMBERS.index(answer.text.split()[-1]) == sum(t.size == size for t in scene.things)
    question, answer = world.ask_place(scene, rng)
    assert question.text.endswith(f"at the {world.place(by_shape[answer.text.split()[-1]])}?")
    question, answer = world.ask_relation(scene, rng)
    word = question.text.split()[2].strip(",")
    first = by_shape[answer.text.split()[1]]
    (second,) = (by_shape[s] for s in world.SHAPES if s in question.text.split(",")[1] and s != first.shape)
    true = {
        "left": first.x < second.x, "right": first.x > second.x, "above": first.y < second.y, "below": first.y > second.y,
    }  # fmt: skip
    assert true[word]


def test_splits_share_no_scene_and_pretraining_is_narrower():
    firsts = sorted(data.FIRST_SEED.values())
    assert min(b - a for a, b in zip(firsts, firsts[1:], strict=False)) >= 1_000_000
    tune = data.load("tune", 40)
    assert {e.id.split("-")[2] for e in tune} == set(data.KINDS)
    relations = {"left", "right", "above", "below", "top", "bottom"}
    pretrain = [data.make(f"pretrain-{i:05d}-caption")[2].text for i in range(50)]
    assert not relations & {word for text in pretrain for word in text.split()}
    assert any(relations & set(e.answer.split()) for e in tune)
    with pytest.raises(ValueError, match="one of tune, heldout, .*; got 'train'"):
        data.load("train")


@settings(max_examples=20, deadline=None)
@given(number=st.integers(0, 511), kind=st.sampled_from(data.KINDS), side=st.sampled_from([16, 33]))
def test_regions_are_where_the_things_of_a_word_are(number, kind, side):
    """Every word that names something has one; its mask is what is visible of just the things that fit the word."""
    example = data.example(f"heldout-{number:05d}-{kind}")
    scene, visible = data.make(example.id).scene, world.visible_masks(data.make(example.id).scene, side)
    regions = example.regions(side)
    for region in regions:
        word = example.fields[region.field][region.start : region.end]
        assert region.kind == {**dict.fromkeys(world.SHAPES, "shape"), **dict.fromkeys(world.COLORS, "color"),
                               **dict.fromkeys(world.SIZES, "size"), "shapes": ""}[word]  # fmt: skip
        assert region.mask.shape == (side, side) and region.mask.any()
        if region.kind in ("shape", "color"):
            (thing,) = (i for i, thing in enumerate(scene.things) if word in thing)
            assert np.array_equal(region.mask, visible[thing])
        else:
            assert not (region.mask & ~visible.any(0)).any()
    named = [field for field in ("question", "answer") for word in example.fields[field].split()
             if word.strip(",?") in {part for thing in scene.things for part in thing[:2]}]  # fmt: skip
    assert len([r for r in regions if r.kind in ("shape", "color")]) == len(named)
    order = [region.kind for region in regions]
    assert order == sorted(order, key=["shape", "color", "size", ""].index)


def test_examples_of_one_scene_share_a_picture_and_travel_to_other_processes():
    examples = data.load("heldout", 2)
    assert [e.picture for e in examples] == ["heldout-00000"] * 6 + ["heldout-00001"] * 6
    assert [e.kind for e in examples[:6]] == list(data.KINDS)
    again = pickle.loads(pickle.dumps(examples[7]))
    assert np.array_equal(np.asarray(again.image()), np.asarray(examples[6].image()))
    assert [r.mask.sum() for r in again.regions(32)] == [r.mask.sum() for r in examples[7].regions(32)]


# ------------------------------------------------------------------------------------------------- the shipped models


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained(models.SD_FOLDER, torch_dtype=torch.float32)


def test_the_shipped_models_load_by_the_libraries_own_calls(pipe):
    assert pipe.unet.config.cross_attention_dim == 128 and pipe.vae.config.scaling_factor != 0.18215
    vlm = AutoModelForImageTextToText.from_pretrained(models.VLM_FOLDER)
    processor = AutoProcessor.from_pretrained(models.VLM_FOLDER)
    assert processor.image_processor.max_image_tiles == 4
    text = vlm.config.text_config
    assert text.num_attention_heads > text.num_key_value_heads and text.cross_attention_layers
    for tokenizer in (pipe.tokenizer, processor.tokenizer):
        pieces = tokenizer.tokenize("a red crescent")
        assert len(pieces) > 3  # the longer word is cut
    assert processor.tokenizer.convert_tokens_to_ids("<|image|>") == text.vocab_size  # no logit for it, as in Llama 3.2


def test_stable_diffusion_reads_its_text(pipe):
    """A picture is denoised better with its own caption than with that of another picture, and than with none."""
    examples = [data.example(f"heldout-{i:05d}-caption") for i in range(64)]
    texts = [e.answer for e in examples]
    pixels = torch.stack([attention_maps.frame_image(e.image(), 128) for e in examples])
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((64,), 600)
        noisy, wanted = pipe.scheduler.add_noise(latents, noise, t), pipe.scheduler.get_velocity(latents, noise, t)
        errors = []
        for said in (texts, texts[1:] + texts[:1], [""] * 64):
            ids = pipe.tokenizer(said, padding="max_length", max_length=40, return_tensors="pt").input_ids
            made = pipe.unet(noisy, t, pipe.text_encoder(ids).last_hidden_state).sample
            errors.append((made - wanted).square().mean((1, 2, 3)))
    own, other, none = errors
    assert own.mean() < 0.85 * other.mean() and (own < other).float().mean() > 0.8
    assert own.mean() < 0.95 * none.mean()


@pytest.mark.slow
def test_stable_diffusion_points_at_what_a_word_means():
    """500 held-out scenes: part of the table of lavender_min/toy/README.md."""
    examples = localise.captions(MeasuredData(), 500)
    table, best = localise.localisation_table(examples, str(models.SD_FOLDER), ["paper", "noise, t 151"])
    print(table)
    assert best >= 0.85
