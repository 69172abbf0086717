"""`python -m lavender_min.maps from-masks`: a store whose maps are boxes and masks drawn by people, in place of a teacher's maps.

Where data says where the things of its words lie (`Example.regions`), alignment can be taught by that, without Stable Diffusion,
as KLAL does (arXiv 2511.12738). A word's map is its mask, 1 inside and 0 outside. Training min–max normalises every map, which
leaves such a map as it is.
"""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from lavender_min import data
from lavender_min.data import Example, picture_digest
from lavender_min.failing import one_line, say
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps.stale import find_stale
from lavender_min.maps.store import MapStore, MapWriter
from lavender_min.words import find_words


def from_masks(
    folder: Path, name: str, root: str | None, split: str | None, captions: str | None, entities: str | None
) -> int:
    """Make, or complete, a store of the boxes or masks that the data has for its words, in place of maps.

    Returns the exit code. `name` and what follows are the arguments of `data.load`.

    A word has no map if it has no region, or if its region covers every cell and so says nothing. An example whose words have no
    maps gets a row all the same, so that its text is learnt beside the others'. Examples whose pictures cannot be read are skipped
    and counted, and the first ten are named. Raises ValueError for data without regions, and if nothing could be stored.
    """
    # Only for its error: data without regions.
    data.measured_split(name, entities)
    examples = data.load(name, root, split, captions, entities)
    recipe = {"data": name, "recipe": "masks", "values": "1 inside, 0 outside", "frame": "whole", "map_side": MAP_SIDE}
    made_with = {"data_root": root, "entities": entities}
    skipped: dict[str, str] = {}
    words = 0
    with MapWriter(folder, recipe | {"made_with": made_with}) as writer:
        writer.remake(find_stale(examples, MapStore(folder).origins()))
        todo = [example for example in examples if example.id not in writer.done]
        for example in tqdm(todo, unit=" examples"):
            try:
                words += add(writer, example)
            except (data.BROKEN_PICTURE, OSError) as error:
                skipped[example.id] = one_line(error)
    for id, why in list(skipped.items())[:10]:
        say(f"skipped {id}: {why}")
    print(
        f"{folder} holds {len(writer.done):,} examples; {words:,} words are new, {len(skipped):,} pictures were skipped"
    )
    if not writer.done:
        raise ValueError(f"nothing is stored in {folder}: all pictures were skipped")
    return 0


def add(writer: MapWriter, example: Example) -> int:
    """Stores an example, and returns how many of its words have a map.

    Raises BrokenPicture or OSError if its picture cannot be read.
    """
    digest = picture_digest(example)
    regions = example.regions(MAP_SIDE) if example.regions else []
    # By (field, start, end), which both Region and Word hold.
    masks = {region[:3]: region.mask for region in regions if region.mask.any() and not region.mask.all()}
    words = [word for word in find_words(example.fields) if word[1:] in masks]
    maps = torch.zeros(len(words), MAP_SIDE, MAP_SIDE)
    for map, word in zip(maps, words, strict=True):
        map.copy_(torch.from_numpy(masks[word[1:]]))
    # The share of attention that the start-of-text token took: there is none here.
    writer.add(example.id, example.question, example.answer, words, maps, math.nan, digest)
    return len(words)
