"""Llama 3.2 Vision (transformers `mllama`): how its cross-attention is read, and where its patches lie.

The picture is cut into 1 to 4 tiles of 560 px (row-major), each tile into 40 × 40 patches; the keys of a cross-attention
layer are, tile after tile, one class token and 1,600 patches:

    key = tile · 1601 + {0: class token, 1 + row · 40 + column: patch}

The picture stands at the top left of the tiles' canvas; what it does not fill is padding. Layers 3, 8, …, 38 of 40
attend to the picture, with 32 query heads over 8 key heads, norms on both and no rotary embedding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lavender_min.geometry import MAP_SIDE, PatchLayout, resize_matrix

try:  # where the PIL and torchvision processors are two files, the latter cannot be imported without torchvision
    from transformers.models.mllama import image_processing_pil_mllama as tiling
except ImportError:
    from transformers.models.mllama import image_processing_mllama as tiling  # type: ignore[no-redef]

_LANGUAGE = r".*language_model\.layers\.\d+\."
LORA_TARGETS = {
    "cross": _LANGUAGE + r"cross_attn\.[qkvo]_proj",
    "language": _LANGUAGE + r"(self_attn\.[qkvo]_proj|cross_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "released": _LANGUAGE + r"(self_attn|cross_attn)\.[qv]_proj",  # the choice of the paper's code
}
PICTURE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, sink=None, layer_inputs=None, **kwargs):
    """The attention function: the host's own scaled dot product, untouched, and beside it the maps a sink asks for.

    query [b, h, t, d] and key [b, hkv, p, d] come after projection and norm; the mask is added ([b, 1, t, p], finfo.min
    on empty tiles). Self-attention layers pass through here too and have no picture to look at.
    """
    if sink is not None and layer_inputs is not None:
        layer = module.layer_idx
        if sink.own:
            sink.read(sink.own_maps, layer, query, key, sink.tokens, attention_mask, scaling)
        if sink.parallel is not None and str(layer) in sink.parallel:
            picked, keys, tokens = sink.parallel[str(layer)](module, *layer_inputs, sink.tokens)
            mask = attention_mask.gather(
                2, sink.tokens.long().clamp(min=0)[:, None, :, None].expand(-1, 1, -1, key.shape[2])
            )
            sink.read(sink.parallel_maps, layer, picked, keys, tokens, mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def pass_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a cross-attention layer: hands its inputs on to `attend`, which is given q and k only."""
    if kwargs.get("sink") is None:
        return args, kwargs
    return args, kwargs | {"layer_inputs": (kwargs["hidden_states"], kwargs["cross_attention_states"])}


def hook(vlm: Any) -> None:
    """Routes the language model's attention through `attend`. Logits stay bit-equal to those of "sdpa"."""
    # Without the mask function of the same name no causal mask would be made, and padding would be attended to.
    AttentionInterface.register("lavender", attend)
    AttentionMaskInterface.register("lavender", sdpa_mask)
    vlm.set_attn_implementation({"text_config": "lavender"})
    for attention in layers(vlm).values():
        attention.register_forward_pre_hook(pass_inputs, with_kwargs=True)


def layers(vlm: Any) -> dict[int, Any]:
    """The cross-attention modules by layer index."""
    decoder = vlm.model.language_model.layers
    return {i: decoder[i].cross_attn for i in vlm.config.text_config.cross_attention_layers}


def vision(vlm: Any) -> list[nn.Module]:
    """The vision tower and the projector behind it."""
    return [vlm.model.vision_model, vlm.model.multi_modal_projector]


def picture_states(vlm: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b tiles p_tile c"]:
    """What the cross-attention layers look at, of pictures one a text; `model.forward` computes the same from pixels."""
    tower, projector = vision(vlm)
    return projector(tower(**{name: inputs[name] for name in PICTURE_INPUTS}).last_hidden_state)[:, 0]


def layout(width: int, height: int, processor, config, box: tuple[float, float, float, float]) -> PatchLayout:
    """Where the patches of a width × height picture lie among the keys; `box` is the part the maps cover.

    `box` holds top, bottom, left, right as shares of the picture ((0, 1, 0, 1): all of it). Cell (y, x) of a map made
    through this layout then covers the same ground as cell (y, x) of Stable Diffusion's map of that part.
    """
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    canvas = tiling.get_optimal_tiled_canvas(height, width, processor.image_processor.max_image_tiles, tile)
    size = tiling.get_image_size_fit_to_canvas(height, width, *canvas, tile)
    side = tile // patch  # patches along a tile
    hc, wc = (int(n) // patch for n in canvas)
    high, wide = (float(n) / patch for n in size)  # what the picture fills, in patches
    y, x = torch.arange(hc)[:, None], torch.arange(wc)[None, :]
    index = (y // side * (wc // side) + x // side) * (side * side + 1) + 1 + y % side * side + x % side
    top, bottom, left, right = box
    inside = (y + 1 > top * high) & (y < bottom * high) & (x + 1 > left * wide) & (x < right * wide)
    return PatchLayout(
        index.where(inside, -1).int()[None],
        resize_matrix(hc, MAP_SIDE, top * high, bottom * high)[None],
        resize_matrix(wc, MAP_SIDE, left * wide, right * wide)[None],
    )
