"""Crowded scenes of the toy world, and questions that only looking at the right thing answers.

A scene of `world` shows 2 to 4 things, no two of one shape or colour: whoever names any colour of the picture is often right. Here
4 to 9 things share shapes and colours, so that "what color is the small star?" has a wrong star beside the right one. Each kind of
question has one answer by construction, and every scene can be asked all of them:

    sized    what color is the small star?                 another star is large
    placed   what color is the star at the top?            another star is at the bottom
    beside   what color is the star left of the cross?     another star is right of it
    shaped   what shape is the small red one?              another red thing is large
    paired   is there a red star?                          there are other stars, or other red things

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
# What is left of something is so much further left, in picture widths; what is at the left is so far from the middle.
APART, ASIDE = 0.15, 0.1
SMALL = 0.65
# A shape and a colour that no tuning scene brings together: each shape once, each colour once. (The hosts have met them before.)
UNSEEN = frozenset(zip(world.SHAPES, reversed(world.COLORS), strict=True))
# side ─► (the axis of a Thing, and the sign that leads there)
SIDES = {"left": ("x", -1), "right": ("x", 1), "top": ("y", -1), "bottom": ("y", 1)}
WAYS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


class Crowd(NamedTuple):
    """How the scenes of a split are drawn and asked about."""

    about: str
    first_seed: int
    least: int = 4
    most: int = 6
    # Asks for pairs of UNSEEN. Otherwise none of them is shown or named.
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
        "sized": "what color is {}?",
        "placed": "what color is {}?",
        "beside": "what color is {}?",
        "shaped": "what shape is {}?",
        "paired": "is there {}?",
    },
    "other": {
        "sized": "name the color of {}",
        "placed": "name the color of {}",
        "beside": "name the color of {}",
        "shaped": "name the shape of {}",
        "paired": "can you find {}?",
    },
}

Others = list[tuple[int, Thing]]


def others(scene: Scene, i: int, part: str) -> Others:
    """The other things that share the shape (or colour) of thing i."""
    own = getattr(scene.things[i], part)
    return [(j, t) for j, t in enumerate(scene.things) if j != i and getattr(t, part) == own]


def color_of(phrase: str, scene: Scene, i: int) -> Asked:
    return Asked(phrase, f"{phrase} is [{scene.things[i].color}|{i}]")


def sized(scene: Scene, i: int) -> list[Asked]:
    t, rivals = scene.things[i], others(scene, i, "shape")
    if not rivals or any(o.size == t.size for _, o in rivals):
        return []
    return [color_of(f"the [{t.size}|{i}] [{t.shape}|{i}]", scene, i)]


def placed(scene: Scene, i: int) -> list[Asked]:
    t, rivals = scene.things[i], others(scene, i, "shape")
    found = []
    for side, (axis, sign) in SIDES.items():
        beyond = sign * (getattr(t, axis) - 0.5) > ASIDE
        if beyond and rivals and all(sign * (getattr(o, axis) - 0.5) < -ASIDE for _, o in rivals):
            found.append(color_of(f"the [{t.shape}|{i}] at the {side}", scene, i))
    return found


def beside(scene: Scene, i: int) -> list[Asked]:
    """Left of something is what lies further left of it than above or below; the rivals lie on its other side."""
    t, rivals = scene.things[i], others(scene, i, "shape")
    found = []
    for j, mark in enumerate(scene.things):
        if j == i or not rivals or mark.shape == t.shape or others(scene, j, "shape"):
            continue
        for way, (axis, sign) in WAYS.items():
            cross = "y" if axis == "x" else "x"
            off = sign * (getattr(t, axis) - getattr(mark, axis))
            straight = off > max(APART, abs(getattr(t, cross) - getattr(mark, cross)))
            if straight and all(sign * (getattr(o, axis) - getattr(mark, axis)) < -APART for _, o in rivals):
                found.append(color_of(f"the [{t.shape}|{i}] {way} the [{mark.shape}|{j}]", scene, i))
    return found


def shaped(scene: Scene, i: int) -> list[Asked]:
    t, rivals = scene.things[i], others(scene, i, "color")
    if not rivals or any(o.size == t.size for _, o in rivals):
        return []
    phrase = f"the [{t.size}|{i}] [{t.color}|{i}] [one|{i}]"
    return [Asked(phrase, f"{phrase} is {world.article(t.shape)} [{t.shape}|{i}]")]


def paired(scene: Scene, i: int) -> list[Asked]:
    """Of thing i, if a thing of its shape or colour is beside it: yes."""
    t = scene.things[i]
    if not (others(scene, i, "shape") or others(scene, i, "color")):
        return []
    named = f"[{t.color}|{i}] [{t.shape}|{i}]"
    return [Asked(f"{world.article(t.color)} {named}", f"yes, {world.article(t.size)} [{t.size}|{i}] {named}")]


def absent(scene: Scene, crowd: Crowd) -> list[Asked]:
    """For `paired`, where the answer is no: a shape and a colour that are both there, but not together."""
    there = {(t.shape, t.color) for t in scene.things}
    found = []
    for shape in sorted({t.shape for t in scene.things}):
        for color in sorted({t.color for t in scene.things}):
            if (shape, color) not in there and ((shape, color) in UNSEEN) == crowd.unseen:
                found.append(Asked(f"{world.article(color)} {color} {shape}", f"no, there is no {color} {shape}"))
    return found


QUESTIONS: dict[str, Callable[[Scene, int], list[Asked]]] = {
    "sized": sized, "placed": placed, "beside": beside, "shaped": shaped, "paired": paired,
}  # fmt: skip


def askable(scene: Scene, crowd: Crowd, kind: str) -> list[Asked]:
    """All questions of a kind whose one answer is known, those answered "no" left out."""
    targets = [i for i, t in enumerate(scene.things) if not crowd.unseen or (t.shape, t.color) in UNSEEN]
    return [asked for i in targets for asked in QUESTIONS[kind](scene, i)]


def ask(scene: Scene, crowd: Crowd, kind: str) -> tuple[Line, Line]:
    """The question and answer of this kind; which of those that can be asked follows from the scene's seed."""
    rng = np.random.default_rng([scene.seed, 2 + list(QUESTIONS).index(kind)])
    found = askable(scene, crowd, kind)
    if kind == "paired" and rng.random() < 0.5:
        found = absent(scene, crowd)
    phrase, answer = found[int(rng.integers(len(found)))]
    return world.line(WORDINGS[crowd.wording][kind].format(phrase)), world.line(answer)


# ---------------------------------------------------------------------------------------------------------- scenes


def make_scene(crowd: Crowd, number: int) -> Scene:
    """Scene `number` of a crowd: every kind of question can be asked, at least 75 % of each thing stays visible."""
    seed = crowd.first_seed + number
    rng = np.random.default_rng(seed)
    while True:
        scene = Scene(tuple(draw_things(rng, crowd)), seed, crowd.background)
        if not absent(scene, crowd) or not all(askable(scene, crowd, kind) for kind in QUESTIONS):
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


def draw(file: Path, each: int = 5) -> None:
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
