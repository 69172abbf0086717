"""Deals the toy world out as examples: splits that share no scene, and the exact region of every word.

Pretraining is kept narrower than tuning (no relations, two kinds of question of five), so tuning has something to teach. The
crowded scenes of `scenes` are dealt out in splits of their own, whose names begin with "crowd". An example's id, such as
"tune-00012-color", is all it takes to make it again; its first part says how the scene is drawn.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from lavender_min.data import Example, Region
from lavender_min.toy import scenes, world
from lavender_min.toy.world import Line, Scene

# Pixels of the pictures that both toy models were trained on.
SIDE = 128
FIRST_SEED = {"pretrain": 0, "tune": 1_000_000, "heldout": 2_000_000}
TUNING_SCENES = 512
KINDS = ("caption", *world.QUESTIONS)
# What a host was pretrained to answer. Asked again after tuning, it shows what has been forgotten.
PRETRAINED = ("color", "exists")
WORD_KINDS = {"shape": world.SHAPES, "color": tuple(world.COLORS), "size": tuple(world.SIZES)}


class Told(NamedTuple):
    """A scene and what is said about it. The question is empty where the answer is a caption."""

    scene: Scene
    question: Line
    answer: Line


class Split(NamedTuple):
    """Which examples a split holds: of each scene all those of `every`, and one of `turns`, its kinds in turn."""

    # The first part of its ids.
    drawn: str
    every: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    # None: TUNING_SCENES.
    scenes: int | None = None


CROWD_KINDS = tuple(scenes.QUESTIONS)
SPLITS = {
    "tune": Split("tune", ("caption",), tuple(world.QUESTIONS)),
    "heldout": Split("heldout", KINDS),
    "pretrained": Split("heldout", PRETRAINED),
    "crowd": Split("crowd", turns=CROWD_KINDS),
    # The first so many scenes of one row: a store of maps for the largest serves all.
    **{f"crowd_{n}": Split("crowd", turns=CROWD_KINDS, scenes=n) for n in (64, 128, 256, 1024, 2048, 4096)},
    **{name: Split(name, CROWD_KINDS, scenes=100) for name in scenes.CROWDS if name != "crowd"},
}


def make(example_id: str) -> Told:
    """What the id of an example stands for."""
    drawn, number, kind = example_id.split("-")
    if drawn in scenes.CROWDS:
        crowd = scenes.CROWDS[drawn]
        scene = crowded(crowd, int(number))
        return Told(scene, *scenes.ask(scene, crowd, kind))
    scene = scene_of(FIRST_SEED[drawn] + int(number))
    rng = np.random.default_rng([scene.seed, 2 + KINDS.index(kind)])
    if kind != "caption":
        return Told(scene, *world.QUESTIONS[kind](scene, rng))
    return Told(scene, Line("", []), world.listing(scene) if drawn == "pretrain" else world.relation(scene, rng))


@lru_cache(4096)
def scene_of(seed: int) -> Scene:
    return world.make_scene(seed)


@lru_cache(8192)
def crowded(crowd: scenes.Crowd, number: int) -> Scene:
    return scenes.make_scene(crowd, number)


@lru_cache(8192)
def rendered(scene: Scene) -> Image.Image:
    """Kept, because drawing takes a quarter of a training step. The largest split and all test scenes fit: 400 MB at most."""
    return world.render(scene, SIDE)


def picture(example_id: str) -> Image.Image:
    return rendered(make(example_id).scene).copy()


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


def load(split: str = "tune", count: int | None = None) -> list[Example]:
    """The examples of a split (see `SPLITS`), of its first `count` scenes."""
    if split not in SPLITS:
        raise ValueError(f"--split of the toy data is one of {', '.join(SPLITS)}; got {split!r}")
    drawn, every, turns, own_count = SPLITS[split]
    ids = []
    for i in range(count or own_count or TUNING_SCENES):
        turn = [turns[i % len(turns)]] if turns else []
        ids += [f"{drawn}-{i:05d}-{kind}" for kind in (*every, *turn)]
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
