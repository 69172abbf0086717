"""Verdicts, computed from differences of paired runs.

Runs of two arms are paired by seed, because the seed decides what both share, which cancels in the difference. So an effect is one
number a seed; above 0 it is in favour of the claim. The smallest effect that would matter, its `margin`, is declared beforehand.
The verdict follows from the margin and the 95 % interval of the effect's mean over seeds (Student's t, `evaluation.intervals`):

    does not hold   the whole interval lies below the margin: the effect, if any, is too small to matter
    holds           the whole interval lies above 0, and its upper end reaches the margin
    not clear       everything else, and any effect of a single seed
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from lavender_min.evaluation.intervals import Interval, interval

HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "not clear"
# {arm: [{measure: value} of each seed]}; all arms have the same seeds, in the same order.
Found = Mapping[str, Sequence[Mapping[str, float]]]


class Contrast(NamedTuple):
    """What would count as holding: how an effect is made of the runs of some arms. `of` says which effect, for each seed.

    difference    An arm's value is the mean of its `measures`. The effect is the mean value of the arms of `plus` minus that of the
                  arms of `minus`.
    spread        The same, but an arm's value is the distance of that mean from the arm's own mean over seeds.
    correlation   Each arm of `plus` gives some points (x, y): the first half of `measures` are their x, the second half their y, in
                  the same order. The effect is the rank correlation of x and y over all points. `minus` is not read.
    """

    # For the page, in words.
    what: str
    # Names of arms.
    plus: list[str]
    minus: list[str] = []
    measures: list[str] = []
    # −1 if the claim says that `plus` has less, or that the correlation is negative.
    sign: Literal[1, -1] = 1
    # In the measures' own units.
    margin: float = 0.0
    of: Literal["difference", "spread", "correlation"] = "difference"


class Verdict(NamedTuple):
    effect: Interval
    # HOLDS, FAILS or UNCLEAR
    word: str


def verdict(effects: Sequence[float], margin: float) -> Verdict:
    """The verdict of an effect, given for each seed."""
    found = interval(list(effects))
    if found.half is None:
        return Verdict(found, UNCLEAR)
    low, high = found.mean - found.half, found.mean + found.half
    return Verdict(found, FAILS if high < margin else HOLDS if low > 0 else UNCLEAR)


def judge(contrast: Contrast, found: Found) -> Verdict:
    """The verdict of a contrast. Raises KeyError for an arm or a measure that was not found."""
    if contrast.of == "correlation":
        effects = [contrast.sign * rho for rho in correlations(contrast, found)]
    else:
        pooled = {arm: values(contrast, found[arm]) for arm in (*contrast.plus, *contrast.minus)}
        plus, minus = (mean_over([pooled[arm] for arm in arms]) for arms in (contrast.plus, contrast.minus))
        effects = [contrast.sign * (a - b) for a, b in zip(plus, minus, strict=True)]
    return verdict(effects, contrast.margin)


def values(contrast: Contrast, runs: Sequence[Mapping[str, float]]) -> list[float]:
    """What a contrast compares of one arm: its value at each seed, or that value's distance from their mean."""
    means = [statistics.fmean(run[measure] for measure in contrast.measures) for run in runs]
    if contrast.of == "difference":
        return means
    middle = statistics.fmean(means)
    return [abs(mean - middle) for mean in means]


def mean_over(arms: Sequence[Sequence[float]]) -> list[float]:
    """The mean over arms, for each seed."""
    return [statistics.fmean(of_seed) for of_seed in zip(*arms, strict=True)]


def correlations(contrast: Contrast, found: Found) -> list[float]:
    """The rank correlation at each seed."""
    half = len(contrast.measures) // 2
    xs, ys = contrast.measures[:half], contrast.measures[half:]
    seeds = range(len(found[contrast.plus[0]]))
    points = [
        [(found[arm][s][x], found[arm][s][y]) for arm in contrast.plus for x, y in zip(xs, ys, strict=True)]
        for s in seeds
    ]
    return [rank_correlation([x for x, _ in of], [y for _, y in of]) for of in points]


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's; 0 where one of the two is constant."""
    ranked = [ranks(xs), ranks(ys)]
    if any(len(set(of)) == 1 for of in ranked):
        return 0.0
    return statistics.correlation(*ranked)


def ranks(xs: Sequence[float]) -> list[float]:
    """The rank of each value, from 1 for the smallest; equal values share the mean of their ranks."""
    return [sum(other < x for other in xs) + (sum(other == x for other in xs) + 1) / 2 for x in xs]


def together(verdicts: Sequence[Verdict]) -> str:
    """The verdict of a claim: it holds if all its contrasts hold on all hosts, and does not hold if one of them does not."""
    words = [one.word for one in verdicts]
    if not words:
        return UNCLEAR
    return FAILS if FAILS in words else HOLDS if set(words) == {HOLDS} else UNCLEAR
