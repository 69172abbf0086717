"""The crowded scenes: each question has one answer, found here by reading it plainly; and the old scenes are what they were."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavender_min.toy import data, scenes, world

crowds, kinds, numbers = (
    st.sampled_from(list(scenes.CROWDS)),
    st.sampled_from(list(scenes.QUESTIONS)),
    st.integers(0, 5000),
)


@settings(max_examples=60, deadline=None)
@given(name=crowds, kind=kinds, number=numbers)
def test_every_question_has_one_answer_and_other_things_could_be_meant(name, kind, number):
    scene, question, answer = data.make(f"{name}-{number:05d}-{kind}")
    before = scenes.WORDINGS[scenes.CROWDS[name].wording][kind].partition("{")[0]
    words = question.text.removesuffix("?").removeprefix(before).split()[1:]
    # "one" is any thing.
    found = [t for t in scene.things if set(words) <= {*t[:3], "one"}]
    if kind == "exists":
        (shape,) = words
        expected = [f"yes, {world.article(t.color)} {t.color} {shape}" for t in found] or [f"no, there is no {shape}"]
        assert [answer.text] == expected
        return
    (thing,) = found
    said = f"{world.article(thing.shape)} {thing.shape}" if kind == "shaped" else thing.color
    assert answer.text == f"the {' '.join(words)} is {said}"
    if kind == "sized":
        rivals = [t for t in scene.things if t is not thing and t.shape == thing.shape]
        assert rivals and all(t.color != thing.color for t in rivals)
    shapes, colors = ([t[k] for t in scene.things] for k in (0, 1))
    assert len(set(shapes)) < len(shapes) and len(set(colors)) < len(colors)


@settings(max_examples=40, deadline=None)
@given(name=crowds, kind=kinds, number=numbers, side=st.sampled_from([16, 33]))
def test_masks_are_those_of_the_one_thing_a_word_names(name, kind, number, side):
    example = data.example(f"{name}-{number:05d}-{kind}")
    scene = data.make(example.id).scene
    visible = world.visible_masks(scene, side)
    regions = example.regions(side)
    for field, start, end, word_kind, mask in regions:
        word = example.fields[field][start:end]
        (i,) = (i for i, seen in enumerate(visible) if np.array_equal(seen, mask))
        assert word == "one" or word in scene.things[i][:3]
        assert word_kind == {**dict.fromkeys(world.SHAPES, "shape"), **dict.fromkeys(world.COLORS, "color"),
                             **dict.fromkeys(world.SIZES, "size")}.get(word, "")  # fmt: skip
    things = {*world.SHAPES, *world.COLORS, *world.SIZES, "one"}
    words = [
        w for text in example.fields.values() for w in text.replace("?", "").replace(",", "").split() if w in things
    ]
    assert len(regions) == (0 if example.answer.startswith("no") else len(words))


@settings(max_examples=30, deadline=None)
@given(name=crowds, number=numbers)
def test_scenes_are_as_their_crowd_says(name, number):
    crowd = scenes.CROWDS[name]
    scene = scenes.make_scene(crowd, number)
    assert scene == scenes.make_scene(crowd, number)
    assert crowd.least <= len(scene.things) <= crowd.most <= 9
    assert len({t[:2] for t in scene.things}) == len(scene.things)
    whole = np.array([(world.outline(t, 32) < 0).sum() for t in scene.things])
    assert np.all(world.visible_masks(scene, 32).sum((1, 2)) >= 0.75 * whole)
    for t in scene.things:
        assert world.SIZES[t.size] <= min(t.x, t.y, 1 - t.x, 1 - t.y) + 1e-9
    unseen = {t[:2] for t in scene.things} & scenes.UNSEEN
    assert bool(unseen) == crowd.unseen


def test_pairs_that_tuning_never_brought_together_are_what_is_asked_for():
    assert {s for s, _ in scenes.UNSEEN} == set(world.SHAPES) and {c for _, c in scenes.UNSEEN} == set(world.COLORS)
    asked = [data.make(example.id) for example in data.load("crowd_pairs", 12)]
    targets = [(scene, answer.mentions[-1].things[0]) for scene, _, answer in asked if answer.mentions]
    assert len(targets) > 36 and all(scene.things[target][:2] in scenes.UNSEEN for scene, target in targets)


def test_splits_share_no_scene_but_those_that_say_so():
    firsts = sorted({crowd.first_seed for crowd in scenes.CROWDS.values()} | set(data.FIRST_SEED.values()))
    assert min(b - a for a, b in zip(firsts, firsts[1:], strict=False)) >= 1_000_000
    of = {name: [data.make(e.id) for e in data.load(name, 6)] for name in ("crowd_test", "crowd_words", "crowd_ground")}
    for test, words, ground in zip(*of.values(), strict=True):
        assert test.scene.things == words.scene.things == ground.scene.things
        assert test.answer == words.answer == ground.answer and test.question == ground.question
        assert test.question.text != words.question.text
        same = [np.array_equal(world.render(test.scene, 40), world.render(s, 40)) for s in (words.scene, ground.scene)]
        assert same == [True, False]


def test_a_tuning_scene_is_asked_one_question_and_smaller_splits_begin_the_larger():
    few, many = data.load("crowd_64"), data.load("crowd_128")
    assert [e.id for e in few] == [e.id for e in many[:64]] and len(many) == 128
    assert [e.kind for e in few[:7]] == ["color", "exists", "shaped", "sized", "color", "exists", "shaped"]
    assert len(data.SPLITS["crowd_4096"].turns) == 4 and data.SPLITS["crowd_4096"].scenes == 4096
    test = data.load("crowd_test", 40)
    assert [e.kind for e in test[:4]] == list(scenes.QUESTIONS) and len({e.picture for e in test}) == 40
    yes = [e.answer.startswith("yes") for e in test if e.kind == "exists"]
    assert 10 < sum(yes) < 30


def test_what_was_pretrained_is_asked_again_about_held_out_scenes():
    again = data.load("pretrained", 3)
    heldout = {e.id: (e.question, e.answer) for e in data.load("heldout", 3)}
    assert {e.kind for e in again} == {"color", "exists"} and len(again) == 6
    assert all(heldout[e.id] == (e.question, e.answer) for e in again)
    with pytest.raises(ValueError, match="is one of tune, .*crowd_ground; got 'crowds'"):
        data.load("crowds")


def test_the_scenes_before_the_crowds_are_the_same_to_the_bit():
    """What the shipped models were trained on: ids, texts, pixels and masks, hashed before the crowds were added."""
    h = sha256()
    for split in ("tune", "heldout"):
        for e in data.load(split, 12):
            h.update(repr((e.id, e.question, e.answer, e.picture, e.kind)).encode())
            h.update(np.asarray(e.image()).tobytes())
            for r in e.regions(32):
                h.update(repr(tuple(r[:4])).encode() + np.packbits(r.mask).tobytes())
    h.update(repr([e.id for e in data.load("tune")] + [e.id for e in data.load("heldout")]).encode())
    for i in range(12):
        told = data.make(f"pretrain-{i:05d}-caption")
        h.update(repr((told.scene.things, told.scene.seed, told.answer)).encode())
    assert h.hexdigest() == "ef12d78ee23bd9a47cf900aa3f26879afd141a94d2a0d4ca6aeba2f4f2c2ddf5"


def test_the_scenes_are_shown_in_one_picture(tmp_path):
    assert scenes.main([str(tmp_path / "made" / "scenes.png")]) == 0
    with Image.open(tmp_path / "made" / "scenes.png") as image:
        assert min(image.size) > 500
