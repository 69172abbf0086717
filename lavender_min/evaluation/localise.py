"""How well Stable Diffusion finds what a word names, by recipe, resolution and normalisation.

    python -m lavender_min.evaluation.localise --scenes 500                    on held-out pictures: what to report
    python -m lavender_min.evaluation.localise --scenes 500 --split tune       on other pictures: what to choose by
    python -m lavender_min.evaluation.localise --data flickr30k --entities DIR     on photographs with boxes

Prints a Markdown table: on the pictures' captions, the share of words whose map is largest inside their mask (the
pointing game), the share of the map's mass in there, and seconds a picture. Chance stands in the first row. Every recipe
is run once, and its recording gives the maps of every resolution. The best maps are made once more with content
normalisation.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lavender_min import cli
from lavender_min.cli import flag
from lavender_min.data import BROKEN_PICTURE, SOURCES, Example
from lavender_min.evaluation.flags import MeasuredData
from lavender_min.evaluation.metrics import mass_inside, pointing
from lavender_min.evaluation.sheet import kinds_of, regions_of
from lavender_min.evaluation.tables import table
from lavender_min.failing import say
from lavender_min.teachers import Recipe, attention_maps, find_recipe, stable_diffusion
from lavender_min.teachers.stable_diffusion import StableDiffusion

TRIALS = {
    "paper": find_recipe("paper"),
    "null-text": find_recipe("null-text"),
    "invert": find_recipe("invert"),
    "noise, t 51, 151, 301": find_recipe("noise"),
    "noise, t 151": find_recipe("noise", timesteps=[151]),
    "noise, t 151, 4 draws": find_recipe("noise", timesteps=[151], draws=4),
    "noise, t 501": find_recipe("noise", timesteps=[501]),
}


class Reading(NamedTuple):
    """How maps are made of a recording: from the layers of which side (None: all), and whether content-normalised."""

    side: int | None
    content_norm: bool

    def of(self, recipe: Recipe) -> Recipe:
        resolutions = None if self.side is None else {self.side: 1.0}
        return recipe._replace(resolutions=resolutions, content_norm=self.content_norm)


class Score(NamedTuple):
    """Means over the words of one kind. An even map scores `chance` in both."""

    pointing: float
    mass: float
    chance: float


class Localised(NamedTuple):
    """For each reading, {kind of word: its score}; and how long the recipe took."""

    scores: dict[Reading, dict[str, Score]]
    seconds_a_picture: float


class Known(NamedTuple):
    """A word that has a region: which picture of its batch, which of the words found there, and where its thing is."""

    picture: int
    word: int
    kind: str
    mask: Bool[Tensor, "g g"]


def localise(
    sd: StableDiffusion,
    examples: list[Example],
    recipe: Recipe,
    readings: Sequence[Reading],
    batch_size: int = 20,
) -> Localised:
    """Scores over all words of the examples that have a region of some kind; of any, "", if the data knows no kinds."""
    found: dict[Reading, list[Tensor]] = {reading: [] for reading in readings}
    known: list[Known] = []
    kinds: dict[str, None] = {}
    seconds = 0.0
    for start in tqdm(range(0, len(examples), batch_size), desc=recipe.name, leave=False):
        some = examples[start : start + batch_size]
        pixels = torch.stack([attention_maps.frame_image(example.image(), sd.side) for example in some])
        fields, ids = [example.fields for example in some], [example.id for example in some]
        began = time.perf_counter()
        recorded = attention_maps.record(sd, pixels, fields, ids, recipe)
        seconds += time.perf_counter() - began
        here: list[Known] = []
        for i, (example, words) in enumerate(zip(some, attention_maps.combine(recorded), strict=True)):
            regions = regions_of(example)
            kinds |= kinds_of(regions)
            for w, word in enumerate(words.words):
                region = regions.get((word.field, word.start, word.end))
                if region is not None:
                    here.append(Known(i, w, region.kind, torch.from_numpy(region.mask)))
        known += here
        for reading, maps in found.items():
            of = attention_maps.combine(recorded, reading.of(recipe))
            maps += [of[word.picture].maps[word.word] for word in here]
    if not known:
        raise ValueError(f"none of the {len(examples)} captions holds a word with a region")
    scores = {reading: score(torch.stack(maps), known, list(kinds) or [""]) for reading, maps in found.items()}
    return Localised(scores, seconds / len(examples))


def score(maps: Float[Tensor, "m g g"], known: list[Known], kinds: list[str]) -> dict[str, Score]:
    """By kind of word, the means over the maps of n words."""
    masks = torch.stack([word.mask for word in known])
    columns = torch.stack([pointing(maps, masks), mass_inside(maps, masks), masks.float().mean((1, 2))], 1)
    return {
        kind: Score(*columns[torch.tensor([word.kind == kind for word in known])].mean(0).tolist()) for kind in kinds
    }


class Row(NamedTuple):
    name: str
    reading: Reading
    scores: dict[str, Score]
    seconds: float


def localisation_table(examples: list[Example], sd_name: str, names: Iterable[str] | None = None) -> tuple[str, float]:
    """The Markdown table of TRIALS, or of some of them, and the best pointing score for words of the first kind."""
    sd = stable_diffusion.load(sd_name)
    readings = [Reading(side, norm) for norm in (False, True) for side in (None, *sd.map_sides)]
    found: list[Row] = []
    for name in names or TRIALS:
        scores, seconds = localise(sd, examples, TRIALS[name], readings)
        found += [Row(name, reading, scores[reading], seconds) for reading in readings]
    kinds = list(found[0].scores)
    plain = [row for row in found if not row.reading.content_norm]
    best = max(plain, key=lambda row: row.scores[kinds[0]].pointing)
    normed = next(row for row in found if (row.name, row.reading) == (best.name, Reading(best.reading.side, True)))

    titles = [kind or "all" for kind in kinds]
    header = ["recipe", "layers", *(f"pointing, {title}" for title in titles), f"mass, {titles[0]}", "s a picture"]
    chances = [f"{best.scores[kind].chance:.3f}" for kind in kinds]
    lines = [["chance", "", *chances, chances[0], ""]]
    for row in [*plain, normed]:
        layers = "all" if row.reading.side is None else f"{row.reading.side}²"
        layers += ", content norm" if row.reading.content_norm else ""
        points = [f"{row.scores[kind].pointing:.3f}" for kind in kinds]
        lines.append([row.name, layers, *points, f"{row.scores[kinds[0]].mass:.3f}", f"{row.seconds:.3f}"])
    return table(header, lines), best.scores[kinds[0]].pointing


def captions(measured: MeasuredData, count: int) -> list[Example]:
    """The first `count` captions of data whose words have regions. Pictures that cannot be read are left out, which is said."""
    found: list[Example] = []
    broken: list[Exception] = []
    for example in measured.examples():
        if not example.question and len(found) < count:
            try:
                example.image()
                found.append(example)
            except BROKEN_PICTURE as error:
                broken.append(error)
    if broken:
        say(f"{len(broken):,} pictures cannot be read and are left out; the first: {broken[0]}")
    if len(found) < count:
        raise ValueError(f"--scenes {count}: there are {len(found)} captions")
    return found


@dataclass
class Flags(MeasuredData):
    scenes: int = flag(500, "captions")
    only: list[str] = flag([], "some of the recipes: null-text takes ten times the rest", TRIALS)
    sd: str | None = flag(None, "Stable Diffusion: model name or pipeline folder (default: the data's)")

    def __post_init__(self) -> None:
        cli.at_least(1, scenes=self.scenes)
        super().__post_init__()


def main(argv: Sequence[str] | None = None) -> int:
    def run() -> None:
        flags = cli.parse(Flags, "localise", __doc__, argv)
        examples = captions(flags, flags.scenes)
        print(localisation_table(examples, flags.sd or SOURCES[flags.data].sd, flags.only)[0])

    return cli.run("localise", run)


if __name__ == "__main__":
    sys.exit(main())
