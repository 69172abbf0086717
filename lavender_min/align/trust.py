"""How much each word's error counts in the loss of the alignment.

The paper's λ is an inverse variance, 1/σ² (appendix C.2): how far a teacher's map may be from the truth. It is one number for
all words. But a teacher is not equally right about all words, and its raw map tells: where it is flat, the teacher does not know.
`evaluation/calibration.py` measures that. So λ may differ by word, times a trust that is made of the map's contrast:

    none           every word counts alike, as in the paper
    contrast       as much as its map's contrast, (largest − smallest) / mean
    threshold:0.6  all words whose contrast is at least this, alike, and no other

Trust weighs the error, in the mean and in what the mean is divided by. It never changes a target.

`places` is another weight, of the paper's attention flow (appendix D, Eq. 43–44): r_t = t / N for token t of N. There it scales
a word's map, which the normalisation before the loss would undo; as a weight of the word it does what it is meant to do, it
lets later words count more.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lavender_min.geometry import contrast


def trust(spec: str, raw: Float[Tensor, "w g g"]) -> Float[Tensor, " w"]:
    """Of words by their maps, as the teacher gave them."""
    if spec == "none":
        return torch.ones(len(raw))
    found = contrast(raw.float())
    return found if spec == "contrast" else (found >= float(spec.removeprefix("threshold:"))).float()


def word_trust(
    spec: str, regularised: bool, raw: Float[Tensor, "w g g"], tokens: Sequence[Sequence[int]], length: int
) -> Float[Tensor, " w"]:
    """Of one text's words: their maps, where their tokens stand, and how many tokens the text has."""
    found = trust(spec, raw)
    return found * places(tokens, length) if regularised else found


def places(tokens: Sequence[Sequence[int]], length: int) -> Float[Tensor, " w"]:
    """r_t = t / N of words whose tokens stand at these places, counted from 0, of a text of so many; their mean for several."""
    return torch.tensor([sum(at + 1 for at in of) / len(of) / length for of in tokens])
