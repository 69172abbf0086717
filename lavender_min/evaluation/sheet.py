"""What every model is measured against: some texts about pictures, and where the things lie that their words name."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lavender_min.data import Example, Region
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps import MapStore, StoredMaps


class Sheet(NamedTuple):
    """Some examples, and those n words of their answers that have a region.

    `examples` and `stored` are one a text; `place` to `maps` are one a word.
    """

    examples: list[Example]
    stored: list[StoredMaps]
    # Which example a word stands in, and which word of the answer it is; ascending.
    place: list[tuple[int, int]]
    texts: list[str]
    # What kind of word it is (`Region.kind`), "" for none.
    kinds: list[str]
    # Words about one picture share this.
    pictures: list[str]
    masks: Bool[Tensor, "m g g"]
    # Stable Diffusion's, as stored: raw probabilities.
    maps: Float[Tensor, "m g g"]
    # The kinds there are, without "", in the order in which tables list them: as the regions of the examples name them.
    kind_order: list[str]


def picture_of(example: Example) -> str:
    """What examples of one picture share."""
    return example.picture or example.id


def first_pictures(examples: list[Example], count: int) -> list[Example]:
    """The examples from the first on, until they show `count` pictures."""
    first: dict[str, int] = {}
    for i, example in enumerate(examples):
        first.setdefault(picture_of(example), i)
    if count > len(first):
        raise ValueError(f"--scenes {count}: there are {len(first)} held-out pictures")
    # The examples end where the first picture begins that is one too many.
    ends = [*first.values(), len(examples)]
    return examples[: ends[count]]


# By (field, start, end) of the word.
Regions = dict[tuple[str, int, int], Region]


def regions_of(example: Example) -> Regions:
    """The regions of an example's words on the grid of the maps; ValueError if its data does not say where things are."""
    if example.regions is None:
        raise ValueError(f"example {example.id} has no regions: it does not say where the things of its words lie")
    return {(region.field, region.start, region.end): region for region in example.regions(MAP_SIDE)}


def kinds_of(regions: Regions) -> dict[str, None]:
    """The kinds of words in the order of the regions, as keys; words of no kind are left out."""
    return dict.fromkeys(region.kind for region in regions.values() if region.kind)


def make_sheet(examples: list[Example], store: MapStore) -> Sheet:
    """Raises ValueError for an example without maps or regions, or whose text is not the one its maps were made for.

    So it does for maps of a picture's middle square, as regions are of the whole picture.
    """
    if store.recipe["frame"] != "whole":
        raise ValueError(f"{store.path} has maps of parts of pictures (--frame crop): extract with --frame whole")
    missing = [example.id for example in examples if example.id not in store]
    if missing:
        raise ValueError(
            f"{store.path} has no maps for {len(missing)} of {len(examples)} examples, {missing[0]} the first"
        )
    stored = [store[example.id] for example in examples]
    place, texts, kinds, pictures, masks, maps = [], [], [], [], [], []
    kind_order: dict[str, None] = {}
    for e, (example, row) in enumerate(zip(examples, stored, strict=True)):
        if (row.question, row.answer) != (example.question, example.answer):
            raise ValueError(
                f"the maps of {example.id} were made for {row.answer!r}, the data now says {example.answer!r}"
            )
        regions = regions_of(example)
        kind_order |= kinds_of(regions)
        answer = [i for i, word in enumerate(row.words) if word.field == "answer"]
        for w, i in enumerate(answer):
            word = row.words[i]
            region = regions.get((word.field, word.start, word.end))
            if region is not None and region.mask.any():
                place.append((e, w))
                texts.append(word.text)
                kinds.append(region.kind)
                pictures.append(picture_of(example))
                masks.append(torch.from_numpy(region.mask))
                maps.append(row.maps[i])
    if not masks:
        raise ValueError(f"no answer of the {len(examples)} examples holds a word with a region")
    return Sheet(
        examples, stored, place, texts, kinds, pictures, torch.stack(masks), torch.stack(maps), list(kind_order)
    )
