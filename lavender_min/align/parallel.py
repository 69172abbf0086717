"""Projections of our own beside the host's: W_Qd and W_Kd of the paper's Eq. 16.

They go through the same norms and rotation as the host's own, and start from the pretrained ones, so that the first map is the
host's; or, as in the released code, from N(0, 0.02), which knows nothing yet (`--parallel_start`). Their inputs are not
detached, so that the host's hidden states move too, while its own projections are left alone.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lavender_min.hosts.base import Family, WordRows


def pretrained(layer: Any) -> Any:
    """The linear layer under an adapter."""
    return getattr(layer, "base_layer", layer)


def low_rank(layer: Any, rank: int) -> nn.Sequential:
    """A correction of that rank to a linear layer. It is 0 at the start, because its second factor is."""
    down, up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(down, up)


def from_noise(layer: Any, rank: int) -> nn.Module:
    """One matrix of that shape, or the product of two, from N(0, 0.02); no bias."""
    widths = [layer.in_features, *([rank] if rank else []), layer.out_features]
    parts = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    for part in parts:
        nn.init.normal_(part.weight, std=0.02)
    return nn.Sequential(*parts)


def full_copy(layer: Any) -> nn.Linear:
    """A trainable copy of a linear layer in float32; a 4-bit one is unpacked."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight.data.copy_(weight.data)
    if layer.bias is not None:
        linear.bias.data.copy_(layer.bias.data)
    return linear


class ParallelAttention(nn.Module):
    """W_Qd and W_Kd of one layer.

    With a `rank` each is the frozen pretrained projection plus a low-rank correction: 6.8 M parameters for all of Llama 3.2 at
    rank 64. With rank 0 each is a full copy: 168 M. From noise each is one matrix, or a product of two.
    """

    def __init__(self, attention: Any, rank: int, start: str = "pretrained"):
        super().__init__()
        layers = [pretrained(attention.q_proj), pretrained(attention.k_proj)]
        if start == "noise":
            self.q, self.k = (from_noise(layer, rank) for layer in layers)
        else:
            self.q, self.k = (low_rank(layer, rank) if rank else full_copy(layer) for layer in layers)
        self.corrects = bool(rank) and start != "noise"

    def forward(
        self, attention: Any, family: Family, layer_inputs: Mapping[str, Any], words: WordRows
    ) -> tuple[Float[Tensor, "n h d"], Float[Tensor, "b hkv p d"]]:
        """Queries of the picked rows only, and all keys."""
        return family.project(attention, layer_inputs, words, self.query_of, self.key_of)

    def query_of(self, attention: Any, x: Tensor) -> Tensor:
        return self.q(x) + pretrained(attention.q_proj)(x) if self.corrects else self.q(x)

    def key_of(self, attention: Any, x: Tensor) -> Tensor:
        return self.k(x) + pretrained(attention.k_proj)(x) if self.corrects else self.k(x)
