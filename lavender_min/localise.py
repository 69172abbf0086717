"""How well the toy Stable Diffusion finds what a word names, by recipe and resolution.

    python -m lavender_min.localise --scenes 500

Prints a Markdown table: on the captions of held-out scenes, the share of words whose map is largest inside their mask
(the pointing game), the share of the map's mass in there, and seconds a picture. Chance stands in the first row.
"""

import argparse
import time

import torch
from tqdm import tqdm

from lavender_min import diffusion
from lavender_min.geometry import MAP_SIDE
from lavender_min.measure import WORD_KINDS, mass_inside, pointing
from lavender_min.toy import data, models

NOISE = {"noise, t 51, 151, 301": {}, "noise, t 151": {"timesteps": [151]}, "noise, t 501": {"timesteps": [501]}}


def localise(sd, examples, recipe: str, settings: dict, resolutions: dict[int, float] | None, batch: int = 20):
    """{kind: (pointing, mass, chance)} over all words of that kind, and seconds a picture."""
    maps, masks, kinds = [], [], []
    began = time.perf_counter()
    for start in tqdm(range(0, len(examples), batch), desc=recipe, leave=False):
        some = examples[start : start + batch]
        pixels = torch.stack([diffusion.frame_image(example.image(), sd.side) for example in some])
        fields, ids = [example.fields for example in some], [example.id for example in some]
        for id, found in zip(
            ids, diffusion.word_maps(sd, pixels, fields, ids, recipe, settings, resolutions), strict=True
        ):
            truth = data.word_masks(id, MAP_SIDE)
            for word, map in zip(found.words, found.maps, strict=True):
                kind = next((kind for kind, words in WORD_KINDS.items() if word.text in words), None)
                if kind and word[1:] in truth:
                    maps.append(map)
                    masks.append(torch.from_numpy(truth[word[1:]]))
                    kinds.append(kind)
    seconds = (time.perf_counter() - began) / len(examples)
    seen, true = torch.stack(maps), torch.stack(masks)
    scores = torch.stack([pointing(seen, true), mass_inside(seen, true), true.float().mean((1, 2))], 1)
    return {kind: scores[[k == kind for k in kinds]].mean(0).tolist() for kind in WORD_KINDS}, seconds


def table(scenes: int, sd_name: str) -> tuple[str, float]:
    """The Markdown table, and the best pointing score for shape words."""
    sd = diffusion.load(sd_name)
    examples = [data.example(f"heldout-{i:05d}-caption") for i in range(scenes)]
    sides = sorted(sd.map_sides, reverse=True)
    asks = [
        ("paper", "paper", {}),
        ("invert", "invert", {}),
        *((name, "noise", settings) for name, settings in NOISE.items()),
    ]
    rows, best = [], 0.0
    for name, recipe, settings in asks:
        for side in (None, *sides):
            scores, seconds = localise(sd, examples, recipe, settings, None if side is None else {side: 1.0})
            points = [f"{scores[kind][0]:.3f}" for kind in WORD_KINDS]
            rows.append(
                [name, "all" if side is None else f"{side}²", *points, f"{scores['shape'][1]:.3f}", f"{seconds:.3f}"]
            )
            best = max(best, scores["shape"][0])
    chance = ["chance", "", *(f"{scores[kind][2]:.3f}" for kind in WORD_KINDS), f"{scores['shape'][2]:.3f}", ""]
    head = ["recipe", "layers", *(f"pointing, {kind}" for kind in WORD_KINDS), "mass, shape", "s a picture"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), chance, *rows)]
    return "\n".join(lines), best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--sd", default=str(models.SD_FOLDER), help="a pipeline folder")
    args = parser.parse_args()
    print(table(args.scenes, args.sd)[0])
