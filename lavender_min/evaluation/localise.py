"""How well the toy Stable Diffusion finds what a word names, by recipe, resolution and normalisation.

    python -m lavender_min.evaluation.localise --scenes 500                    on held-out scenes: what to report
    python -m lavender_min.evaluation.localise --scenes 500 --split tune       on other scenes: what to choose by

Prints a Markdown table: on the scenes' captions, the share of words whose map is largest inside their mask (the pointing
game), the share of the map's mass in there, and seconds a picture. Chance stands in the first row. Every recipe is run
once and its recording read at each resolution; the best reading is read once more with content normalisation.
"""

import argparse
import time
from collections.abc import Iterable

import torch
from tqdm import tqdm

from lavender_min.evaluation.measures import WORD_KINDS, mass_inside, pointing
from lavender_min.geometry import MAP_SIDE
from lavender_min.teachers import attention_maps
from lavender_min.toy import data, models

ASKED: dict[str, tuple[str, dict]] = {
    "paper": ("paper", {}),
    "null-text": ("null-text", {}),
    "invert": ("invert", {}),
    "noise, t 51, 151, 301": ("noise", {}),
    "noise, t 151": ("noise", {"timesteps": [151]}),
    "noise, t 151, 4 draws": ("noise", {"timesteps": [151], "draws": 4}),
    "noise, t 501": ("noise", {"timesteps": [501]}),
}
Reading = tuple[int | None, bool]  # layers of which side (None: all), and whether content-normalised


def localise(sd, examples, recipe: str, settings: dict, readings: list[Reading], batch: int = 20):
    """For each reading {kind: (pointing, mass, chance)} over all words of that kind; and seconds a picture."""
    maps: dict[Reading, list[torch.Tensor]] = {reading: [] for reading in readings}
    masks, kinds, seconds = [], [], 0.0
    for start in tqdm(range(0, len(examples), batch), desc=recipe, leave=False):
        some = examples[start : start + batch]
        pixels = torch.stack([attention_maps.frame_image(example.image(), sd.side) for example in some])
        fields, ids = [example.fields for example in some], [example.id for example in some]
        began = time.perf_counter()
        recorded = attention_maps.record(sd, pixels, fields, ids, recipe, settings)
        seconds += time.perf_counter() - began
        known = []  # the words that have a mask, as (picture, place)
        for i, (id, words) in enumerate(zip(ids, attention_maps.read(recorded), strict=True)):
            truth = data.word_masks(id, MAP_SIDE)
            for place, word in enumerate(words.words):
                kind = next((kind for kind, texts in WORD_KINDS.items() if word.text in texts), None)
                if kind and word[1:] in truth:
                    known.append((i, place))
                    masks.append(torch.from_numpy(truth[word[1:]]))
                    kinds.append(kind)
        for side, content_norm in readings:
            found = attention_maps.read(recorded, None if side is None else {side: 1.0}, content_norm)
            maps[side, content_norm] += [found[i].maps[place] for i, place in known]
    true = torch.stack(masks)
    scores = {}
    for reading, seen in maps.items():
        each = torch.stack([f(torch.stack(seen), true) for f in (pointing, mass_inside)], 1)
        each = torch.cat([each, true.float().mean((1, 2))[:, None]], 1)
        scores[reading] = {kind: each[[k == kind for k in kinds]].mean(0).tolist() for kind in WORD_KINDS}
    return scores, seconds / len(examples)


def table(scenes: int, sd_name: str, split: str = "heldout", names: Iterable[str] | None = None) -> tuple[str, float]:
    """The Markdown table of ASKED, or some of it, and the best pointing score for shape words."""
    sd = attention_maps.load(sd_name)
    examples = [data.example(f"{split}-{i:05d}-caption") for i in range(scenes)]
    readings: list[Reading] = [(side, norm) for norm in (False, True) for side in (None, *sd.map_sides)]
    found = []  # (what was asked, reading, scores, seconds)
    for name in names or ASKED:
        recipe, settings = ASKED[name]
        scores, seconds = localise(sd, examples, recipe, settings, readings)
        found += [(name, reading, scores[reading], seconds) for reading in readings]
    plain = [row for row in found if not row[1][1]]
    best = max(plain, key=lambda row: row[2]["shape"][0])
    normed = next(row for row in found if row[:2] == (best[0], (best[1][0], True)))
    chance = ["chance", "", *(f"{best[2][kind][2]:.3f}" for kind in WORD_KINDS), f"{best[2]['shape'][2]:.3f}", ""]
    head = ["recipe", "layers", *(f"pointing, {kind}" for kind in WORD_KINDS), "mass, shape", "s a picture"]
    rows = [head, ["---"] * len(head), chance]
    for name, (side, norm), scores, seconds in [*plain, normed]:
        layers = ("all" if side is None else f"{side}²") + (", content norm" if norm else "")
        points = [f"{scores[kind][0]:.3f}" for kind in WORD_KINDS]
        rows.append([name, layers, *points, f"{scores['shape'][1]:.3f}", f"{seconds:.3f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows), best[2]["shape"][0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--split", choices=["tune", "heldout"], default="heldout")
    parser.add_argument("--only", nargs="+", choices=list(ASKED), help="null-text takes ten times the rest")
    parser.add_argument("--sd", default=str(models.SD_FOLDER), help="a pipeline folder")
    args = parser.parse_args()
    print(table(args.scenes, args.sd, args.split, args.only)[0])
