"""The two measures of Deep Pre-Alignment, beside sums written out."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from lavender_min.evaluation.pre_alignment import modality_gap, text_loss


def test_the_gap_is_the_distance_of_means_over_the_spread():
    torch.manual_seed(0)
    states = torch.randn(3, 2, 7, 5)
    picture = torch.zeros(2, 7, dtype=torch.bool)
    picture[0, 1:4] = picture[1, 2:4] = True
    text = ~picture
    # Padding is neither.
    text[1, 5:] = False
    states[:, 1, 5:] = 1e3
    for found, layer in zip(modality_gap(states, picture, text).tolist(), states.double().numpy(), strict=True):
        clouds = [
            np.stack([layer[b, t] for b in range(2) for t in range(7) if which[b, t]]) for which in (picture, text)
        ]
        spread = np.mean([np.mean([np.sum((row - cloud.mean(0)) ** 2) for row in cloud]) for cloud in clouds])
        expected = np.linalg.norm(clouds[0].mean(0) - clouds[1].mean(0)) / math.sqrt(spread)
        assert math.isclose(found, expected, rel_tol=1e-5)


def test_the_gap_grows_with_the_distance_and_not_with_the_scale():
    torch.manual_seed(1)
    states = torch.randn(1, 1, 200, 8)
    picture = torch.arange(200)[None] < 100
    apart = states + 10 * picture[None, ..., None]
    near, far, scaled = (modality_gap(s, picture, ~picture).item() for s in (states, apart, 7 * apart))
    # Both clouds are √8 wide, and √8 · 10 apart.
    assert near < 0.3 and 9 < far < 11 and math.isclose(scaled, far, rel_tol=1e-5)


def test_the_loss_of_texts_is_that_of_the_right_next_tokens():
    """A host that says token i + 1 after token i with odds of 9 to 1 for each other of 4."""
    logits = torch.full((5, 5), 0.0)
    for i in range(5):
        logits[i, (i + 1) % 5] = math.log(9)
    ids = {"up": [0, 1, 2, 3], "down": [4, 3]}
    host = lambda input_ids: SimpleNamespace(logits=logits[input_ids])  # noqa: E731
    host.device = "cpu"
    tokenizer = lambda text, return_tensors: {"input_ids": torch.tensor([ids[text]])}  # noqa: E731
    right, wrong = -math.log(9 / 13), -math.log(1 / 13)
    assert math.isclose(text_loss(host, tokenizer, ["up"]), right, rel_tol=1e-5)
    assert math.isclose(text_loss(host, tokenizer, ["up", "down"]), (3 * right + wrong) / 4, rel_tol=1e-5)
