"""How the toy hosts are built: small twins of four kinds of vision-language model, in their ordinary classes.

    mllama     Llama 3.2 Vision: cross-attention over 2 × 2 tiles, 16 × 16 patches in all
    idefics3   SmolVLM's kind: 2 × 2 tiles and a thumbnail, 2 × 2 patches merged, 4 × 4 tokens each, among the text
    qwen2_vl   Qwen-VL's kind: the picture in its own size, 2 × 2 patches merged, 8 × 8 tokens, positions in three axes
    idefics    Flamingo: 64 latents that a resampler made of 16 × 16 patches, cross-attention over those

All see 128 × 128 pictures in patches of 8 px and have six text layers of width 128. Weights are drawn with a standard deviation
of 0.08, about 1/√width: the usual 0.02 is for widths of thousands, and would hide the picture here.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lavender_min.toy.tokenizers import Specials, chat_tokenizer

# Pixels of a picture, of a tile and of a patch.
SIDE, TILE, PATCH = 128, 64, 8
MAX_TILES = 4
# Standard deviation of untrained weights.
SPREAD = 0.08
# Latents of the Flamingo's resampler.
LATENTS = 64


class Built(NamedTuple):
    model: Any
    processor: Any
    # The image token of a chat template, and what the processor puts in its place for a picture of SIDE × SIDE.
    image_token_id: int
    image_ids: list[int]


def text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Six layers; 4 query heads over 2 key heads of 32."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "initializer_range": SPREAD,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **more,
    }


def finish(model: Any, processor: Any, image_token: str) -> Built:
    tokenizer, picture = processor.tokenizer, Image.new("RGB", (SIDE, SIDE))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.config.model_type == "idefics":
        # This processor takes no image token, but the picture itself.
        ids = processor(text=[""], images=[picture])["input_ids"][0]
    else:
        ids = processor(text=[image_token], images=[[picture]], add_special_tokens=False)["input_ids"][0]
    # Two of the processors put BOS here, as into every text.
    grown = [int(token) for token in ids if token != tokenizer.bos_token_id]
    return Built(model, processor, tokenizer.convert_tokens_to_ids(image_token), grown)


# ---------------------------------------------------------------------------------------------------- Llama 3.2 Vision

# Llama 3.2's own tokens and layout, without its system header.
LLAMA = Specials(
    first=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|pad|>",
    # It has an embedding but no logit.
    last=("<|image|>",),
    named={"image_token": "<|image|>"},
)
LLAMA_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def mllama(corpus: Iterable[str]) -> Built:
    """Cross-attention in layers 1, 3 and 5. Its gates start half open, because no gradient passes a closed one."""
    tokenizer = chat_tokenizer(corpus, LLAMA)
    images = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=MAX_TILES)
    processor = MllamaProcessor(images, tokenizer, chat_template=LLAMA_TEMPLATE)
    vision = dict(
        hidden_size=96,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=4,
        intermediate_size=192,
        vision_output_dim=192,
        intermediate_layers_indices=[1],
        image_size=TILE,
        initializer_range=SPREAD,
        patch_size=PATCH,
        max_num_tiles=MAX_TILES,
        supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    )
    text = text_config(
        tokenizer, vocab_size=len(tokenizer) - 1, cross_attention_layers=[1, 3, 5], max_position_embeddings=256
    )
    del text["tie_word_embeddings"]
    image: Any = tokenizer.convert_tokens_to_ids("<|image|>")
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)
    )
    return finish(model, processor, "<|image|>")


# ------------------------------------------------------------------------------------------------- SmolVLM's kind

# SmolVLM's and Idefics' turns.
TURNS = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SMOL = Specials(
    first=(
        "<|im_start|>", "<end_of_utterance>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>",
        *(f"<row_{y}_col_{x}>" for y in (1, 2) for x in (1, 2)),
    ),
    bos="<|im_start|>",
    eos="<end_of_utterance>",
    pad="<|im_end|>",
)  # fmt: skip


def idefics3(corpus: Iterable[str]) -> Built:
    """A SigLIP-like tower, 8 × 8 patches of each tile and of the thumbnail; four become one token."""
    tokenizer = chat_tokenizer(corpus, SMOL)
    images = Idefics3ImageProcessorPil(size={"longest_edge": SIDE}, max_image_size={"longest_edge": TILE})
    merge = 2
    processor = Idefics3Processor(
        images,
        tokenizer,
        image_seq_len=(TILE // PATCH // merge) ** 2,
        chat_template="{{ '<|im_start|>' }}" + TURNS,
    )
    vision = dict(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=TILE,
        patch_size=PATCH,
        initializer_range=SPREAD,
    )
    image: Any = tokenizer.convert_tokens_to_ids("<image>")
    text = text_config(tokenizer, model_type="llama")
    config = Idefics3Config(vision_config=vision, text_config=text, image_token_id=image, scale_factor=merge)
    return finish(Idefics3ForConditionalGeneration(config), processor, "<image>")


# -------------------------------------------------------------------------------------------------- Qwen-VL's kind

QWEN = Specials(
    first=(
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>",
    ),
    bos=None,
    eos="<|im_end|>",
    pad="<|endoftext|>",
)  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ImagesOnly(Qwen2VLProcessor):
    """Qwen2VLProcessor without its processor of videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


