"""Recording the cross-attention of a UNet while it runs: its output stays the same, and the maps are summed on the side.

A map is needed only in small, at the end, averaged over heads, layers and passes. So each layer adds its own maps to a
running sum, [windows, words, pixels], and the probabilities of the single heads are never kept.

Shapes in this file: r windows of text, of each of which the UNet's batch may hold m copies; t tokens of a window; w words;
q = y·x pixels of a layer; h heads; d head dim; c channels; e channels of the text; g = 32.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from lavender_min import ops
from lavender_min.geometry import MAP_SIDE, resize_map


@torch.library.custom_op("lavender_min::recorded_attention", mutates_args={"total"})
def recorded_attention(query: Tensor, key: Tensor, value: Tensor, word_weights: Tensor, total: Tensor) -> Tensor:
    """One layer, query [mr, h, q, d], key and value [mr, h, t, d], word_weights [r, t, w]: its output [mr, q, (h d)].

    Its maps, the mean over heads and over the m copies of a window, are added to total [r, w, q].

    This is an operator of torch's, so that torch.compile makes the UNet one graph and leaves the operator to our kernel. Torch
    derives the operator's schema from the annotations, so they are plain tensors.
    """
    copies = len(query) // len(word_weights)
    maps = total if copies == 1 else total.new_zeros(len(query), *total.shape[1:])
    weights = repeat(word_weights, "r t w -> (m r) t w", m=copies)
    out = ops.diffusion_attention(query, key, value, weights, maps)
    if copies > 1:
        total += reduce(maps, "(m r) w q -> r w q", "mean", m=copies)
    return rearrange(out, "mr h q d -> mr q (h d)").contiguous()


@recorded_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, word_weights: Tensor, total: Tensor) -> Tensor:
    mr, h, q, d = query.shape
    return query.new_empty(mr, q, h * d)


class Recorder:
    """Sums the maps of the layers it is shown, by side of the layer's feature map, in fp32.

    `word_weights[r, t, w]` says how much token t counts for word w: 1/n for each of a word's n tokens. Layers of other
    `sides` than these are left alone. A pass may hold every window several times, one copy of all windows after the other
    (as the recipe `noise` does): the copies are averaged.
    """

    def __init__(self, word_weights: Float[Tensor, "r t w"], sides: Iterable[int]):
        r, _, w = word_weights.shape
        self.word_weights = word_weights
        self.sums: dict[int, Float[Tensor, "r w q"]] = {side: word_weights.new_zeros(r, w, side**2) for side in sides}
        # How many layers were added. It is a tensor because a compiled UNet would be compiled anew for every other number.
        self.counts: dict[int, Tensor] = {side: torch.zeros((), device=word_weights.device) for side in self.sums}

    @property
    def layers(self) -> Counter[int]:
        """By side, how many layers were recorded, each as often as it ran."""
        return Counter({side: int(count) for side, count in self.counts.items()})

    def means(self, g: int = MAP_SIDE) -> dict[int, Float[Tensor, "r w {g} {g}"]]:
        """By side, the mean over layers and passes, resized to g×g. Resizing is linear, so once a side is enough."""
        if not self.layers.total():
            raise RuntimeError("nothing was recorded: run the UNet inside `with recording(unet, recorder)`")
        return {
            side: resize_map(rearrange(total / self.counts[side], "r w (y x) -> r w y x", y=side), g)
            for side, total in self.sums.items()
        }


class RecordingProcessor:
    """Takes the place of a cross-attention layer's processor: same output, and the maps go to the recorder.

    The steps are those of diffusers' `AttnProcessor2_0` for inputs [mr, q, c].
    """

    def __init__(self, original: Callable[..., Tensor], recorder: Recorder):
        self.original, self.recorder = original, recorder

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "mr q c"],
        encoder_hidden_states: Float[Tensor, "mr t e"],
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "mr q c"]:
        # Frames are square.
        side = int(hidden_states.shape[1] ** 0.5)
        if side not in self.recorder.sums:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        if attention_mask is not None:
            raise ValueError("recording expects the UNet to be called without a text mask, as Stable Diffusion is")
        residual = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        query, key, value = (
            rearrange(states, "mr n (h d) -> mr h n d", h=attn.heads)
            for states in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        self.recorder.counts[side] += 1
        out = recorded_attention(query, key, value, self.recorder.word_weights, self.recorder.sums[side])
        out = attn.to_out[0](out)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


@contextlib.contextmanager
def recording(unet: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Inside this `with`, every pass of the UNet adds to the recorder's maps; afterwards the UNet is as it was.

    The layers recorded are those that attend to the text, which diffusers names `attn2`, at the recorder's sides. Raises
    RuntimeError if the UNet is being recorded already.
    """
    layers: list[Any] = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    originals = [layer.processor for layer in layers]
    if any(isinstance(original, RecordingProcessor) for original in originals):
        raise RuntimeError("this UNet is already being recorded")
    try:
        for layer, original in zip(layers, originals, strict=True):
            layer.set_processor(RecordingProcessor(original, recorder))
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.set_processor(original)
