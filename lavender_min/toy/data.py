"""Deals the toy world out as examples: three splits that share no scene, and the exact mask of every word.

Pretraining is kept narrower than tuning (no relations, two kinds of question of five), so tuning has something to teach.
An example's id, "tune-00012-color", is all it takes to make it again.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from lavender_min.data import Example
from lavender_min.toy import world
from lavender_min.toy.world import Line, Scene

SIDE = 128  # pixels of the pictures both toy models were trained on
FIRST_SEED = {"pretrain": 0, "tune": 1_000_000, "heldout": 2_000_000}
TUNING_SCENES = 512
KINDS = ("caption", *world.QUESTIONS)


def make(example_id: str) -> tuple[Scene, Line, Line]:
    """The scene, the question (empty for a caption) and the answer that an id stands for."""
    split, number, kind = example_id.split("-")
    scene = scene_of(FIRST_SEED[split] + int(number))
    rng = np.random.default_rng([scene.seed, 2 + KINDS.index(kind)])
    if kind != "caption":
        return scene, *world.QUESTIONS[kind](scene, rng)
    return scene, Line("", []), world.listing(scene) if split == "pretrain" else world.relation(scene, rng)


@lru_cache(4096)
def scene_of(seed: int) -> Scene:
    return world.make_scene(seed)


def example(example_id: str) -> Example:
    scene, question, answer = make(example_id)

    def picture() -> Image.Image:
        return world.render(scene, SIDE)

    return Example(example_id, picture, question.text, answer.text)


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


def word_masks(example_id: str, side: int) -> dict[tuple[str, int, int], np.ndarray]:
    """{(field, start, end): bool [side, side]} for every word that names something visible in the picture."""
    scene, question, answer = make(example_id)
    seen = world.visible_masks(scene, side)
    return {
        (field, start, end): np.any(seen[list(things)], axis=0)
        for field, spoken in (("question", question), ("answer", answer))
        for start, end, things in spoken.mentions
        if things
    }
