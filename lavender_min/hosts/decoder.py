"""Decoders: hosts whose picture stands among the text, as tokens of one sequence. LLaVA, Qwen-VL, SmolVLM, Gemma and their like.

A vision tower and a projector turn the picture into states; the text model takes them in the places of its image tokens. So the
keys of its self-attention are text and patches together, causally masked (Gemma's picture sees itself both ways), and queries and
keys are rotated by position. The kinds differ in where patches lie (`layouts`), and in the few points of `KINDS`.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from lavender_min.geometry import PatchLayout
from lavender_min.hosts import largest, layouts, published
from lavender_min.hosts.base import (
    Box,
    Encoded,
    Family,
    Imagined,
    Projection,
    WordRows,
    collate_layouts,
    expanded_offsets,
)

# A tower may hold a language model of its own.
_LAYER = r"(?!.*vision_tower).*(language_model|text_model)\.layers\.\d+\."
# What the tower takes, of all kinds.
TOWER_INPUTS = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images", "image_grid_thw")


class Kind(NamedTuple):
    """What the kinds of decoders differ in."""

    looks: Callable[[layouts.Size, Any, Any], layouts.Looks]
    largest: Callable[[Any], largest.Largest]
    vision: tuple[str, str] = ("vision_tower", "multi_modal_projector")  # modules of `host.model`: tower, projector
    decoder: str = "language_model"
    # Whether the states of a batch's pictures are one tensor, and not a list of them.
    stacked: bool = False
    # Whether masks are made by an input that says what is picture and what text.
    typed: bool = False
    # Whether the processor takes the answer apart from the text, because the text is read both ways.
    suffix: bool = False
    chat_template: str | None = None


# PaliGemma's processors bring none. What it was tuned with: the picture, a question, a newline, the answer.
_PALIGEMMA = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '\n' if message['role'] == 'user' else '<eos>' }}{% endfor %}"
)
_QWEN = Kind(layouts.native, largest.megapixel, ("visual", "visual.merger"))
_IDEFICS = Kind(layouts.idefics3, largest.idefics3, ("vision_model", "connector"), "text_model", stacked=True)
# By `model_type`.
KINDS = {
    "llava": Kind(layouts.cropped, largest.square),
    "bidirectional_llava": Kind(layouts.cropped, largest.square),
    "llava_next": Kind(layouts.anyres, largest.canvas),
    "llava_onevision": Kind(layouts.anyres_max, largest.canvas_max),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_5": _QWEN,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "gemma3": Kind(layouts.whole, largest.square, stacked=True, typed=True),
    "paligemma": Kind(layouts.whole, largest.square, stacked=True, typed=True, suffix=True, chat_template=_PALIGEMMA),
    "internvl": Kind(layouts.internvl, largest.internvl, stacked=True),
}


class Decoder(Family):
    # image_grid_thw stays: the text model needs it for its positions.
    picture_inputs = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images")
    lora_targets = {
        "cross": _LAYER + r"self_attn\.[qkvo]_proj",
        "language": _LAYER + r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        # The choice of the paper's code.
        "released": _LAYER + r"self_attn\.[qv]_proj",
    }
    align_layers = "every-5"

    def __init__(self, model_type: str):
        super().__init__(model_type)
        self.name, self.kind = model_type, KINDS[model_type]
        self.chat_template = self.kind.chat_template

    # ---- attention

    def layers(self, host: Any) -> dict[int, Any]:
        """Those whose attention is full. A window may be too short to reach the picture; linear attention has no map.

        Raises ValueError for a text model whose scores are capped, as Gemma 2's in PaliGemma 2.
        """
        decoder = self.decoder(host)
        if getattr(decoder.config, "attn_logit_softcapping", None):
            raise ValueError(
                f"its text model ({decoder.config.model_type}) caps its attention scores, which scaled_dot_product_attention "
                "does not; take PaliGemma 1, or another family"
            )
        types = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
        return {i: decoder.layers[i].self_attn for i, kind in enumerate(types) if kind == "full_attention"}

    def project(
        self, attention: Any, layer_inputs: Mapping[str, Any], words: WordRows, query_of: Projection, key_of: Projection
    ) -> tuple[Float[Tensor, "n h d"], Float[Tensor, "b hkv p d"]]:
        """Every position is a key, and every rotation comes as the cosines and sines that the layer was given."""
        hidden, d = layer_inputs["hidden_states"], self.heads(attention).dim
        turns = [turn.expand(len(hidden), -1, -1) for turn in layer_inputs["position_embeddings"]]
        at = words.texts, words.rows.long().clamp(min=0)
        # Qwen 3.5 projects a gate behind each head's query; it has no part in the map.
        query = rearrange(query_of(attention, hidden[at]), "n (h d) -> n h d", h=self.heads(attention).query)[..., :d]
        key = rearrange(key_of(attention, hidden), "b p (h d) -> b h p d", d=d)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query, _ = rotate(query, query, *(turn[at] for turn in turns))
        _, key = rotate(key, key, *turns)
        return query, key

    # ---- the picture

    def views(
        self, size: tuple[int, int], processor: Any, config: Any, ids: Int[Tensor, " t"], box: Box
    ) -> list[PatchLayout]:
        """Raises ValueError if the text does not hold as many image tokens as the layout has."""
        slots = (ids == config.image_token_id).nonzero()[:, 0]
        looks = self.kind.looks(size, processor, config)
        if len(slots) != looks.tokens:
            raise ValueError(
                f"the processor gave a picture of {size[0]} × {size[1]} pixels {len(slots)} tokens, where {self.name} is known to "
                f"give {looks.tokens}; are its settings those of the published model?"
            )
        return [layouts.layout(view, slots, box) for view in looks.views]

    def vision(self, host: Any) -> list[nn.Module]:
        return [host.model.get_submodule(name) for name in self.kind.vision]

    def picture_states(self, host: Any, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """[image tokens, c] a picture, and the same for each layer that Qwen 3 feeds with states of its own."""
        taken = {name: inputs[name] for name in TOWER_INPUTS if name in inputs}
        found = host.model.get_image_features(**taken, return_dict=True)
        deep = getattr(found, "deepstack_features", None) or []
        counts = (inputs["input_ids"] == host.config.image_token_id).sum(1).tolist()
        parts = {"states": found.pooler_output, **{f"deepstack_{i}": states for i, states in enumerate(deep)}}
        split = {name: flat(states).split(counts) for name, states in parts.items()}
        return [{name: states[i] for name, states in split.items()} for i in range(len(counts))]

    def cached_inputs(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        return {"picture_states": [dict(of) for of in states]}

    # ---- the text

    def encode(
        self,
        processor: Any,
        texts: Sequence[str],
        pictures: Sequence[Image.Image],
        padding_side: str = "right",
        answer_starts: Sequence[int] | None = None,
    ) -> Encoded:
        """PaliGemma reads a text both ways and only a `suffix` causally, so an answer in the text would read itself."""
        if not self.kind.suffix:
            return super().encode(processor, texts, pictures, padding_side)
        tokenizer = processor.tokenizer
        starts = answer_starts or [len(text) for text in texts]
        pairs = [(text[:at], text[at:]) for text, at in zip(texts, starts, strict=True)]
        inputs = processor(
            # The processor itself puts BOS behind the picture, the newline and, after an answer, EOS.
            text=[asked.removesuffix("\n") for asked, _ in pairs],
            suffix=[said.removesuffix(tokenizer.eos_token) for _, said in pairs] if answer_starts else None,
            images=[[picture] for picture in pictures],
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )
        kept = inputs["attention_mask"].bool()
        offsets = [
            expanded_offsets(tokenizer, text, row[mask].tolist(), cut=at)
            for text, at, row, mask in zip(texts, starts, inputs["input_ids"], kept, strict=True)
        ]
        # Made of what `suffix` holds; the labels of a batch are the collator's.
        return Encoded({name: value for name, value in inputs.items() if name != "labels"}, offsets)

    # ---- the forward

    def decoder(self, host: Any) -> Any:
        return getattr(host.model, self.kind.decoder)

    def hidden_states(self, host: Any, inputs: Mapping[str, Any], sink: Any = None) -> Float[Tensor, "b t c"]:
        """States from a cache take the place of what `get_image_features` would return."""
        inputs = dict(inputs)
        cached = inputs.pop("picture_states", None)
        if cached is None:
            return super().hidden_states(host, inputs, sink)
        deep = {name: [of[name] for of in cached] for name in cached[0]}
        states = deep.pop("states")
        # Those of Qwen 3's further layers come picture by picture since models take picture states as an input.
        apart = "mm_encoder_outputs" in inspect.signature(host.model.forward).parameters
        found = SimpleNamespace(
            # Stacked tile by tile; here every token is a tile.
            pooler_output=torch.cat(states)[:, None] if self.kind.stacked else states,
            deepstack_features=[of if apart else torch.cat(of) for of in deep.values()],
        )
        # The model asks for features only if there are pixels.
        inputs["pixel_values"] = states[0]
        with patch.object(host.model, "get_image_features", lambda *_, **__: found):
            return super().hidden_states(host, inputs, sink)

    # ---- planning

    def config(self, name: str) -> Any:
        return published.config(name)

    def imagine(self, config: Any, b: int, tokens: int) -> Imagined:
        """The inputs are real numbers, because these hosts compute with them: where the picture stands, and how large it is."""
        picture = self.kind.largest(config)
        n = picture.looks.tokens
        ids = torch.ones(b, tokens + n, dtype=torch.long)
        ids[:, 1 : 1 + n] = config.image_token_id
        inputs = {name: torch.cat([value] * b) for name, value in picture.inputs.items()}
        if "image_grid_thw" in inputs:
            inputs["position_ids"] = torch.arange(tokens + n).expand(3, b, -1)
        if self.kind.typed:
            inputs["token_type_ids"] = (ids == config.image_token_id).long()
        views = [layouts.layout(view, torch.arange(1, 1 + n), (0.0, 1.0, 0.0, 1.0)) for view in picture.looks.views]
        together = [collate_layouts([view] * b).to("meta") for view in views]
        return Imagined({"input_ids": ids, **inputs}, together, f"{n} tokens of a picture ({picture.about})")


def flat(states: Any) -> Float[Tensor, "tokens c"]:
    """States of a batch's pictures, or of their tiles, one after another."""
    return torch.cat(list(states)) if isinstance(states, list | tuple) else states.flatten(0, -2)
