"""From the host's attention to a map that can be held against Stable Diffusion's: aggregation and the Aligner network.

Layers are pooled, heads stay as channels, and a small convolutional network turns them into one map a word (paper,
4.2 and 4.3). `--aggregate learn`, the paper's best, reads parallel projections W_Qd, W_Kd beside the host's own (Eq. 16):
they start from the pretrained ones and share their norms, and their inputs are not detached, so that the host's hidden
states move too while its own projections are left alone.
"""

from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from lavender_min import ops

AGGREGATES = ("learn", "layer-mean")
INNER = {"light": 0, "sim": 1, "deep": 3}  # hidden-to-hidden convolutions of each variant
ALIGNERS = (*INNER, "none")


def low_rank(layer: Any, rank: int) -> nn.Sequential:
    """A rank-r correction to a linear layer, 0 at the start (the second factor is)."""
    down, up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(down, up)


def pretrained(layer: Any) -> Any:
    """The linear layer under an adapter."""
    return getattr(layer, "base_layer", layer)


class ParallelAttention(nn.Module):
    """W_Qd and W_Kd of one layer. With `rank` they are the frozen pretrained projections plus a low-rank correction
    (beside a 4-bit host: 6.8 M parameters for Llama 3.2 at rank 64), without it full copies (168 M).
    """

    def __init__(self, attention: Any, rank: int):
        super().__init__()
        self.rank = rank
        q, k = pretrained(attention.q_proj), pretrained(attention.k_proj)
        self.q, self.k = (low_rank(layer, rank) if rank else full_copy(layer) for layer in (q, k))

    def forward(
        self,
        attention: Any,
        hidden: Float[Tensor, "b t c"],
        states: Float[Tensor, "b_tiles p_tile c"],
        tokens: Int[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hkv p d"], Int[Tensor, "b n"]]:
        """Queries of the picked rows only, all keys, and the rows' new numbers (0 … n − 1, padding still −1).

        The host hands its picture states over tile by tile, with the tiles in the batch axis.
        """
        picked = hidden.gather(1, repeat(tokens.long().clamp(min=0), "b n -> b n c", c=hidden.shape[-1]))
        q, k = self.q(picked), self.k(states)
        if self.rank:
            q, k = q + pretrained(attention.q_proj)(picked), k + pretrained(attention.k_proj)(states)
        q = attention.q_norm(rearrange(q, "b n (h d) -> b h n d", d=attention.head_dim))
        k = attention.k_norm(rearrange(k, "(b tiles) p (h d) -> b h (tiles p) d", b=len(hidden), d=attention.head_dim))
        renumbered = torch.arange(tokens.shape[1], device=tokens.device, dtype=tokens.dtype)
        return q, k, renumbered.where(tokens >= 0, -1)


def full_copy(layer: Any) -> nn.Linear:
    """A trainable copy of a linear layer in float32; a 4-bit one is unpacked."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight.data.copy_(weight.data)
    return linear


class Aligner(nn.Module):
    """Heads in, one map out, applied once a word: [m, heads, g, g] ─► features [m, width, g, g] ─► 1×1 convolution.

    The closing convolution, the min–max normalisation and the squared error are one op (`ops.aligner_mse`), so only its
    weights stand here. `kernel` 3 is the paper's "conv" (best in its figure 8), 1 its "mlp". The variant "none" is the
    ablation without a network: the mean over heads itself is held to the target, so the host has to do all the moving.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, heads: int, variant: str = "sim", kernel: int = 3, norm: str = "instance", width: int = 32):
        super().__init__()
        if variant == "none":
            self.body = nn.Sequential()
            self.register_buffer("weight", torch.full((heads,), 1 / heads))
            self.register_buffer("bias", torch.zeros(1))
            return
        norms: dict[str, Any] = {
            "instance": nn.InstanceNorm2d,
            "batch": nn.BatchNorm2d,
            "none": lambda _: nn.Identity(),
        }
        channels = [heads] + [width] * (INNER[variant] + 2)
        blocks: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip(channels, channels[1:], strict=False)):
            blocks.append(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False))
            if i < 2 or i == len(channels) - 2:  # in the middle of "deep" only the first has a norm
                blocks.append(norms[norm](c_out))
            blocks.append(nn.LeakyReLU(0.1))
        self.body = nn.Sequential(*blocks)
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.zeros(1))  # not a scalar: FSDP cannot shard one
        for parameter in (*self.body.parameters(), self.weight):
            if parameter.ndim != 1 or parameter is self.weight:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, maps: Float[Tensor, "m heads g g"]) -> Float[Tensor, "m width g g"]:
        return self.body(maps.to(self.weight.dtype))  # float32, unless DeepSpeed has turned the whole model to bfloat16

    def predict(self, maps: Float[Tensor, "m heads g g"]) -> Float[Tensor, "m g g"]:
        """The map itself, before normalisation: for pictures and measures."""
        return torch.einsum("mcyx,c->myx", self(maps), self.weight) + self.bias


class Align(nn.Module):
    """All that is trained beside the host: parallel attention (if learned) and the Aligner."""

    def __init__(self, attentions: dict[int, Any], aggregate: str = "learn", rank: int = 0, **aligner):
        super().__init__()
        if aggregate not in AGGREGATES:
            raise ValueError(f"--aggregate is one of {', '.join(AGGREGATES)}, got {aggregate!r}")
        self.aggregate = aggregate
        self.parallel = None
        if aggregate == "learn":
            self.parallel = nn.ModuleDict({str(i): ParallelAttention(a, rank) for i, a in attentions.items()})
        heads = {attention.num_heads for attention in attentions.values()}
        self.aligner = Aligner(heads.pop(), **aligner)

    def pooled(self, own: dict[int, Tensor], parallel: dict[int, Tensor]) -> Float[Tensor, "b n h g g"]:
        """The mean over layers; heads stay apart."""
        maps = parallel if self.aggregate == "learn" else own
        if not maps:
            raise RuntimeError("no attention was read: was the host hooked, and did the batch hold a picture?")
        return torch.stack(list(maps.values())).mean(0)

    def loss(self, maps: Float[Tensor, "m h g g"], target: Float[Tensor, "m g g"], valid) -> Float[Tensor, ""]:
        """Squared error of the min–max normalised maps, mean over valid words and cells (Eq. 17)."""
        return ops.aligner_mse(self.aligner(maps), self.aligner.weight, self.aligner.bias, target, valid=valid)


def without_autocast(maps: Tensor):
    """Maps are small numbers and small tensors: the Aligner runs in float32 whatever the host runs in."""
    return torch.autocast(maps.device.type, enabled=False)
