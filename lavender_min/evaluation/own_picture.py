"""One's own picture: what a model says about it, and where it looked for every word it said.

The model answers freely; then its own answer is put back as text (teacher forcing), so that each of its words has rows to
read the attention from, just as in training.
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from peft import PeftModel
from PIL import Image
from torch import Tensor

from lavender_min import draw
from lavender_min.data import BROKEN_PICTURE, Example, open_image
from lavender_min.evaluation import measures
from lavender_min.geometry import MAP_SIDE
from lavender_min.hosts import base as hosts
from lavender_min.maps import StoredMaps
from lavender_min.tuning import runs
from lavender_min.tuning.collator import Collator
from lavender_min.tuning.export import base_of
from lavender_min.tuning.model import Lavender
from lavender_min.words import Word, find_words

COLUMNS = 6
LONGEST = 256  # tokens of an answer
TITLES = {"own": "the model's attention", "aligned": "through the Aligner"}


def load_tuned(vlm: str | None, adapter: str | None, dtype: torch.dtype) -> tuple[Lavender, Any, ModuleType, str]:
    """(model, processor, host module, the rows that speak for a word) of a host as it is, a run's folder, or a PEFT adapter.

    A run knows its host; `vlm` says where it lies now, if elsewhere.
    """
    if adapter and (Path(adapter) / runs.FLAGS_FILE).exists():
        flags = runs.recall(adapter)
        flags = dataclasses.replace(flags, vlm=vlm or flags.vlm)
        return *runs.build(flags, dtype, trained=adapter), flags.attend
    tuned_on = base_of(Path(adapter)) if adapter else None
    model, processor, host = hosts.load(str(vlm or tuned_on), dtype=dtype)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return Lavender(model), processor, host, "predicting"


def picture(path: str) -> Image.Image:
    """Raises ValueError, in one line, for what is no whole picture."""
    try:
        return open_image(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"--image {path}: there is no such file") from None
    except BROKEN_PICTURE as error:
        raise ValueError(f"--image {path} is not a picture that can be read: {error}") from None


@torch.no_grad()
def ask(
    model: Lavender, processor: Any, host: ModuleType, attend: str, image: Image.Image, question: str
) -> tuple[str, list[Word], dict[str, Float[Tensor, "w g g"]]]:
    """The answer, its words, and each kind of map of every word (`Lavender.read`). "" asks for a caption."""
    example = Example("picture", lambda: image, question, "")
    reply = measures.answer(model, processor, [example], 1, "answer", LONGEST)[0].strip()
    words = find_words({"answer": reply})
    if not words:
        return reply, [], {}
    stored = StoredMaps(question, reply, words, torch.zeros(len(words), MAP_SIDE, MAP_SIDE), 0.0)
    batch = Collator(processor, model.host.config, host, attend=attend)([(example._replace(answer=reply), stored)])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "targets", "word_tokens")}
    with measures.autocast(model):
        maps = model.read(**measures.to_device(inputs, model.host.device))
    return reply, words, {kind: of[0].float().cpu() for kind, of in maps.items()}


def draw_answer(path: Path, image: Image.Image, words: list[Word], maps: dict[str, Float[Tensor, "w g g"]]) -> None:
    """A PNG of small pictures: one a word and kind of map, in reading order."""
    lines = -(-len(words) // COLUMNS)
    width, high = min(len(words), COLUMNS), lines * len(maps)
    figure = Figure(figsize=(2.0 * width, (2.0 * image.height / image.width + 0.3) * high), layout="constrained")
    axes = figure.subplots(high, width, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for k, (kind, of) in enumerate(maps.items()):
        for i, word in enumerate(words):
            axis = axes[k * lines + i // COLUMNS, i % COLUMNS]
            axis.set_axis_on()
            draw.overlay(axis, image, of[i])
            axis.set_title(word.text, fontsize=9)
            axis.set_aspect(image.height / image.width)
        axes[k * lines, 0].set_ylabel(TITLES[kind], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
