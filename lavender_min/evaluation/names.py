"""The names of what is compared and of what is measured, and how they are printed."""

from collections.abc import Iterable
from typing import NamedTuple

# {"what.of which words": value}, as "pointing.shape" and "answers.all".
Numbers = dict[str, float]

# The rows of every table.
CHANCE, SD, UNTUNED, PLAIN, LAVENDER = "an even map (chance)", "Stable Diffusion", "untuned", "plain tuning", "Lavender"
# Behind the name of a Lavender model: its maps as the training compares them.
ALIGNED = ", through the Aligner"
COLORS = {PLAIN: "#e3a04f", LAVENDER: "#7a5cc0"}

# Kinds of words and questions that readers see spelled otherwise than the data has them: alone, and for several words.
SPELLED = {"color": "colour"}
PLURAL = {"shape": "shapes"}


def settings(names: Iterable[str]) -> list[str]:
    """Of names of models those tuned with alignment. Several settings have their flags behind the name (`compare.by_setting`)."""
    return [name for name in names if name.startswith(LAVENDER) and not name.endswith(ALIGNED)]


class Measure(NamedTuple):
    """How the numbers of one measure ("pointing" of "pointing.shape") are printed, and which way is better."""

    title: str
    unit: str
    # What a number is multiplied with to be in this unit, and its digits after the point.
    scale: float
    digits: int
    # 1: more is better; −1: less is better; 0: neither.
    better: int


MEASURES = {
    "answers": Measure("answers right", "%", 100, 1, 1),
    "bleu": Measure("BLEU-4", "%", 1, 1, 1),
    "cider": Measure("CIDEr", "× 100", 1, 1, 1),
    "pointing": Measure("pointing game", "%", 100, 1, 1),
    "mass": Measure("mass inside the mask", "%", 100, 1, 1),
    "entropy": Measure("entropy", "nats", 1, 3, 0),
    "mse": Measure("MSE", "", 1, 4, -1),
}
MSE_TITLES = {"mse.own": "MSE, own target", "mse.others": "MSE, others' targets", "mse.ratio": "own / others"}


def measure_of(key: str) -> Measure:
    return MEASURES[key.split(".")[0]]


def title(key: str) -> str:
    """ "pointing game (colour), %" for "pointing.color"."""
    measure, kind = measure_of(key), key.split(".")[1]
    return MSE_TITLES.get(key) or f"{measure.title} ({SPELLED.get(kind, kind)}), {measure.unit}"


def spell(key: str, mean: float, half: float | None, sign: bool = False) -> str:
    """ "71.3 ± 2.1" in the measure's own unit; `half` is half the width of the interval."""
    measure = measure_of(key)
    digits = 2 if key == "mse.ratio" else measure.digits
    # Adding zero turns −0.0 into 0.0.
    value = round(mean * measure.scale, digits) + 0.0
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if half is None else f"{text} ± {half * measure.scale:.{digits}f}"
