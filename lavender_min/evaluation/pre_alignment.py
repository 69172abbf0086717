"""Two measures of what "Deep Pre-Alignment" claims (docs/claims.md): how far a picture is from text inside a language model, and
how much language is lost when a host is tuned.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def modality_gap(
    states: Float[Tensor, "l b t c"], picture: Bool[Tensor, "b t"], text: Bool[Tensor, "b t"]
) -> Float[Tensor, " l"]:
    """How far apart picture and text lie in each layer's hidden states: the distance of their means over their spread.

    `picture` and `text` say which tokens are which; padding is neither. The spread is the root of the mean squared distance from
    the own mean, averaged over both. 0 means that the means are one; at 1 the two clouds are as far apart as they are wide.
    """
    means, spreads = [], []
    for tokens in (picture, text):
        # [l, tokens, c]
        own = states[:, tokens].float()
        means.append(own.mean(1))
        spreads.append((own - own.mean(1, keepdim=True)).square().sum(-1).mean(1))
    return (means[0] - means[1]).norm(dim=-1) / (torch.stack(spreads).mean(0)).sqrt()


@torch.no_grad()
def text_loss(host: Any, tokenizer: Any, texts: list[str]) -> float:
    """Cross entropy of plain texts, without a picture, in nats a token. Its rise through tuning is the language that was lost."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(host.device)
        logits = host(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(logits)
    return total / count
