"""Configs of published decoders, so that `--plan` needs no network.

The numbers are those of their config.json where they differ from transformers' defaults for the `model_type`. A test compares the
parameters that follow with those of the published weights.
"""

from typing import Any, NamedTuple

from transformers import AutoConfig


class Published(NamedTuple):
    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    rest: dict[str, Any]


def text(
    layers: int, hidden: int, between: int, heads: tuple[int, int], vocabulary: int, **more: Any
) -> dict[str, Any]:
    """`between` is the width inside the MLP, `heads` those of the queries and of the keys."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": between,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        **more,
    }


def mrope(*section: int) -> dict[str, Any]:
    """How a head's rotation is shared out between time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(section)}}


_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_SMOL = {name: value for name, value in _SIGLIP.items() if name not in ("model_type", "vision_use_head")}

# By the beginning of the hub id: the instructed and the plain model have the same.
MODELS = {
    "Qwen/Qwen2-VL-7B": Published("qwen2_vl", text(28, 3584, 18944, (28, 4), 152064, **mrope(16, 24, 24)), {}, {}),
    "Qwen/Qwen2.5-VL-3B": Published(
        "qwen2_5_vl",
        text(36, 2048, 11008, (16, 2), 151936, **mrope(16, 24, 24)),
        {"hidden_size": 1280, "out_hidden_size": 2048},
        {"tie_word_embeddings": True},
    ),
    "Qwen/Qwen2.5-VL-7B": Published(
        "qwen2_5_vl", text(28, 3584, 18944, (28, 4), 152064, **mrope(16, 24, 24)), {"hidden_size": 1280}, {}
    ),
    "Qwen/Qwen3-VL-8B": Published(
        "qwen3_vl",
        text(36, 4096, 12288, (32, 8), 151936, head_dim=128, **mrope(24, 20, 20)),
        {"out_hidden_size": 4096},
        {},
    ),
    "HuggingFaceTB/SmolVLM2-2.2B": Published(
        "smolvlm",
        {"model_type": "llama", **text(24, 2048, 8192, (32, 32), 49280, head_dim=64)},
        {**_SMOL, "image_size": 384},
        {"scale_factor": 3, "image_token_id": 49190},
    ),
    "llava-hf/llava-1.5-7b": Published(
        "llava", {"model_type": "llama", **text(32, 4096, 11008, (32, 32), 32064)}, _CLIP, {}
    ),
    "llava-hf/llava-v1.6-mistral-7b": Published(
        "llava_next",
        {"model_type": "mistral", "sliding_window": None, **text(32, 4096, 14336, (32, 8), 32064)},
        _CLIP,
        {},
    ),
    "llava-hf/llava-onevision-qwen2-7b": Published(
        "llava_onevision",
        {"model_type": "qwen2", **text(28, 3584, 18944, (28, 4), 152064)},
        {**_SIGLIP, "num_hidden_layers": 26, "image_size": 384},
        {},
    ),
    "google/gemma-3-4b": Published(
        "gemma3",
        text(34, 2560, 10240, (8, 4), 262208, head_dim=256, sliding_window=1024),
        {**_SIGLIP, "image_size": 896},
        {},
    ),
    "google/paligemma-3b-mix-224": Published(
        "paligemma",
        {"model_type": "gemma", **text(18, 2048, 16384, (8, 1), 257216, head_dim=256)},
        {**_SIGLIP, "image_size": 224, "projection_dim": 2048},
        {"hidden_size": 2048, "projection_dim": 2048, "image_token_id": 257152},
    ),
    "OpenGVLab/InternVL3-8B": Published(
        "internvl",
        {"model_type": "qwen2", **text(28, 3584, 18944, (28, 4), 151674)},
        {"attention_bias": True},
        {"tie_word_embeddings": False},
    ),
}


def config(name: str) -> Any:
    """None for a model that is not among them."""
    for begins, model in MODELS.items():
        if name.startswith(begins):
            parts = {"text_config": model.text, "vision_config": model.vision}
            return AutoConfig.for_model(model.model_type, **parts, **model.rest)
    return None
