"""Which layers are aligned, and read when models are compared (`--align_layers`).

Only layers that can see the picture count. Llama 3.2 has eight of them, one layer in five, and the paper aligns all ("Choice of
Layers to Align", section 8.1). In a self-attention model every layer may see the picture; there a fifth is enough (section 4.2.3,
figure 6). What a family does when nothing is said is `Family.align_layers`.

    all         every layer that sees the picture
    first       the first 3 of 8, as in the paper's figure 22; of another number of layers the same share, rounded down,
                and at least one
    mid         so too the middle 4 of 8
    last        so too the last 4 of 8
    every-5     the middle one of every five, so that a fifth of the layers lies evenly spread; any number will do
    3,8,13      these layers, by the host's own count from 0
"""

import re
from collections.abc import Sequence

FORM = r"all|first|mid|last|every-[1-9]\d*|\d+(,\d+)*"


def check(spec: str) -> None:
    """What can be said before a host is there. Raises ValueError for what names no layers."""
    if not re.fullmatch(FORM, spec):
        raise ValueError(
            "--align_layers is all, first, mid, last, every-N (such as every-5) or layers' numbers (such as 3,8,13); "
            f"got {spec!r}"
        )


def choose(spec: str, seeing: Sequence[int]) -> list[int]:
    """The layers that `spec`, in one of the forms above, takes of those that see the picture.

    Raises ValueError for a layer that is not there, or that sees no picture.
    """
    n = len(seeing)
    half = max(1, n // 2)
    start = (n - half) // 2
    shares = {
        "all": slice(0, n),
        "first": slice(0, max(1, n * 3 // 8)),
        "mid": slice(start, start + half),
        "last": slice(n - half, n),
    }
    if spec in shares:
        return list(seeing[shares[spec]])
    if spec.startswith("every-"):
        step = int(spec.removeprefix("every-"))
        groups = [seeing[i : i + step] for i in range(0, n, step)]
        return [group[len(group) // 2] for group in groups]
    wanted = {int(number) for number in spec.split(",")}
    blind = sorted(wanted.difference(seeing))
    if blind:
        raise ValueError(
            f"--align_layers {spec}: no layer {', '.join(map(str, blind))} sees the picture; "
            f"these do: {', '.join(map(str, seeing))}"
        )
    return [layer for layer in seeing if layer in wanted]
