"""A store of maps whose scores are known: each word's map is its mask."""

import torch

from lavender_min.maps import MapWriter
from lavender_min.words import find_words


def store_of(folder, examples):
    """Words without a mask get noise."""
    draw = torch.Generator().manual_seed(0)
    with MapWriter(folder, {"frame": "whole"}) as writer:
        for example in examples:
            words = find_words(example.fields)
            maps = torch.rand(len(words), 32, 32, generator=draw) * 0.01
            masks = {region[:3]: torch.from_numpy(region.mask) for region in example.regions(32)}
            for i, word in enumerate(words):
                if word[1:] in masks:
                    maps[i] = masks[word[1:]].float()
            writer.add(example.id, example.question, example.answer, words, maps, 0.9)
