"""Flamingo, as transformers has it (`idefics`): its text looks at a resampler's latents, and latents have no picture order.

A vision tower turns the picture, squeezed into a square, into a class token and side × side patches. A resampler reads those
into a fixed number of latents (64). Gated cross-attention layers between the text layers then let every word attend to the
latents. No key of theirs is a patch, so a word's attention must be followed one step further:

    map[word, patch] = Σ over latents of A[word, latent] · M[latent, patch]

M says what a latent has read: the resampler's own attention, rolled out over its blocks (`rollout`). transformers' resampler
writes its attention out by hand and gives none of it away. So it is computed once more beside it, from what each block gets
(`block_attention`).

M is detached: gradients reach a word's attention, not what the latents read. With adapters on the text this is no choice, as
tower and resampler are frozen. With --full the resampler still learns, from the text and through the keys that it makes, but
the alignment does not pull at what its latents look at.

The paper takes the latents themselves for a picture: it reshapes N of them to √N × √N (its 4.2). `Reshaped` does the same, for
comparison (--latents reshape). Nothing says that latent 9 of 64 stands for the second row's second cell; renumbering the
latents changes nothing in the host, but changes that map.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import IdeficsConfig

from lavender_min.geometry import MAP_SIDE, PatchLayout
from lavender_min.hosts import layouts
from lavender_min.hosts.base import (
    Box,
    Encoded,
    Family,
    Heads,
    Imagined,
    Projection,
    WordRows,
    expanded_offsets,
    patch_count,
)
from lavender_min.hosts.reading import Sink

_LAYERS = r"model\.(layers|gated_cross_attn_layers)\.\d+\."
IDEFICS_9B = "HuggingFaceM4/idefics-9b"
# How its texts say that a picture stands here.
FAKE, IMAGE = "<fake_token_around_image>", "<image>"


class Grid(NamedTuple):
    """A square of numbered cells, row by row."""

    first: int  # number of the cell at the top left
    side: int


class Flamingo(Family):
    name = "idefics"
    picture_inputs = ("pixel_values",)
    lora_targets = {
        "cross": r"model\.gated_cross_attn_layers\.\d+\.cross_attn\.[qkvo]_proj",
        "language": _LAYERS + r"((self|cross)_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        "released": _LAYERS + r"(self|cross)_attn\.[qv]_proj",
    }
    # Idefics-instruct's turns. BOS, and what stands around a picture, come with `encode`.
    chat_template = (
        "{% for message in messages %}{{ message['role'].capitalize() + ':' }}"
        "{% if message['content'][0]['type'] == 'text' %}{{ ' ' }}{% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    # Its text model is the whole model, and so is its config.
    attention_config = ""

    def layers(self, host: Any) -> dict[int, Any]:
        """The cross-attention modules. Their `layer_idx` counts the gated layers alone.

        Raises ValueError for a host without a resampler.
        """
        if not host.config.use_resampler:
            raise ValueError(
                "its text looks at patches, not at a resampler's latents (use_resampler in its config.json is false); "
                f"take one with a resampler, such as {IDEFICS_9B}"
            )
        return {layer.cross_attn.layer_idx: layer.cross_attn for layer in host.model.gated_cross_attn_layers}

    def heads(self, attention: Any) -> Heads:
        return Heads(attention.num_heads, attention.num_heads, attention.head_dim)

    def with_latents(self, how: str) -> Family:
        return Reshaped() if how == "reshape" else self

    def project(
        self, attention: Any, layer_inputs: Mapping[str, Any], words: WordRows, query_of: Projection, key_of: Projection
    ) -> tuple[Float[Tensor, "n h d"], Float[Tensor, "b hkv p d"]]:
        """Keys are made of latents. There is no rotation, and a norm of each head only where the config asks for it."""
        hidden, latents = layer_inputs["hidden_states"], layer_inputs["key_value_states"]
        picked = hidden[words.texts, words.rows.long().clamp(min=0)]
        query = rearrange(query_of(attention, picked), "n (h d) -> n h d", d=attention.head_dim)
        key = rearrange(key_of(attention, latents), "b p (h d) -> b h p d", d=attention.head_dim)
        if attention.qk_layer_norms:
            query, key = attention.q_layer_norm(query), attention.k_layer_norm(key)
        return query, key

    # ---- the picture

    def grid(self, config: Any) -> Grid:
        """The patches, among the states that the tower gives: its class token comes first."""
        return Grid(1, config.vision_config.image_size // config.vision_config.patch_size)

    def views(
        self, size: tuple[int, int], processor: Any, config: Any, ids: Int[Tensor, " t"], box: Box
    ) -> list[PatchLayout]:
        """One view. The picture is squeezed into the square, so its size does not matter."""
        first, side = self.grid(config)
        square = layouts.squeezed(layouts.grid(side, side))
        return [layouts.layout(square, first + torch.arange(side * side), box)]

    def vision(self, host: Any) -> list[nn.Module]:
        return [host.model.vision_model, host.model.perceiver_resampler]

    def pixels(self, processor: Any, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Its image processor returns a tensor, without the axis for a text's pictures."""
        return {"pixel_values": processor.image_processor(images=list(pictures), return_tensors="pt")[:, None]}

    def picture_states(self, host: Any, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """[1 + patches, c] a picture, from the tower alone. The resampler runs every time, since M is read from it."""
        states = host.model.vision_model(inputs["pixel_values"].flatten(0, 1).to(host.dtype)).last_hidden_state
        return [{"states": of} for of in states]

    def cached_inputs(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        return {"image_encoder_embeddings": torch.stack([of["states"] for of in states])[:, None]}

    # ---- the text

    def encode(
        self,
        processor: Any,
        texts: Sequence[str],
        pictures: Sequence[Image.Image],
        padding_side: str = "right",
        answer_starts: Sequence[int] | None = None,
    ) -> Encoded:
        """The ids that the processor makes of [text before the picture, picture, text behind it], without calling it.

        It would strip spaces, open what looks like an address, and put BOS before a template's BOS. It would also hide the
        picture from what follows an EOS, which in many templates ends the question. A picture is spelled out if the template
        writes its token alone. Raises ValueError for a text without one.
        """
        tokenizer = processor.tokenizer
        bos = tokenizer.bos_token
        begun = [text if text.startswith(bos) else bos + text for text in texts]
        spelled = [text if FAKE + IMAGE in text else text.replace(IMAGE, FAKE + IMAGE + FAKE) for text in begun]
        text_inputs = tokenizer(
            spelled, padding=True, padding_side=padding_side, add_special_tokens=False, return_tensors="pt"
        )
        ids, mask = text_inputs["input_ids"], text_inputs["attention_mask"]
        sees = (ids == tokenizer.convert_tokens_to_ids(IMAGE)).cumsum(1) > 0
        if not sees.any(1).all():
            raise ValueError(f"the chat template writes no {IMAGE}, so that the text would not see the picture")
        offsets = []
        for text, own, row, kept in zip(texts, begun, ids, mask.bool(), strict=True):
            added = len(own) - len(text)
            found = expanded_offsets(tokenizer, own, row[kept].tolist())
            offsets.append([(max(0, start - added), max(0, end - added)) for start, end in found])
        inputs = {"input_ids": ids, "attention_mask": mask, "image_attention_mask": sees.long()[..., None]}
        return Encoded(inputs | self.pixels(processor, pictures), offsets)

    # ---- the forward

    def decoder(self, host: Any) -> Any:
        """Text layers and tower are one module here."""
        return host.model

    def hidden_states(self, host: Any, inputs: Mapping[str, Any], sink: Any = None) -> Float[Tensor, "b t c"]:
        if sink is None:
            return super().hidden_states(host, inputs)
        with lifting(host.model.perceiver_resampler, sink):
            return super().hidden_states(host, inputs, sink)

    # ---- planning

    def config(self, name: str) -> Any:
        """transformers' defaults are Idefics-9b's, but for these."""
        if not name.startswith(IDEFICS_9B):
            return None
        return IdeficsConfig(
            additional_vocab_size=2,
            cross_layer_interval=4,
            qk_layer_norms=True,
            use_resampler=True,
            vision_config={"embed_dim": 1280},
            perceiver_config={"use_resampler": True, "qk_layer_norms_perceiver": True},
        )

    def imagine(self, config: Any, b: int, tokens: int) -> Imagined:
        side, pixels = self.grid(config).side, config.vision_config.image_size
        inputs = {
            "pixel_values": torch.empty(b, 1, 3, pixels, pixels, device="meta"),
            "image_attention_mask": torch.empty(b, tokens, 1, dtype=torch.long, device="meta"),
        }
        view = PatchLayout(
            torch.empty(b, side, side, dtype=torch.int32, device="meta"),
            torch.empty(b, MAP_SIDE, side, device="meta"),
            torch.empty(b, MAP_SIDE, side, device="meta"),
        )
        return Imagined(inputs, [view], f"{config.perceiver_config.resampler_n_latents} latents")


class Reshaped(Flamingo):
    """The paper's reading: the latents, as they are numbered, are the cells of a picture."""

    def grid(self, config: Any) -> Grid:
        latents = config.perceiver_config.resampler_n_latents
        if isqrt(latents) ** 2 != latents:
            raise ValueError(f"--latents reshape wants a square number of latents; this host has {latents}")
        return Grid(0, isqrt(latents))

    def hidden_states(self, host: Any, inputs: Mapping[str, Any], sink: Any = None) -> Float[Tensor, "b t c"]:
        return Family.hidden_states(self, host, inputs, sink)


# -------------------------------------------------------------------------------------------------- what latents have read


@contextmanager
def lifting(resampler: Any, sink: Sink) -> Iterator[None]:
    """While this is open, a forward also tells the sink what the resampler's latents show of the picture."""
    attentions: list[Tensor] = []

    def before_block(attention: Any, inputs: tuple[Tensor, Tensor]) -> None:
        attentions.append(block_attention(attention, *inputs))

    def after_all(*_: Any) -> None:
        [view] = sink.words.views
        sink.latents = latent_maps(rollout(attentions), view)

    hooks = [attention.register_forward_pre_hook(before_block) for attention, _ in resampler.blocks]
    hooks.append(resampler.register_forward_hook(after_all))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def block_attention(
    attention: Any, context: Float[Tensor, "b p c"], latents: Float[Tensor, "b latents c"]
) -> Float[Tensor, "b latents p+latents"]:
    """How a block's latents attend to the tower's states and, behind those, to one another: mean over heads.

    `attention` is transformers' IdeficsPerceiverAttention, and these are the steps of its forward as far as the softmax.
    """
    context, latents = attention.context_layer_norm(context), attention.latents_layer_norm(latents)
    query, key = attention.q_proj(latents), attention.k_proj(torch.cat([context, latents], 1))
    query, key = (rearrange(x, "b p (h d) -> b h p d", h=attention.n_heads) for x in (query, key))
    if attention.qk_layer_norms:
        query, key = attention.q_layer_norm(query), attention.k_layer_norm(key)
    return (query * attention.qk_scale @ key.mT).softmax(-1).float().mean(1)


def rollout(attentions: Sequence[Float[Tensor, "b latents _"]]) -> Float[Tensor, "b latents p"]:
    """What each latent has read of the tower's states in all blocks: shares that sum to 1 (attention rollout, arXiv 2005.00928).

    A block adds what a latent attends to onto what it was, and the two are taken to weigh the same. So half of what a latent
    had read stays. The other half comes from the states it attends to now, and from what the latents it attends to had read:

        M ← ½ M + ½ (A_states + A_latents · M),    M = 0 at first

    What is left of 1 in the end is the latent's own start, which is the same for all pictures. It shows nothing, so that each
    latent's shares are divided by their sum.
    """
    latents = attentions[0].shape[1]
    read = torch.zeros_like(attentions[0][..., :-latents])
    for attention in attentions:
        read = (read + attention[..., :-latents] + attention[..., -latents:] @ read) / 2
    return read / read.sum(-1, keepdim=True)


def latent_maps(read: Float[Tensor, "b latents p"], view: PatchLayout) -> Float[Tensor, "b latents g g"]:
    """What each latent has read, in picture order, resized, and in units of a latent that reads all patches alike."""
    cells = view.index.long().clamp(min=0).flatten(1)[:, None].expand(-1, read.shape[1], -1)
    canvas = read.gather(2, cells).unflatten(2, view.index.shape[1:]).where(view.index[:, None] >= 0, 0)
    return view.resize_y[:, None] @ canvas @ view.resize_x.mT[:, None] * patch_count(view)[:, None, None, None]
