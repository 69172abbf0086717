"""Deals the toy world out as examples: three splits that share no scene, and the exact region of every word.

Pretraining is kept narrower than tuning (no relations, two kinds of question of five), so tuning has something to teach.
An example's id, "tune-00012-color", is all it takes to make it again.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from lavender_min.data import Example, Region
from lavender_min.toy import world
from lavender_min.toy.world import Line, Scene

# Pixels of the pictures that both toy models were trained on.
SIDE = 128
FIRST_SEED = {"pretrain": 0, "tune": 1_000_000, "heldout": 2_000_000}
TUNING_SCENES = 512
KINDS = ("caption", *world.QUESTIONS)
WORD_KINDS = {"shape": world.SHAPES, "color": tuple(world.COLORS), "size": tuple(world.SIZES)}


class Told(NamedTuple):
    """A scene and what is said about it. The question is empty where the answer is a caption."""

    scene: Scene
    question: Line
    answer: Line


def make(example_id: str) -> Told:
    """What the id of an example stands for."""
    split, number, kind = example_id.split("-")
    scene = scene_of(FIRST_SEED[split] + int(number))
    rng = np.random.default_rng([scene.seed, 2 + KINDS.index(kind)])
    if kind != "caption":
        return Told(scene, *world.QUESTIONS[kind](scene, rng))
    return Told(scene, Line("", []), world.listing(scene) if split == "pretrain" else world.relation(scene, rng))


@lru_cache(4096)
def scene_of(seed: int) -> Scene:
    return world.make_scene(seed)


def picture(example_id: str) -> Image.Image:
    return world.render(make(example_id).scene, SIDE)


def example(example_id: str) -> Example:
    _, question, answer = make(example_id)
    shown, _, kind = example_id.rpartition("-")
    return Example(
        example_id,
        partial(picture, example_id),
        question.text,
        answer.text,
        picture=shown,
        kind=kind,
        regions=partial(regions, example_id),
    )


def load(split: str = "tune", scenes: int | None = None) -> list[Example]:
    """`tune`: a caption and one question a scene, kinds in turn. `heldout`: a caption and all five questions a scene."""
    if split not in ("tune", "heldout"):
        raise ValueError(f"--split of the toy data is tune or heldout, got {split!r}")
    n = TUNING_SCENES if scenes is None else scenes
    asked = list(world.QUESTIONS)
    ids = []
    for i in range(n):
        kinds = asked if split == "heldout" else [asked[i % len(asked)]]
        ids += [f"{split}-{i:05d}-{kind}" for kind in ("caption", *kinds)]
    return [example(i) for i in ids]


def regions(example_id: str, side: int) -> list[Region]:
    """Where the things lie that the words of an example name: shapes first, then colours, sizes and other words."""
    scene, question, answer = make(example_id)
    seen = world.visible_masks(scene, side)
    found: dict[str, list[Region]] = {kind: [] for kind in (*WORD_KINDS, "")}
    for field, line in (("question", question), ("answer", answer)):
        for start, end, things in line.mentions:
            if things:
                word = line.text[start:end]
                kind = next((kind for kind, words in WORD_KINDS.items() if word in words), "")
                found[kind].append(Region(field, start, end, kind, np.any(seen[list(things)], axis=0)))
    return [region for of_kind in found.values() for region in of_kind]
