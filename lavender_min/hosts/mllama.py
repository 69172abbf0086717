"""Llama 3.2 Vision (transformers `mllama`): how its cross-attention is read, and where its patches lie.

The picture is cut into 1 to 4 tiles of 560 px (row-major), each tile into 40 × 40 patches; the keys of a cross-attention
layer are, tile after tile, one class token and 1,600 patches:

    key = tile · 1601 + {0: class token, 1 + row · 40 + column: patch}

The picture stands at the top left of the tiles' canvas; what it does not fill is padding. Layers 3, 8, …, 38 of 40
attend to the picture, with 32 query heads over 8 key heads, norms on both and no rotary embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import MllamaConfig
from transformers.models.mllama import image_processing_pil_mllama as tiling

from lavender_min.geometry import MAP_SIDE, PatchLayout
from lavender_min.hosts import layouts
from lavender_min.hosts.base import Box, Family, Imagined, Projection, WordRows

_LANGUAGE = r".*language_model\.layers\.\d+\."
LLAMA = "meta-llama/Llama-3.2-11B-Vision"


class Mllama(Family):
    name = "mllama"
    picture_inputs = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    lora_targets = {
        "cross": _LANGUAGE + r"cross_attn\.[qkvo]_proj",
        "language": _LANGUAGE + r"(self_attn\.[qkvo]_proj|cross_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        # The choice of the paper's code.
        "released": _LANGUAGE + r"(self_attn|cross_attn)\.[qv]_proj",
    }

    def layers(self, host: Any) -> dict[int, Any]:
        """The cross-attention modules."""
        decoder = self.decoder(host).layers
        return {i: decoder[i].cross_attn for i in host.config.text_config.cross_attention_layers}

    def project(
        self, attention: Any, layer_inputs: Mapping[str, Any], words: WordRows, query_of: Projection, key_of: Projection
    ) -> tuple[Float[Tensor, "n h d"], Float[Tensor, "b hkv p d"]]:
        """The host hands its picture states over tile by tile, with the tiles in the batch axis."""
        hidden, states = layer_inputs["hidden_states"], layer_inputs["cross_attention_states"]
        d, b = self.heads(attention).dim, len(hidden)
        picked = hidden[words.texts, words.rows.long().clamp(min=0)]
        query = rearrange(query_of(attention, picked), "n (h d) -> n h d", d=d)
        key = rearrange(key_of(attention, states), "(b tiles) p (h d) -> b h (tiles p) d", b=b, d=d)
        return attention.q_norm(query), attention.k_norm(key)

    def views(
        self, size: tuple[int, int], processor: Any, config: Any, ids: Int[Tensor, " t"], box: Box
    ) -> list[PatchLayout]:
        """One view: all tiles as one canvas. The keys are the picture's alone, so the text's ids do not matter."""
        width, height = size
        tile, patch = config.vision_config.image_size, config.vision_config.patch_size
        canvas = tiling.get_optimal_tiled_canvas(height, width, processor.image_processor.max_image_tiles, tile)
        resized = tiling.get_image_size_fit_to_canvas(height, width, *canvas, tile)
        # Patches along a tile, along the canvas, and along what the picture fills of it.
        side = tile // patch
        hc, wc = (int(n) // patch for n in canvas)
        high, wide = (float(n) / patch for n in resized)
        y, x = torch.arange(hc)[:, None], torch.arange(wc)[None, :]
        order = (y // side * (wc // side) + x // side) * (side * side + 1) + 1 + y % side * side + x % side
        keys = torch.arange(int(order.max()) + 1)
        return [layouts.layout(layouts.View(order, 0.0, 0.0, high, wide), keys, box)]

    def vision(self, host: Any) -> list[nn.Module]:
        return [host.model.vision_model, host.model.multi_modal_projector]

    def picture_states(self, host: Any, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """[tiles, p_tile, c] a picture: what the cross-attention layers look at."""
        tower, projector = self.vision(host)
        states = projector(tower(**{name: inputs[name] for name in self.picture_inputs}).last_hidden_state)
        return [{"states": of[0]} for of in states]

    def cached_inputs(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        together = torch.stack([of["states"] for of in states])
        return {"cross_attention_states": rearrange(together, "b tiles p c -> (b tiles) p c")}

    def config(self, name: str) -> Any:
        """transformers' defaults are Llama 3.2's, but for the size of a tile."""
        return MllamaConfig(vision_config={"image_size": 560}, text_config={}) if name.startswith(LLAMA) else None

    def imagine(self, config: Any, b: int, tokens: int) -> Imagined:
        """A picture that fills all tiles."""
        vision = config.vision_config
        tiles, side = vision.max_num_tiles, vision.image_size // vision.patch_size
        long: dict[str, Any] = {"dtype": torch.long, "device": "meta"}
        inputs = {
            "pixel_values": torch.empty(b, 1, tiles, 3, vision.image_size, vision.image_size, device="meta"),
            "aspect_ratio_ids": torch.empty(b, 1, **long),
            "aspect_ratio_mask": torch.empty(b, 1, tiles, **long),
            "cross_attention_mask": torch.empty(b, tokens, 1, tiles, **long),
        }
        hc, wc = side * 2, side * tiles // 2
        view = PatchLayout(
            torch.empty(b, hc, wc, dtype=torch.int32, device="meta"),
            torch.empty(b, MAP_SIDE, hc, device="meta"),
            torch.empty(b, MAP_SIDE, wc, device="meta"),
        )
        return Imagined(inputs, [view], f"{tiles} tiles")
