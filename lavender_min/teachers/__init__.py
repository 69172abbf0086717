"""Stage 1's teachers: frozen models that know which pixels a word means. Today there is one, Stable Diffusion.

A teacher takes a picture and its text and predicts something from them (Stable Diffusion: the noise in the picture). While it
does, every layer that attends to the text says how much each pixel has to do with each word. That is what is recorded.
Another teacher brings four things, each in the file where Stable Diffusion's stands:

    stable_diffusion.py   its parts, by `load(name, device, dtype)`; `side`, the side in pixels of the pictures it takes;
                          `map_sides`, the sides of the feature maps whose layers attend to text; and `predict`, one pass
    recording.py          which of its layers are recorded, and a processor for such a layer: it leaves the layer's output as
                          it is and adds the maps of the words to a `Recorder`
    recipes.py            its schedules: how a picture is noised and in which passes the layers are recorded, one function
                          for each row of RECIPES below
    attention_maps.py     in `record`: how text and picture are encoded

The rest holds for any teacher: a text is cut into windows and words (`lavender_min.words`), what was recorded is combined to
one map a word (`attention_maps.combine`), and a run fills a store with them (`extraction`).

Here stands what the command needs before torch is imported: the recipes as rows, and the names that flags may have.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# How a picture becomes a square: all of it resized, or its largest centred square.
FRAMES = ("whole", "crop")

# What `--dtype` may be, and torch's name for it.
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class Recipe(NamedTuple):
    """How Stable Diffusion is run to read its maps: with the model, all that decides what the map of a word is."""

    name: str

    # One line for --help.
    about: str

    # `module:function`, called as function(sd, inputs, recorder, **settings): see recipes.py.
    function: str
    settings: Mapping[str, Any]

    # The settings ─► passes of the UNet for a picture, at most; a backward pass counts as one.
    passes: Callable[[Mapping[str, Any]], int]

    # {side: weight}: how much a layer counts whose feature map has this side. None: all layers alike.
    resolutions: Mapping[int, float] | None = None

    # Whether each pixel of a map is divided by what all the words' tokens get there.
    content_norm: bool = False
    frame: str = "whole"


_ROWS = [
    Recipe(
        name="paper",
        about="5 steps of DDIM inversion, then 10 recorded steps of denoising",
        function="lavender_min.teachers.recipes:paper",
        settings={"inversion_steps": 5, "denoising_steps": 10},
        passes=lambda s: s["inversion_steps"] + s["denoising_steps"],
    ),
    Recipe(
        name="null-text",
        about="10 recorded steps of guided denoising, kept on the picture's path by null-text inversion",
        function="lavender_min.teachers.recipes:null_text",
        settings={"steps": 10, "inner_steps": 5, "guidance": 7.5},
        passes=lambda s: 2 * s["steps"] + (s["steps"] - 1) * (2 * s["inner_steps"] + 1),
    ),
    Recipe(
        name="invert",
        about="5 recorded steps of DDIM inversion",
        function="lavender_min.teachers.recipes:invert",
        settings={"inversion_steps": 5},
        passes=lambda s: s["inversion_steps"],
    ),
    Recipe(
        name="noise",
        about="one recorded pass over plainly noised copies of the picture",
        function="lavender_min.teachers.recipes:noise",
        settings={"timesteps": [51, 151, 301], "draws": 1, "seed": 0},
        passes=lambda s: len(s["timesteps"]) * s["draws"],
    ),
]
RECIPES = {row.name: row for row in _ROWS}


def find_recipe(name: str, **settings: Any) -> Recipe:
    """The recipe of this name, with these settings in place of its own: `find_recipe("noise", timesteps=[151])`.

    What concerns the combining of maps is replaced in the result: `find_recipe("paper")._replace(resolutions={16: 1.0})`.
    """
    if name not in RECIPES:
        raise ValueError(f"--recipe must be one of {', '.join(RECIPES)}; got {name!r}")
    recipe = RECIPES[name]
    for setting in settings:
        if setting not in recipe.settings:
            raise ValueError(f"--recipe {name} takes no --{setting}")
    return recipe._replace(settings={**recipe.settings, **settings})
