"""The light part of stage 1: flags and recipes."""

import subprocess
import sys

import pytest
from conftest import ROOT

from lavender_min.teachers import RECIPES, Recipe, find_recipe
from lavender_min.teachers.flags import ExtractionFlags


def test_help_lists_every_recipe_and_says_what_it_does():
    done = subprocess.run([sys.executable, str(ROOT / "extract.py"), "--help"], capture_output=True, text=True)
    said = " ".join(done.stdout.split()).replace("null- text", "null-text")
    for name, recipe in RECIPES.items():
        assert recipe.name == name and f"{name}: {recipe.about}" in said
    assert "python extract.py --data flickr30k --data_root ~/flickr30k" in said


def test_recipes_are_found_by_name():
    noise = find_recipe("noise", timesteps=[9])
    assert noise.settings == {"timesteps": [9], "draws": 1, "seed": 0} and noise.passes(noise.settings) == 1
    assert RECIPES["noise"].settings["timesteps"] == [51, 151, 301]
    with pytest.raises(ValueError, match="--recipe must be one of paper, null-text, invert, noise; got 'paint'"):
        find_recipe("paint")
    with pytest.raises(ValueError, match="--recipe paper takes no --timesteps"):
        find_recipe("paper", timesteps=[9])


def test_a_new_recipe_is_a_row_and_a_function(monkeypatch, tiny_sd, pixels):
    from tiny_sd import IDS, TEXTS

    from lavender_min.teachers import attention_maps

    monkeypatch.setitem(
        RECIPES, "twice", Recipe("twice", "…", "test_command:twice", {"times": 2}, lambda s: s["times"])
    )
    recipe = find_recipe("twice", times=3)
    found = attention_maps.record(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], recipe)
    # Three layers of side 8 and four of side 4, three times each.
    assert recipe.passes(recipe.settings) == 3 and found.layers == {8: 9, 4: 12}


def twice(sd, inputs, recorder, *, times):
    import torch

    from lavender_min.teachers.recording import recording
    from lavender_min.teachers.stable_diffusion import predict

    with recording(sd.unet, recorder):
        for _ in range(times):
            predict(sd, inputs.latents, torch.tensor(1), inputs.text)


def test_flags_become_a_recipe_and_places():
    flags = ExtractionFlags("flickr30k")
    assert flags.chosen_recipe() == RECIPES["paper"]
    assert str(flags.maps_folder) == "maps/flickr30k" and flags.sd_name == "CompVis/stable-diffusion-v1-4"
    flags = ExtractionFlags(
        "toy", recipe="noise", timesteps="5,17", draws=3, resolutions="16:1,8:0.5", content_norm=True, frame="crop"
    )
    recipe = flags.chosen_recipe()
    assert recipe.settings == {"timesteps": [5, 17], "draws": 3, "seed": 0} and recipe.passes(recipe.settings) == 6
    assert recipe.resolutions == {16: 1.0, 8: 0.5} and recipe.content_norm and recipe.frame == "crop"
    assert flags.sd_name.endswith("toy/models/sd")
    with pytest.raises(ValueError, match="--recipe must be one of"):
        ExtractionFlags("toy", recipe="paint")
