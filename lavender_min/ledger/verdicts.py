"""Verdicts, computed from differences of paired runs: what both share, the seed, cancels.

An effect is one number a seed, signed so that above 0 it is in favour of the claim. Of its mean and 95 % interval (Student's t,
`evaluation.intervals`) and the smallest effect that would matter, the `margin`, declared beforehand:

    does not hold   the whole interval lies below the margin: whatever there is, is too small to matter
    holds           the whole interval lies above 0, and not all of it below the margin
    not clear       everything else, and a single seed
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from lavender_min.evaluation.intervals import Interval, interval

HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "not clear"
# {arm: one {measure: value} a seed, in the order of seeds}
Found = Mapping[str, Sequence[Mapping[str, float]]]


class Contrast(NamedTuple):
    """What would count: the mean over `plus` above the mean over `minus`, arms each.

    difference: of the mean of the measures. spread: of their distance from their own mean over seeds. correlation: no difference;
    over all arms of `plus`, the rank correlation of the first measures with the last, half of the list each.
    """

    what: str
    plus: list[str]
    minus: list[str] = []
    measures: list[str] = []
    # −1: less is what is claimed.
    sign: Literal[1, -1] = 1
    margin: float = 0.0
    of: Literal["difference", "spread", "correlation"] = "difference"


class Verdict(NamedTuple):
    effect: Interval
    word: str


def verdict(effects: Sequence[float], margin: float) -> Verdict:
    found = interval(list(effects))
    if found.half is None:
        return Verdict(found, UNCLEAR)
    low, high = found.mean - found.half, found.mean + found.half
    return Verdict(found, FAILS if high < margin else HOLDS if low > 0 else UNCLEAR)


def judge(contrast: Contrast, found: Found) -> Verdict:
    """Raises KeyError for an arm or a measure that was not found."""
    if contrast.of == "correlation":
        effects = [contrast.sign * rho for rho in correlations(contrast, found)]
    else:
        pooled = {arm: values(contrast, found[arm]) for arm in (*contrast.plus, *contrast.minus)}
        plus, minus = (mean_over([pooled[arm] for arm in arms]) for arms in (contrast.plus, contrast.minus))
        effects = [contrast.sign * (a - b) for a, b in zip(plus, minus, strict=True)]
    return verdict(effects, contrast.margin)


def values(contrast: Contrast, runs: Sequence[Mapping[str, float]]) -> list[float]:
    """One value a seed."""
    means = [statistics.fmean(run[measure] for measure in contrast.measures) for run in runs]
    if contrast.of == "difference":
        return means
    middle = statistics.fmean(means)
    return [abs(mean - middle) for mean in means]


def mean_over(arms: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(of_seed) for of_seed in zip(*arms, strict=True)]


def correlations(contrast: Contrast, found: Found) -> list[float]:
    """Of each seed."""
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
    """From 1; ties share the mean of their ranks."""
    return [sum(other < x for other in xs) + (sum(other == x for other in xs) + 1) / 2 for x in xs]


def together(verdicts: Sequence[Verdict]) -> str:
    """Of all contrasts on all hosts: it holds if all hold, and does not if one does not."""
    words = [one.word for one in verdicts]
    if not words:
        return UNCLEAR
    return FAILS if FAILS in words else HOLDS if set(words) == {HOLDS} else UNCLEAR
