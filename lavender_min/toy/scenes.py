"""Crowded scenes of the toy world, and questions that only looking at the right thing answers.

A scene of `world` shows 2 to 4 things, no two of one shape or colour: whoever names any colour of the picture is often right. Here
4 to 9 things share shapes and colours. Every scene can be asked each kind of question, and each has one answer:

    color     what color is the star?          there is one star
    exists    is there a star?                 if there is, its colour is part of the answer
    shaped    what shape is the red one?       there is one red thing
    sized     what color is the small star?    another star is large

The first two kinds are what hosts were pretrained to answer, in emptier scenes; the others are new to them. Questions for the thing
at the top, or left of another, are not among them: the toy Mllama does not learn these in as many steps as a tuning has.

A `Crowd` says how the scenes of a split are drawn. `python -m lavender_min.toy.scenes FILE.png` draws some of each.
"""

import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lavender_min import cli
from lavender_min.toy import world
from lavender_min.toy.world import Line, Scene, Thing

# Things stand in the fields of a board of so many rows and columns, each up to SHIFT from its field's centre, in picture widths.
BOARD, SHIFT = 3, 0.05
SMALL = 0.65
# A shape and a colour that no tuning scene brings together: each shape once, each colour once. (The hosts have met them before.)
UNSEEN = frozenset(zip(world.SHAPES, reversed(world.COLORS), strict=True))


class Crowd(NamedTuple):
    """How the scenes of a split are drawn and asked about."""

    about: str
    first_seed: int
    least: int = 4
    most: int = 6
    # Asks for things in pairs of UNSEEN. Otherwise none of them is shown.
    unseen: bool = False
    # Which of WORDINGS.
    wording: str = "usual"
    background: str = "waves"


TEST = Crowd("what tuning has shown, in new scenes", 5_000_000)
CROWDS = {
    "crowd": Crowd("what is tuned on", 3_000_000),
    "crowd_val": Crowd("what settings are chosen on", 4_000_000),
    "crowd_test": TEST,
    "crowd_pairs": Crowd("shapes and colours that tuning never brought together", 6_000_000, unseen=True),
    "crowd_more": Crowd("more things than tuning showed", 7_000_000, least=8, most=9),
    # The scenes of crowd_test once more, so that only what the name says differs.
    "crowd_words": TEST._replace(about="questions in other words", wording="other"),
    "crowd_ground": TEST._replace(about="another background", background="checks"),
}


class Asked(NamedTuple):
    """What a question asks for and what is true, in the marks that `world.line` reads.

    The `phrase` stands for one thing of the scene ("the [small|3] [star|3]"), or for what is asked to be there.
    """

    phrase: str
    answer: str


# ------------------------------------------------------------------------------------------------------- questions

# For each kind, the question around its phrase.
WORDINGS = {
    "usual": {
        "color": "what color is {}?",
        "exists": "is there {}?",
        "shaped": "what shape is {}?",
        "sized": "what color is {}?",
    },
    "other": {
        "color": "name the color of {}",
        "exists": "can you find {}?",
        "shaped": "name the shape of {}",
        "sized": "name the color of {}",
    },
}

Others = list[tuple[int, Thing]]


def others(scene: Scene, i: int, part: str) -> Others:
    """The other things that share the shape (or colour) of thing i."""
    own = getattr(scene.things[i], part)
    return [(j, t) for j, t in enumerate(scene.things) if j != i and getattr(t, part) == own]


def color_of(phrase: str, scene: Scene, i: int) -> Asked:
    return Asked(phrase, f"{phrase} is [{scene.things[i].color}|{i}]")


def color(scene: Scene, i: int) -> list[Asked]:
    return [] if others(scene, i, "shape") else [color_of(f"the [{scene.things[i].shape}|{i}]", scene, i)]


def exists(scene: Scene, i: int) -> list[Asked]:
    """Of thing i, if it is alone of its shape: yes."""
    t = scene.things[i]
    if others(scene, i, "shape"):
        return []
    named = f"[{t.shape}|{i}]"
    return [Asked(f"{world.article(t.shape)} {named}", f"yes, {world.article(t.color)} [{t.color}|{i}] {named}")]


def absent(scene: Scene) -> list[Asked]:
    """For `exists`, where the answer is no."""
    there = {t.shape for t in scene.things}
    missing = [shape for shape in world.SHAPES if shape not in there]
    return [Asked(f"{world.article(shape)} {shape}", f"no, there is no {shape}") for shape in missing]


