"""From a host's attention to one map a word that can be held against a teacher's.

    layers.py     which layers are read (`--align_layers`)
    parallel.py   projections of our own beside the host's (`--aggregate learn`)
    aggregate.py  many layers and heads ─► a few channels
    trust.py      how much each word's error counts
    aligner.py    a few channels ─► one map, and the loss; `Align` holds all three

To add an aggregation: a row below and, if it pools in a new way, a function in aggregate.py (docs/extending.md).
"""

from typing import NamedTuple


class Aggregation(NamedTuple):
    """How the attention of many layers and heads becomes a word's channels."""

    about: str
    # Whose attention: the "host"'s own, or that of "parallel" projections.
    reads: str
    # By name in aggregate.POOLS. Heads are pooled first, inside the attention function, so that each layer leaves little behind.
    heads: str
    layers: str
    # Whether later words count more, by their place in the text (appendix D, Eq. 43; see `trust`).
    regularised: bool = False


# Of two names the first is the layers', the second the heads' (section 4.2.1).
AGGREGATIONS = {
    "learn": Aggregation(
        "parallel projections' attention, mean over layers, heads as channels", "parallel", "keep", "mean"
    ),
    "layer-mean": Aggregation("the host's own attention, mean over layers, heads as channels", "host", "keep", "mean"),
    "layer-max": Aggregation("the same, maximum over layers", "host", "keep", "max"),
    "max-max": Aggregation("own attention, maximum over layers, maximum over heads", "host", "max", "max"),
    "max-mean": Aggregation("own attention, maximum over layers, mean over heads", "host", "mean", "max"),
    "mean-max": Aggregation("own attention, mean over layers, maximum over heads", "host", "max", "mean"),
    "mean-mean": Aggregation("own attention, mean over layers and heads", "host", "mean", "mean"),
    "flow-sum": Aggregation("attention flow: layers added up, mean over heads", "host", "mean", "sum", True),
    "flow-mul": Aggregation("attention flow: layers multiplied, mean over heads", "host", "mean", "product", True),
}
# The paper's variants of the Aligner, with how many hidden-to-hidden convolutions each has; "none" has no network.
ALIGNERS = {"light": 0, "sim": 1, "deep": 3, "none": 0}
NORMS = ("instance", "batch", "none")
# What --trust may say (see trust.py).
TRUST = r"none|contrast|threshold:\d*\.?\d+"
