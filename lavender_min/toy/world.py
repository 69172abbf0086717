"""The toy world: scenes of coloured shapes, drawn at any size, with sentences whose every word has an exact mask.

A scene is a pure function of its seed. Lengths are in picture widths, (0, 0) is the top left corner. Things are drawn
in order, so a later one may hide part of an earlier one; a word's mask is what can still be seen of the things it names.
"""

import re
from typing import NamedTuple

import numpy as np
from PIL import Image

COLORS = {
    "red": (0.86, 0.12, 0.12), "orange": (0.97, 0.55, 0.07), "yellow": (0.96, 0.90, 0.15), "green": (0.12, 0.62, 0.18),
    "turquoise": (0.15, 0.85, 0.82), "blue": (0.12, 0.22, 0.86), "purple": (0.55, 0.15, 0.70), "white": (0.98, 0.98, 0.98),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "crescent")
# Half a shape's width.
SIZES = {"small": 0.125, "large": 0.205}
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")


class Thing(NamedTuple):
    shape: str
    color: str
    size: str
    x: float
    y: float
    # In radians, and small: a square stays a square and does not become a diamond.
    angle: float


class Scene(NamedTuple):
    # From back to front.
    things: tuple[Thing, ...]
    seed: int
    # One of BACKGROUNDS.
    background: str = "waves"


class Mention(NamedTuple):
    """A word of a sentence that names things of its scene."""

    # The word is text[start:end].
    start: int
    end: int
    # Indices into Scene.things.
    things: tuple[int, ...]


class Line(NamedTuple):
    """A sentence and what its words name."""

    text: str
    mentions: list[Mention]


# ------------------------------------------------------------------------------------------------------- drawing


def make_scene(seed: int) -> Scene:
    """2 to 4 things of distinct shapes and colours; at least 75 % of each stays visible."""
    rng = np.random.default_rng(seed)
    while True:
        n = int(rng.integers(2, 5))
        shapes = rng.choice(SHAPES, n, replace=False)
        colors = rng.choice(list(COLORS), n, replace=False)
        sizes = rng.choice(list(SIZES), n)
        things = []
        for shape, color, size in zip(shapes, colors, sizes, strict=True):
            x, y = rng.uniform(SIZES[size], 1 - SIZES[size], 2)
            things.append(Thing(str(shape), str(color), str(size), float(x), float(y), float(rng.uniform(-0.2, 0.2))))
        scene = Scene(tuple(things), seed)
        full = np.array([(outline(t, 32) < 0).sum() for t in things])
        if np.all(visible_masks(scene, 32).sum((1, 2)) >= 0.75 * full):
            return scene


def outline(thing: Thing, side: int) -> np.ndarray:
    """[side, side] signed distance to the thing's edge in picture widths (below 0 inside; exact only near the edge)."""
    at = (np.arange(side) + 0.5) / side
    dx, dy = at[None, :] - thing.x, at[:, None] - thing.y
    cos, sin, r = np.cos(thing.angle), np.sin(thing.angle), SIZES[thing.size]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    ax, ay, radius = np.abs(x), np.abs(y), np.hypot(x, y)
    match thing.shape:
        case "circle":
            return radius - 0.95 * r
        case "square":
            return np.maximum(ax, ay) - 0.82 * r
        case "diamond":
            return (ax + ay) / np.sqrt(2) - 0.75 * r
        case "triangle":
            return np.maximum(0.866 * ax - 0.5 * y, y) - 0.55 * r
        case "cross":
            return np.minimum(np.maximum(ax - r, ay - 0.3 * r), np.maximum(ay - r, ax - 0.3 * r))
        case "ring":
            return np.abs(radius - 0.72 * r) - 0.24 * r
        case "crescent":
            return np.maximum(radius - r, 0.8 * r - np.hypot(x - 0.5 * r, y))
        case "star":
            # In each tenth of the turn a straight line leads from the outer to the inner radius.
            turn = np.abs((np.arctan2(x, -y) / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * 2 * np.pi / 5
            px, py = radius * np.cos(turn), radius * np.sin(turn)
            ex, ey = 0.42 * r * np.cos(np.pi / 5) - r, 0.42 * r * np.sin(np.pi / 5)
            return ((px - r) * ey - py * ex) / np.hypot(ex, ey)
    raise ValueError(f"a shape of {SHAPES} was expected, got {thing.shape!r}")


def visible_masks(scene: Scene, side: int) -> np.ndarray:
    """bool [things, side, side]: the cells in which each thing is the front-most."""
    masks = np.stack([outline(t, side) < 0 for t in scene.things])
    hidden = np.zeros((side, side), bool)
    for mask in masks[::-1]:
        mask &= ~hidden
        hidden |= mask
    return masks


def waves(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3]: a grey with a few faint plane waves, the same at any size of the picture."""
    at = (np.arange(side) + 0.5) / side
    canvas = np.broadcast_to(rng.uniform(0.3, 0.6) + rng.uniform(-0.08, 0.08, 3), (side, side, 3)).copy()
    for _ in range(4):
        (fx, fy), phase, tint = rng.uniform(-6, 6, 2), rng.uniform(0, 6.28), rng.uniform(-0.025, 0.025, 3)
        canvas += np.sin(6.28 * (fx * at[None, :] + fy * at[:, None]) + phase)[..., None] * tint
    return canvas


def checks(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3]: a dark and a light grey in turn, on a board of 5 to 8 fields a side."""
    at = (np.arange(side) + 0.5) / side
    field = (at * rng.integers(5, 9)).astype(int)
    dark = (field[None, :] + field[:, None]) % 2
    grey = rng.uniform(0.3, 0.6) + rng.uniform(-0.08, 0.08, 3)
    return grey + np.where(dark, -0.1, 0.1)[..., None]


BACKGROUNDS = {"waves": waves, "checks": checks}


def render(scene: Scene, side: int) -> Image.Image:
    """The scene as an RGB picture of side × side pixels, edges anti-aliased."""
    canvas = BACKGROUNDS[scene.background](np.random.default_rng([scene.seed, 1]), side)
    for thing in scene.things:
        cover = np.clip(0.5 - outline(thing, side) * side, 0, 1)[..., None]
        canvas += cover * (np.array(COLORS[thing.color]) - canvas)
    return Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8))


