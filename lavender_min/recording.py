"""Reading the cross-attention of a UNet while it runs: the output stays the same, the maps are summed on the side.

A map is needed only in small, at the end, averaged over heads, layers and passes. So each layer adds its own to a
running sum, [rows, words, pixels], and the probabilities of the single heads are never kept.

Shapes: r rows of the UNet's batch; l text tokens; w words; q = y·x pixels of a layer; h heads; d head dim; g = 32.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lavender_min import ops
from lavender_min.geometry import MAP_SIDE, resize_map


class Recorder:
    """Sums the maps of the layers it is shown, by side of the layer's feature map, in fp32.

    `word_weights[r, l, w]` says how much token l counts for word w (1/n for each of a word's n tokens).
    `resolutions` {side: weight}: a layer of that side counts that much, any other not at all; None: all alike.
    """

    def __init__(self, word_weights: Float[Tensor, "r l w"], resolutions: Mapping[int, float] | None = None):
        self.word_weights = word_weights
        self.resolutions = resolutions
        self.sums: dict[int, Float[Tensor, "r w q"]] = {}
        self.counts: Counter[int] = Counter()

    def wants(self, side: int) -> bool:
        return self.resolutions is None or self.resolutions.get(side, 0) > 0

    def sum(self, side: int) -> Float[Tensor, "r w q"]:
        """Where the next map of this side is added."""
        if side not in self.sums:
            r, _, w = self.word_weights.shape
            self.sums[side] = self.word_weights.new_zeros(r, w, side * side)
        self.counts[side] += 1
        return self.sums[side]

    def mean(self, g: int = MAP_SIDE) -> Float[Tensor, "r w g g"]:
        """The weighted mean over layers and passes, each resized to g×g (resizing is linear: once a side is enough)."""
        if not self.sums:
            raise RuntimeError("nothing was recorded: run the UNet inside `with recording(unet, …)`")
        weight = {side: 1.0 if self.resolutions is None else self.resolutions[side] for side in self.sums}
        total = sum(weight[side] * self.counts[side] for side in self.sums)
        sides = [
            weight[side] / total * resize_map(rearrange(maps, "r w (y x) -> r w y x", y=side), g)
            for side, maps in self.sums.items()
        ]
        return torch.stack(sides).sum(0)


class RecordingProcessor:
    """Takes the place of a cross-attention layer's processor: same output, and the map on the side.

    The steps are those of diffusers' `AttnProcessor2_0` for [batch, pixels, channels] inputs.
    """

    def __init__(self, original: Callable[..., Tensor], recorder: Recorder):
        self.original, self.recorder = original, recorder

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        side = math.isqrt(hidden_states.shape[1])  # frames are square
        if not self.recorder.wants(side):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        if attention_mask is not None:
            raise ValueError("recording expects the UNet to be called without a text mask, as Stable Diffusion is")
        residual = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        query, key, value = (
            rearrange(states, "r l (h d) -> r h l d", h=attn.heads)
            for states in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        out = ops.diffusion_attention(query, key, value, self.recorder.word_weights, self.recorder.sum(side))
        out = attn.to_out[0](rearrange(out, "r h q d -> r q (h d)"))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


@contextlib.contextmanager
def recording(
    unet: Any, word_weights: Float[Tensor, "r l w"], resolutions: Mapping[int, float] | None = None
) -> Iterator[Recorder]:
    """Inside this `with`, every pass of the UNet adds to the recorder's maps; afterwards the UNet is as it was."""
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    originals = [layer.processor for layer in layers]
    if any(isinstance(original, RecordingProcessor) for original in originals):
        raise RuntimeError("this UNet is already being recorded")
    recorder = Recorder(word_weights, resolutions)
    try:
        for layer, original in zip(layers, originals, strict=True):
            layer.set_processor(RecordingProcessor(original, recorder))
        yield recorder
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.set_processor(original)
