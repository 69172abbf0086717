"""Means over runs with their 95 % intervals (Student's t), and the differences of paired runs.

A model that was tuned several times, each time with another seed, is a list of runs, and each run is one `Numbers`. Runs
of plain tuning and of Lavender are compared in pairs, one seed each, because the seed decides what both share: the order
of the examples and the start of the adapters.
"""

import math
import statistics
from typing import NamedTuple

from lavender_min.evaluation.names import LAVENDER, PLAIN, Numbers, measure_of

# The upper 97.5 % point of Student's t for 1, 2, … 30 degrees of freedom (any table of the distribution).
T95 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
]  # fmt: skip


class Interval(NamedTuple):
    mean: float
    # Half the width of the interval; None where one value leaves nothing to judge by.
    half: float | None


def interval(values: list[float]) -> Interval:
    """The mean of some values, and t · s / √n."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    # Beyond the table its last value serves, which makes the interval a little too wide.
    t = T95[min(len(values) - 1, len(T95)) - 1]
    return Interval(mean, t * statistics.stdev(values) / math.sqrt(len(values)))


class Difference(NamedTuple):
    """Lavender − plain tuning for one measure, over pairs of runs."""

    mean: float
    half: float | None
    # None: there is one pair, so no interval.
    excludes_zero: bool | None
    # "" where the interval holds 0, or where neither direction is better.
    winner: str


def differences(plain: list[Numbers], lavender: list[Numbers]) -> dict[str, Difference]:
    """Paired, run by run, for every number that both have. Nothing if there are not as many runs of one as of the other."""
    if len(plain) != len(lavender) or not plain:
        return {}
    found = {}
    for key in lavender[0]:
        # The error against others' targets is no quality of its own; mse.ratio says what it means.
        if key in plain[0] and key != "mse.others":
            mean, half = interval([b[key] - a[key] for a, b in zip(plain, lavender, strict=True)])
            excludes = None if half is None else abs(mean) > half
            gain = measure_of(key).better * mean
            winner = "" if not excludes or gain == 0 else (LAVENDER if gain > 0 else PLAIN)
            found[key] = Difference(mean, half, excludes, winner)
    return found
