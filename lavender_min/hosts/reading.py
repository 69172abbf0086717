"""Reading a host's attention while it runs: its output stays the same to the bit, word maps come out on the side.

transformers hands every attention layer's q, k, v and mask to a function found by name. `hook` registers one of ours under the
name "lavender" and routes the text model to it. It runs the host's own scaled dot product and, for a layer that looks at the
picture, the op `word_attention`. The map is made inside the attention function, so that under activation checkpointing a layer
leaves its small maps behind and nothing else.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lavender_min import ops
from lavender_min.geometry import PatchLayout
from lavender_min.hosts.base import Family, WordRows, patch_count

ATTENTION = "lavender"
PoolHeads = Callable[[Float[Tensor, "n h g g"]], Float[Tensor, "n c g g"]]


class Sink:
    """Goes through the host with a batch: says which rows are wanted, and collects each layer's maps.

    A plain object on purpose: FSDP copies dicts and dataclasses that pass through it, and a copy would come back empty.
    Under activation checkpointing a layer runs twice and must do the same work both times. So a map is always computed, and
    only the first one of a layer is kept.

    Maps are in units of uniform attention: 1 where attention is spread evenly over all patches of all views. So the maps of
    several views are added, each times its number of patches.
    """

    def __init__(
        self,
        family: Family,
        words: WordRows,
        own: Collection[int],
        parallel: nn.ModuleDict | None,
        pool_heads: PoolHeads,
    ):
        self.family, self.words = family, words
        # The layers whose own attention is wanted, and the parallel projections by layer, if theirs is.
        self.own, self.parallel = own, parallel
        self.pool_heads = pool_heads
        # The place of each row among those of its text: its row in queries that are made for the picked rows only.
        number = torch.cat([torch.arange(count) for count in words.counts]).to(words.rows)
        self.number = number.where(words.rows >= 0, -1)
        # What each key shows, [b, p, g, g], for a family whose keys are latents and no patches. It sets them on the way.
        self.latents: Tensor | None = None
        # Layer index ─► [n, c, g, g].
        self.own_maps: dict[int, Tensor] = {}
        self.parallel_maps: dict[int, Tensor] = {}

    def read(self, attention: Any, call: dict[str, Any], layer_inputs: Mapping[str, Any]) -> None:
        """The maps of one layer. `call` holds query, key, attn_mask, is_causal and scale of its scaled dot product."""
        layer = attention.layer_idx
        if layer in self.own:
            self.own_maps.setdefault(layer, self.maps(rows=self.words.rows, **call))
        if self.parallel is not None and str(layer) in self.parallel:
            query, key = self.parallel[str(layer)](attention, self.family, layer_inputs, self.words)
            mask = picked_mask(call["attn_mask"], call["is_causal"], self.words, key.shape[2])
            maps = self.maps(
                query=padded(query, self.words.counts).transpose(1, 2),
                key=key,
                rows=self.number,
                attn_mask=mask,
                is_causal=False,
                scale=call["scale"],
            )
            self.parallel_maps.setdefault(layer, maps)

    def maps(self, query: Tensor, key: Tensor, rows: Tensor, **how: Any) -> Float[Tensor, "n c g g"]:
        found = []
        # Autocast would round the scores of the plain PyTorch op.
        with torch.autocast(query.device.type, enabled=False):
            if self.latents is not None:
                return self.pool_heads(lifted(query, key, rows, self.words.counts, self.latents, **how))
            for view in self.words.views:
                maps = ops.word_attention(query, key, rows, self.words.counts, view, **how)
                found.append(maps * patch_count(view)[self.words.texts][:, None, None, None])
        return self.pool_heads(torch.stack(found).sum(0) if len(found) > 1 else found[0])


def lifted(
    query: Tensor, key: Tensor, rows: Tensor, counts: list[int], latents: Float[Tensor, "b p g g"], **how: Any
) -> Float[Tensor, "n h g g"]:
    """Maps of attention to keys of which each shows a map: theirs, weighted by the attention.

    The op wants a canvas, so the keys are laid out as one line that is not resampled.
    """
    b, p = latents.shape[:2]
    number = torch.arange(p, dtype=torch.int32, device=latents.device)
    line = PatchLayout(
        number.expand(b, 1, p),
        latents.new_ones(b, 1, 1),
        torch.eye(p, dtype=latents.dtype, device=latents.device).expand(b, p, p),
    )
    attention = ops.word_attention(query, key, rows, counts, line, **how)
    return torch.cat(
        [
            torch.einsum("nhp,pyx->nhyx", of[:, :, 0], shown)
            for of, shown in zip(attention.split(counts), latents, strict=True)
        ]
    )


def padded(packed: Shaped[Tensor, "n *rest"], counts: list[int]) -> Shaped[Tensor, "b longest *rest"]:
    """One text's rows after another ─► a batch, shorter texts filled up with 0."""
    return pad_sequence(packed.split(counts), batch_first=True)


def picked_mask(mask: Tensor | None, is_causal: bool, words: WordRows, p: int) -> Tensor | None:
    """The mask [b, 1 or h, longest, p] of the picked rows only, for queries that were made of those alone."""
    rows = words.rows.long().clamp(min=0)
    if is_causal:
        allowed = torch.arange(p, device=rows.device) <= rows[:, None]
        return padded(allowed, words.counts)[:, None]
    if mask is None:
        return None
    if mask.shape[2] == 1:
        return mask
    return padded(mask.expand(len(words.counts), -1, -1, -1)[words.texts, :, rows], words.counts).transpose(1, 2)


def attend(module, query, key, value, attention_mask, sink=None, layer_inputs=None, **kwargs):
    """The attention function: the host's own scaled dot product, untouched, and beside it the maps that a sink wants.

    query [b, h, t, d] and key [b, hkv, p, d] come after projection, norm and rotation, key heads not repeated. No mask means
    causal, as in transformers' own function. Layers that `hook` gave no pre-hook have no picture to look at.
    """
    if sink is not None and layer_inputs is not None:
        causal = attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True)
        call = {
            "query": query,
            "key": key,
            "attn_mask": attention_mask,
            "is_causal": causal,
            "scale": kwargs.get("scaling"),
        }
        sink.read(module, call, layer_inputs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def pass_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of an attention layer: hands its inputs on to `attend`, which is given only what was made of them."""
    if kwargs.get("sink") is None:
        return args, kwargs
    return args, kwargs | {"layer_inputs": dict(kwargs)}


def hook(host: Any, family: Family) -> None:
    """Routes the text model's attention through `attend`. Logits stay bit-equal to those of "sdpa"."""
    AttentionInterface.register(ATTENTION, attend)
    # Without a mask function of the same name no causal mask would be made, and padding would be attended to.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    host.set_attn_implementation({family.attention_config: ATTENTION})
    for attention in family.layers(host).values():
        attention.register_forward_pre_hook(pass_inputs, with_kwargs=True)