# ------------------------------------------------------------------------------------------------------- talking


def line(marked: str) -> Line:
    """Reads "a [red|0] [circle|0]": a word in brackets names the things whose indices follow the bar."""
    text, mentions = "", []
    for plain, word, things in re.findall(r"([^\[]+)|\[([^|]*)\|(\d*)\]", marked):
        if word:
            mentions.append(Mention(len(text), len(text) + len(word), tuple(map(int, things))))
        text += plain or word
    return Line(text, mentions)


def noun(scene: Scene, i: int, rng: np.random.Generator) -> str:
    """ "a small red circle", with the size left out now and then."""
    t = scene.things[i]
    words = [t.size] * (rng.random() < 0.6) + [t.color, t.shape]
    return " ".join([article(words[0]), *(f"[{w}|{i}]" for w in words)])


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def place(thing: Thing) -> str:
    return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"


def caption(scene: Scene, rng: np.random.Generator) -> Line:
    """ "a small red circle and a blue star": some or all of the things, without saying where."""
    order = rng.permutation(len(scene.things))[: rng.integers(1, len(scene.things) + 1)]
    nouns = [noun(scene, int(i), rng) for i in order]
    return line(" and ".join([", ".join(nouns[:-1])] * (len(nouns) > 1) + nouns[-1:]))


def listing(scene: Scene, rng: np.random.Generator | None = None) -> Line:
    """ "a small red circle, a large green cross and a small blue star": everything, in full, from left to right or shuffled."""
    order = rng.permutation(len(scene.things)) if rng else np.argsort([t.x for t in scene.things])
    nouns = [
        f"{article(t.size)} [{t.size}|{i}] [{t.color}|{i}] [{t.shape}|{i}]" for i in order for t in [scene.things[i]]
    ]
    return line(", ".join(nouns[:-1]) + " and " + nouns[-1])


def relation(scene: Scene, rng: np.random.Generator) -> Line:
    """ "a small red circle left of a blue star"."""
    i, j, word = related(scene, rng)
    return line(f"{noun(scene, i, rng)} {word}{' of' if word in ('left', 'right') else ''} {noun(scene, j, rng)}")


class Related(NamedTuple):
    """Thing `first` lies `word` (left, right, above, below) of thing `second`."""

    first: int
    second: int
    word: str


def related(scene: Scene, rng: np.random.Generator) -> Related:
    """Two things at random, and how they lie along the axis on which they are further apart."""
    i, j = (int(k) for k in rng.permutation(len(scene.things))[:2])
    dx, dy = scene.things[i].x - scene.things[j].x, scene.things[i].y - scene.things[j].y
    word = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    return Related(i, j, word)


def ask_color(scene: Scene, rng: np.random.Generator) -> tuple[Line, Line]:
    i = int(rng.integers(len(scene.things)))
    t = scene.things[i]
    return line(f"what color is the [{t.shape}|{i}]?"), line(f"the [{t.shape}|{i}] is [{t.color}|{i}]")


def ask_exists(scene: Scene, rng: np.random.Generator) -> tuple[Line, Line]:
    if rng.random() < 0.5:
        i = int(rng.integers(len(scene.things)))
        t = scene.things[i]
        return line(f"is there a [{t.shape}|{i}]?"), line(f"yes, {article(t.color)} [{t.color}|{i}] [{t.shape}|{i}]")
    absent = str(rng.choice([s for s in SHAPES if s not in {t.shape for t in scene.things}]))
    return line(f"is there a {absent}?"), line(f"no, there is no {absent}")


def ask_place(scene: Scene, rng: np.random.Generator) -> tuple[Line, Line]:
    """Asks for the only thing in a quarter of the picture (or, if every quarter is shared, for the one nearest a corner)."""
    quarters = [place(t) for t in scene.things]
    alone = [i for i, q in enumerate(quarters) if quarters.count(q) == 1]
    corner = [abs(t.x - 0.5) + abs(t.y - 0.5) for t in scene.things]
    i = int(rng.choice(alone)) if alone else int(np.argmax(corner))
    shape = scene.things[i].shape
    return line(f"what shape is at the {quarters[i]}?"), line(f"the shape is a [{shape}|{i}]")


def ask_count(scene: Scene, rng: np.random.Generator) -> tuple[Line, Line]:
    size = str(rng.choice(list(SIZES)))
    named = "".join(str(i) for i, t in enumerate(scene.things) if t.size == size)
    return (
        line(f"how many [{size}|{named}] [shapes|{named}] are there?"),
        line(f"the number of [{size}|{named}] [shapes|{named}] is {NUMBERS[len(named)]}"),
    )


def ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[Line, Line]:
    i, j, word = related(scene, rng)
    first, second = (i, j) if rng.random() < 0.5 else (j, i)
    a, b = (f"the [{scene.things[k].shape}|{k}]" for k in (first, second))
    return line(f"which is {word}, {a} or {b}?"), line(f"the [{scene.things[i].shape}|{i}] is {word}")


QUESTIONS = {
    "color": ask_color, "exists": ask_exists, "place": ask_place, "count": ask_count, "relation": ask_relation,
}  # fmt: skip