# The class that its folder is to name.
ImagesOnly.__name__ = "Qwen2VLProcessor"


def qwen2_vl(corpus: Iterable[str]) -> Built:
    """Between 4 × 4 and 12 × 12 tokens a picture, whatever its shape."""
    tokenizer = chat_tokenizer(corpus, QWEN)
    unit = 2 * PATCH
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": (4 * unit) ** 2, "longest_edge": (12 * unit) ** 2}, patch_size=PATCH, merge_size=2
    )
    processor = ImagesOnly(images, tokenizer, video_processor=None, chat_template=QWEN_TEMPLATE)
    vision = dict(
        depth=4,
        embed_dim=96,
        hidden_size=128,
        num_heads=4,
        mlp_ratio=2,
        patch_size=PATCH,
        spatial_merge_size=2,
        temporal_patch_size=2,
        initializer_range=SPREAD,
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    ids: dict[str, Any] = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    text = text_config(tokenizer, rope_parameters=rope, bos_token_id=None)
    config = Qwen2VLConfig(vision_config=vision, text_config=text, **ids)
    return finish(Qwen2VLForConditionalGeneration(config), processor, "<|image_pad|>")


# -------------------------------------------------------------------------------------------------------- Flamingo

FLAMINGO = Specials(
    first=("<s>", "<end_of_utterance>", "<pad>", "<fake_token_around_image>", "<image>"),
    bos="<s>",
    eos="<end_of_utterance>",
    pad="<pad>",
    named={"image_token": "<image>"},
)


def idefics(corpus: Iterable[str]) -> Built:
    """Gated cross-attention before layers 0, 2 and 4, over 64 latents, open from the start. No grouped heads."""
    tokenizer = chat_tokenizer(corpus, FLAMINGO)
    images = IdeficsImageProcessorPil(image_size=SIDE)
    processor = IdeficsProcessor(images, tokenizer)
    # Its constructor drops what it is given under this name.
    processor.chat_template = tokenizer.chat_template = "{{ '<s>' }}" + TURNS
    vision = dict(
        embed_dim=96,
        intermediate_size=192,
        image_size=SIDE,
        patch_size=PATCH,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=SPREAD,
    )
    resampler = dict(
        use_resampler=True,
        resampler_n_latents=LATENTS,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=32,
        qk_layer_norms_perceiver=True,
    )
    text = text_config(tokenizer)
    del text["num_key_value_heads"]
    config = IdeficsConfig(
        **text,
        additional_vocab_size=0,
        cross_layer_interval=2,
        qk_layer_norms=True,
        alpha_initializer="ones",
        freeze_text_layers=False,
        freeze_vision_layers=False,
        freeze_lm_head=False,
        use_resampler=True,
        vision_config=vision,
        perceiver_config=resampler,
    )
    return finish(IdeficsForVisionText2Text(config), processor, "<image>")


HOSTS: dict[str, Callable[[Iterable[str]], Built]] = {
    "mllama": mllama,
    "idefics3": idefics3,
    "qwen2_vl": qwen2_vl,
    "idefics": idefics,
}