def shaped(scene: Scene, i: int) -> list[Asked]:
    t, phrase = scene.things[i], f"the [{scene.things[i].color}|{i}] [one|{i}]"
    return [] if others(scene, i, "color") else [Asked(phrase, f"{phrase} is {world.article(t.shape)} [{t.shape}|{i}]")]


def sized(scene: Scene, i: int) -> list[Asked]:
    t, rivals = scene.things[i], others(scene, i, "shape")
    if not rivals or any(o.size == t.size for _, o in rivals):
        return []
    return [color_of(f"the [{t.size}|{i}] [{t.shape}|{i}]", scene, i)]


QUESTIONS: dict[str, Callable[[Scene, int], list[Asked]]] = {
    "color": color, "exists": exists, "shaped": shaped, "sized": sized,
}  # fmt: skip


def askable(scene: Scene, crowd: Crowd, kind: str) -> list[Asked]:
    """All questions of a kind whose one answer is known, those answered "no" left out."""
    targets = [i for i, t in enumerate(scene.things) if not crowd.unseen or (t.shape, t.color) in UNSEEN]
    return [asked for i in targets for asked in QUESTIONS[kind](scene, i)]


def ask(scene: Scene, crowd: Crowd, kind: str) -> tuple[Line, Line]:
    """The question and answer of this kind; which of those that can be asked follows from the scene's seed."""
    rng = np.random.default_rng([scene.seed, 2 + list(QUESTIONS).index(kind)])
    found = askable(scene, crowd, kind)
    if kind == "exists" and rng.random() < 0.5:
        found = absent(scene)
    phrase, answer = found[int(rng.integers(len(found)))]
    return world.line(WORDINGS[crowd.wording][kind].format(phrase)), world.line(answer)


# ---------------------------------------------------------------------------------------------------------- scenes


def make_scene(crowd: Crowd, number: int) -> Scene:
    """Scene `number` of a crowd: every kind of question can be asked, at least 75 % of each thing stays visible."""
    seed = crowd.first_seed + number
    rng = np.random.default_rng(seed)
    while True:
        scene = Scene(tuple(draw_things(rng, crowd)), seed, crowd.background)
        if not all(askable(scene, crowd, kind) for kind in QUESTIONS):
            continue
        whole = np.array([(world.outline(t, 32) < 0).sum() for t in scene.things])
        if np.all(world.visible_masks(scene, 32).sum((1, 2)) >= 0.75 * whole):
            return scene


def draw_things(rng: np.random.Generator, crowd: Crowd) -> list[Thing]:
    """No two alike in shape and colour, of so few shapes and colours that some are shared."""
    n = int(rng.integers(crowd.least, crowd.most + 1))
    shapes, colors = (rng.choice(kinds, n // 2 + 1, replace=False) for kinds in (world.SHAPES, list(world.COLORS)))
    pairs = [(str(s), str(c)) for s in shapes for c in colors if crowd.unseen or (str(s), str(c)) not in UNSEEN]
    fields, things = rng.permutation(BOARD**2), []
    for (shape, color), field in zip((pairs[k] for k in rng.permutation(len(pairs))[:n]), fields, strict=False):
        size = "small" if rng.random() < SMALL else "large"
        r = world.SIZES[size]
        centre = (np.array([field % BOARD, field // BOARD]) + 0.5) / BOARD
        x, y = np.clip(centre + rng.uniform(-SHIFT, SHIFT, 2), r, 1 - r)
        things.append(Thing(shape, color, size, float(x), float(y), float(rng.uniform(-0.2, 0.2))))
    return things


# ------------------------------------------------------------------------------------------------------ one picture


def draw(file: Path, each: int = len(QUESTIONS)) -> None:
    """A row a crowd with that many scenes, under each a question and its answer, the kinds in turn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * each, 2.75 * len(CROWDS)), layout="constrained")
    for row, (name, crowd) in zip(figure.subplots(len(CROWDS), each, squeeze=False), CROWDS.items(), strict=True):
        # A long title must not make its column wide.
        row[0].set_title(f"{name}: {crowd.about}", loc="left", fontsize=9).set_in_layout(False)
        for number, axis in enumerate(row):
            scene = make_scene(crowd, number)
            question, answer = ask(scene, crowd, list(QUESTIONS)[number % len(QUESTIONS)])
            axis.imshow(world.render(scene, 128))
            axis.set_xlabel("\n".join(textwrap.wrap(f"{question.text} {answer.text}", 32)), fontsize=7)
            axis.set(xticks=[], yticks=[])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="scenes", description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("file", type=Path, help="the picture to write")
    args = parser.parse_args(argv)
    return cli.run("scenes", lambda: draw(args.file))


if __name__ == "__main__":
    sys.exit(main())
