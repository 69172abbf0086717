"""The Aligner network, and all that is trained beside a host.

A small convolutional network turns a word's channels into one map (paper, 4.3). The channels come from `aggregate`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lavender_min import ops
from lavender_min.align import ALIGNERS, aggregate
from lavender_min.align.parallel import ParallelAttention


class Aligner(nn.Module):
    """Channels in, one map out, applied once a word: [m, c, g, g] ─► features [m, width, g, g] ─► 1×1 convolution.

    The closing convolution, the min–max normalisation and the squared error are one op (`ops.aligner_mse`), so only its
    weights stand here. `kernel` 3 is the paper's "conv" (best in its figure 8), 1 its "mlp". The variant "none" is the
    ablation without a network: the mean over the channels itself is held to the target, so the host has to do all the moving.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, variant: str = "sim", kernel: int = 3, norm: str = "instance", width: int = 32):
        super().__init__()
        if variant == "none":
            self.body = nn.Sequential()
            self.register_buffer("weight", torch.full((channels,), 1 / channels))
            self.register_buffer("bias", torch.zeros(1))
            return
        norms: dict[str, Any] = {
            "instance": nn.InstanceNorm2d,
            "batch": nn.BatchNorm2d,
            "none": lambda _: nn.Identity(),
        }
        widths = [channels] + [width] * (ALIGNERS[variant] + 2)
        blocks: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip(widths, widths[1:], strict=False)):
            blocks.append(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False))
            # Of the middle convolutions of "deep" only the first has a norm.
            if i < 2 or i == len(widths) - 2:
                blocks.append(norms[norm](c_out))
            blocks.append(nn.LeakyReLU(0.1))
        self.body = nn.Sequential(*blocks)
        self.weight = nn.Parameter(torch.empty(width))
        # One number, but no scalar: FSDP cannot shard a scalar.
        self.bias = nn.Parameter(torch.zeros(1))
        for parameter in (*self.body.parameters(), self.weight):
            if parameter.ndim != 1 or parameter is self.weight:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, maps: Float[Tensor, "m c g g"]) -> Float[Tensor, "m width g g"]:
        # float32, unless DeepSpeed has turned the whole model to bfloat16
        return self.body(maps.to(self.weight.dtype))

    def predict(self, maps: Float[Tensor, "m c g g"]) -> Float[Tensor, "m g g"]:
        """The map itself, before normalisation: for pictures and measures."""
        return torch.einsum("mcyx,c->myx", self(maps), self.weight) + self.bias


class Align(nn.Module):
    """All that is trained beside the host: parallel attention (if the aggregation reads it) and the Aligner."""

    def __init__(
        self,
        attentions: Mapping[int, Any],
        heads: int,
        aggregation: str = "learn",
        rank: int = 0,
        start: str = "pretrained",
        **aligner: Any,
    ):
        """`attentions`: the host's layers that are read (see `layers`), by index, each with so many query `heads`.

        `rank` and `start` are those of parallel projections, `aligner` what the Aligner is made of.
        """
        super().__init__()
        self.how = aggregate.aggregation(aggregation)
        self.parallel = None
        if self.how.reads == "parallel":
            self.parallel = nn.ModuleDict({str(i): ParallelAttention(a, rank, start) for i, a in attentions.items()})
        self.aligner = Aligner(aggregate.channels(self.how, heads), **aligner)

    def pool_heads(self, maps: Float[Tensor, "n h g g"]) -> Float[Tensor, "n c g g"]:
        return aggregate.pool_heads(self.how, maps)

    def pool_layers(self, own: Mapping[int, Tensor], parallel: Mapping[int, Tensor]) -> Float[Tensor, "n c g g"]:
        return aggregate.pool_layers(self.how, parallel if self.how.reads == "parallel" else own)

    def loss(
        self, maps: Float[Tensor, "m c g g"], target: Float[Tensor, "m g g"], trust: Float[Tensor, " m"]
    ) -> Float[Tensor, ""]:
        """Squared error of the min–max normalised maps, mean over cells and, weighted by `trust`, over words (Eq. 17)."""
        return ops.aligner_mse(self.aligner(maps), self.aligner.weight, self.aligner.bias, target, trust=trust.float())
