"""The flags of stage 1, and what each of them must be. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavender_min import cli
from lavender_min.data import SOURCES
from lavender_min.teachers import DTYPES, FRAMES, RECIPES, Recipe, find_recipe


@dataclass
class ExtractionFlags:
    """Which data set's maps are made, how, and where they go."""

    data: str = cli.required("which data set", SOURCES)
    data_root: str | None = cli.flag(None, "where its files are: a folder, or a copy's hub id (default: data/<data>)")
    split: str | None = cli.flag(None, "which part of it (default: the part for training)")
    captions: str | None = cli.flag(
        None,
        "how many captions or questions of a picture (default: first for flickr30k, all for ocrvqa30k)",
        ["first", "all"],
    )
    limit: int | None = cli.flag(None, "only the first so many examples")
    max_words: int | None = cli.flag(None, "leave out texts of more words: a long one takes as long as many short ones")
    maps: str | None = cli.flag(None, "folder to write (default: maps/<data>)")
    sd: str | None = cli.flag(
        None, f"Stable Diffusion: model name or pipeline folder (default: {SOURCES['flickr30k'].sd}; toy: the toy one)"
    )
    recipe: str = cli.flag(
        "paper",
        "how Stable Diffusion is run: " + "; ".join(f"{name}: {row.about}" for name, row in RECIPES.items()),
        RECIPES,
    )
    timesteps: str | None = cli.flag(None, "noise: its time steps, such as 51,151,301 (which is the default)")
    draws: int | None = cli.flag(None, "noise: noisy copies of a picture at each time step (default: 1)")
    frame: str = cli.flag("whole", "the whole picture, or its largest centred square", FRAMES)
    resolutions: str | None = cli.flag(
        None, "weights of layers by the side of their maps, such as 16:1,8:0.5 (default: all layers alike)"
    )
    content_norm: bool = cli.flag(False, "divide each pixel by what all the words' tokens get there")
    batch_size: str = cli.flag("8", "pictures at once, or auto: as many as fit the GPU")
    dtype: str | None = cli.flag(None, "the model's number format (default: fp16 on a GPU, else fp32)", DTYPES)
    compile: bool = cli.flag(False, "torch.compile the UNet: minutes at the start, then faster passes")
    shard_size: int = cli.flag(512, "pictures a file; a run that is killed loses at most as many")

    def __post_init__(self) -> None:
        cli.at_least(1, limit=self.limit, max_words=self.max_words, draws=self.draws, shard_size=self.shard_size)
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise ValueError(f"--batch_size must be a whole number of at least 1, or auto; got {self.batch_size!r}")
        self.chosen_recipe()

    def chosen_recipe(self) -> Recipe:
        """The recipe with the settings that were given. Raises ValueError if it takes no such settings."""
        settings: dict[str, Any] = {}
        if self.timesteps is not None:
            settings["timesteps"] = time_steps(self.timesteps)
        if self.draws is not None:
            settings["draws"] = self.draws
        return find_recipe(self.recipe, **settings)._replace(
            resolutions=None if self.resolutions is None else layer_weights(self.resolutions),
            content_norm=self.content_norm,
            frame=self.frame,
        )

    @property
    def maps_folder(self) -> Path:
        return Path(self.maps or f"maps/{self.data}")

    @property
    def sd_name(self) -> str:
        return self.sd or SOURCES[self.data].sd


def time_steps(text: str) -> list[int]:
    """`51,151,301`: steps of the noise schedule, which has 1,000."""
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        steps = []
    if not steps or not all(0 <= step < 1000 for step in steps):
        raise ValueError(f"--timesteps must be time steps from 0 to 999, such as 51,151,301; got {text!r}")
    return steps


def layer_weights(text: str) -> dict[int, float]:
    """`16:1,8:0.5`: {side: weight}; at least one weight is above 0."""
    try:
        weights = {int(side): float(weight) for side, weight in (part.split(":") for part in text.split(","))}
    except ValueError:
        weights = {}
    if not any(weights.values()) or not all(0 <= weight < float("inf") for weight in weights.values()):
        raise ValueError(f"--resolutions must be side:weight pairs, such as 16:1,8:0.5; got {text!r}")
    return weights
