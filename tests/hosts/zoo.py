"""Tiny random hosts of every kind that `lavender_min.hosts.decoder` knows, each with the real processor of its kind.

`save` writes an ordinary folder: weights, processor, and a chat template in the style of the kind's published ones. `built` gives
the parts. Some processors also want a video processor, which needs torchvision; those are built without one.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from lavender_min.data import CAPTION_PROMPT
from lavender_min.hosts import decoder
from lavender_min.hosts.architectures import BidirectionalLlavaConfig
from lavender_min.toy import data
from lavender_min.toy.tokenizers import learn_merges

# Pixels of a tile and of a patch: 4 × 4 patches a tile.
TILE, PATCH = 56, 14
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}

_PARTS = "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
_TEXT = "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
_IMAGES = "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
_TEXTS = "{% endfor %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"


def chatml(image: str, before_answer: str = "") -> str:
    """The template of most models that were made of a Qwen."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{{ '" + before_answer + "' }}{% endif %}" + _PARTS + image + _TEXT
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + before_answer + "' }}{% endif %}"
    )  # fmt: skip


def utterances(begin: str) -> str:
    """Idefics's: the role is followed by a space only where a text comes first."""
    return (
        "{{ '" + begin + "' }}{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}:{% else %}{{ ': ' }}{% endif %}" + _PARTS + "<image>" + _TEXT
        + "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )  # fmt: skip


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IDEFICS_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
IDEFICS_TOKENS += [f"<row_{y}_col_{x}>" for y in range(1, 7) for x in range(1, 7)]
# The tokenizer's attributes that some processors look for, by the tokens they name.
NAMES = {
    "<image>": "image_token",
    "<video>": "video_token",
    "<fake_token_around_image>": "fake_image_token",
    "<global-img>": "global_image_token",
    "<end_of_utterance>": "end_of_utterance_token",
    "<start_of_image>": "boi_token",
    "<image_soft_token>": "image_token",
    "<end_of_image>": "eoi_token",
    "<img>": "start_image_token",
    "</img>": "end_image_token",
    "<IMG_CONTEXT>": "context_image_token",
}


class Kind(NamedTuple):
    """How hosts of one kind are built."""

    process: Callable[[Any], Any]  # tokenizer ─► processor
    configure: Callable[[Any], Any]  # processor ─► config
    template: str | None
    tokens: list[str]  # special ones
    eos: str
    bos: str | None = None  # if there is one, the tokenizer puts it before every text


@functools.cache
def merges() -> list[tuple[str, str]]:
    lines = [f"{e.question} {e.answer}" for e in data.load("tune", 100)] + [f"{CAPTION_PROMPT} user assistant"]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Newlines join, as in published tokenizers: those of a template with those that a processor puts around a picture.
    return [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), *learn_merges(lines * 3, split, sorted(pre_tokenizers.ByteLevel.alphabet()))]


def tokenizer_of(kind: Kind) -> Any:
    special = [*dict.fromkeys(["<pad>", kind.eos, *([kind.bos] if kind.bos else []), *kind.tokens])]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges())]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges()))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    named = {NAMES[token]: token for token in kind.tokens if token in NAMES}
    if kind.bos:
        begin = {"single": f"{kind.bos} $A", "pair": f"{kind.bos} $A $B:1"}
        tokenizer.post_processor = processors.TemplateProcessing(**begin, special_tokens=[(kind.bos, vocab[kind.bos])])
        named["bos_token"] = kind.bos
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=kind.eos,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={name: token for name, token in named.items() if name != "bos_token"},
        **({"bos_token": kind.bos} if kind.bos else {}),
    )


def without_video(made_by: type, tokenizer: Any, images: Any, name: str | None = None, **options: Any) -> Any:
    """A processor of this class but for its video processor; `name` is the class that its folder says."""
    attributes = {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
    return type(name or made_by.__name__, (made_by,), attributes)(images, tokenizer, **options)


def ids(processor: Any, **tokens: str) -> dict[str, Any]:
    return {f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def text(processor: Any, kind: str, **more: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    tokens = {"pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return {"model_type": kind, "vocab_size": len(tokenizer), "tie_word_embeddings": False, **sizes, **tokens, **more}


def vision(kind: str, **more: Any) -> dict[str, Any]:
    half = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return {"model_type": kind, "image_size": TILE, "patch_size": PATCH, **half, **more}


def siglip(**more: Any) -> dict[str, Any]:
    return vision("siglip_vision_model", **{"vision_use_head": False, **more})


def qwen(kind: str, processor: Any, config: type, vision_config: dict[str, Any], **more: Any) -> Any:
    rotation = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    merging = {"spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    return config(
        vision_config={**merging, **vision_config},
        text_config=text(processor, f"{kind}_text", rope_parameters=rotation | more.pop("rotation", {}), **more),
        **ids(processor, **tokens, vision_start="<|vision_start|>", vision_end="<|vision_end|>"),
    )


def qwen_images(patch: int) -> Any:
    pixels = (2 * patch) ** 2
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * pixels, "longest_edge": 24 * pixels}, patch_size=patch)


QWEN2 = {"hidden_size": 64, "embed_dim": 32, "mlp_ratio": 2, "patch_size": PATCH}
QWEN2_5 = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": PATCH}
QWEN2_5 |= {"window_size": TILE, "fullatt_block_indexes": [1]}
QWEN3 = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16}
QWEN3 |= {"num_position_embeddings": 16}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LLAVA = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
SQUARE = {"size": {"height": TILE, "width": TILE}}
CROPPED = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
TILED = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}}
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
MORE_PINPOINTS = [[TILE * y, TILE * x] for y in range(1, 4) for x in range(1, 4)]


def siglip_images() -> Any:
    images: Any = SiglipImageProcessorPil(**SQUARE)
    images.image_seq_length = (TILE // PATCH) ** 2
    return images


KINDS = {
    "llava": Kind(
        lambda t: hf.LlavaProcessor(CLIPImageProcessorPil(**CROPPED), t, **LLAVA),
        lambda p: hf.LlavaConfig(
            vision_config=vision("clip_vision_model"), text_config=text(p, "llama"), image_seq_length=16,
            **ids(p, image="<image>"),
        ),
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}" + _IMAGES + "{{ '<image>\n' }}" + _TEXTS
        + "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ["<image>"], "</s>", "<s>",
    ),
    "bidirectional_llava": Kind(
        lambda t: hf.LlavaProcessor(siglip_images(), t, patch_size=PATCH, vision_feature_select_strategy="full"),
        lambda p: BidirectionalLlavaConfig(
            vision_config=siglip(), text_config=text(p, "qwen2"), image_seq_length=16, **ids(p, image="<image>")
        ),
        chatml("{{ '<image>\n' }}"), ["<|im_start|>", "<|im_end|>", "<image>"], "<|im_end|>",
    ),
    "llava_next": Kind(
        lambda t: hf.LlavaNextProcessor(LlavaNextImageProcessorPil(**CROPPED, image_grid_pinpoints=PINPOINTS), t, **LLAVA),
        lambda p: hf.LlavaNextConfig(
            vision_config=vision("clip_vision_model"), text_config=text(p, "mistral", sliding_window=None),
            image_grid_pinpoints=PINPOINTS, **ids(p, image="<image>"),
        ),
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}" + _IMAGES + "{{ '<image>\n' }}" + _TEXTS
        + "{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s>' }}"
        "{% endif %}{% endfor %}",
        ["<image>"], "</s>", "<s>",
    ),
    "llava_onevision": Kind(
        lambda t: without_video(
            hf.LlavaOnevisionProcessor, t, LlavaOnevisionImageProcessorPil(**SQUARE, image_grid_pinpoints=MORE_PINPOINTS),
            num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4",
        ),
        lambda p: hf.LlavaOnevisionConfig(
            vision_config=siglip(), text_config=text(p, "qwen2"), image_grid_pinpoints=MORE_PINPOINTS, vision_feature_layer=-1,
            vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4", **ids(p, image="<image>", video="<video>"),
        ),
        # A space stands before an answer, but not at the end of the generation prompt.
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}" + _IMAGES + "<image>" + _TEXTS
        + "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>", "<image>", "<video>"], "<|im_end|>",
    ),
    "qwen2_vl": Kind(
        lambda t: without_video(hf.Qwen2VLProcessor, t, qwen_images(PATCH)),
        lambda p: qwen("qwen2_vl", p, hf.Qwen2VLConfig, QWEN2),
        chatml(QWEN_IMAGE), QWEN_TOKENS, "<|im_end|>",
    ),
    "qwen2_5_vl": Kind(
        lambda t: without_video(hf.Qwen2_5_VLProcessor, t, qwen_images(PATCH)),
        lambda p: qwen("qwen2_5_vl", p, hf.Qwen2_5_VLConfig, QWEN2_5),
        chatml(QWEN_IMAGE), QWEN_TOKENS, "<|im_end|>",
    ),
    "qwen3_vl": Kind(
        lambda t: without_video(hf.Qwen3VLProcessor, t, qwen_images(16)),
        lambda p: qwen("qwen3_vl", p, hf.Qwen3VLConfig, QWEN3 | {"deepstack_visual_indexes": [0]}, head_dim=16),
        chatml(QWEN_IMAGE), QWEN_TOKENS, "<|im_end|>",
    ),
    "qwen3_5": Kind(
        lambda t: without_video(hf.Qwen3VLProcessor, t, qwen_images(16)),
        lambda p: qwen("qwen3_5", p, hf.Qwen3_5Config, QWEN3, head_dim=32, rotation={"partial_rotary_factor": 0.5}, **LINEAR),
        chatml(QWEN_IMAGE, "<think>\n\n</think>\n\n"), QWEN_TOKENS, "<|im_end|>",
    ),
    "idefics3": Kind(
        lambda t: hf.Idefics3Processor(Idefics3ImageProcessorPil(**TILED), t, image_seq_len=4),
        lambda p: hf.Idefics3Config(
            vision_config=siglip(), text_config=text(p, "llama"), scale_factor=2, pad_token_id=0, **ids(p, image="<image>")
        ),
        utterances("<|begin_of_text|>"), IDEFICS_TOKENS, "<end_of_utterance>", "<|begin_of_text|>",
    ),
    "smolvlm": Kind(
        # SmolVLM's own differs from Idefics 3's in videos only, and wants the package num2words.
        lambda t: without_video(
            hf.Idefics3Processor, t, SmolVLMImageProcessorPil(**TILED), "SmolVLMProcessor", image_seq_len=4
        ),
        lambda p: hf.SmolVLMConfig(
            vision_config=siglip(), text_config=text(p, "llama"), scale_factor=2, pad_token_id=0, **ids(p, image="<image>")
        ),
        utterances("<|im_start|>"), IDEFICS_TOKENS, "<end_of_utterance>", "<|im_start|>",
    ),
    "gemma3": Kind(
        lambda t: hf.Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 112, "width": 112}), t, image_seq_length=4),
        lambda p: hf.Gemma3Config(
            vision_config=siglip(image_size=112), mm_tokens_per_image=4,
            text_config=text(
                p, "gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            **ids(p, image="<image_soft_token>", boi="<start_of_image>", eoi="<end_of_image>"),
        ),
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}" + _PARTS + "<start_of_image>"
        "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<start_of_image>", "<image_soft_token>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "<bos>",
    ),
    "paligemma": Kind(
        lambda t: hf.PaliGemmaProcessor(siglip_images(), t),
        lambda p: hf.PaliGemmaConfig(
            vision_config=siglip(projection_dim=64), text_config=text(p, "gemma", head_dim=16), projection_dim=64, hidden_size=64,
            **ids(p, image="<image>"),
        ),
        # As published: without one.
        None,
        ["<image>"], "<eos>", "<bos>",
    ),
    "internvl": Kind(
        lambda t: without_video(
            hf.InternVLProcessor, t, GotOcr2ImageProcessorPil(**SQUARE, max_patches=6), image_seq_length=4
        ),
        lambda p: hf.InternVLConfig(
            vision_config={
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH], "use_absolute_position_embeddings": True,
            },
            text_config=text(p, "qwen2"), image_seq_length=4, downsample_ratio=0.5, **ids(p, image="<IMG_CONTEXT>"),
        ),
        chatml("{{ '<IMG_CONTEXT>\n' }}"), ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        "<|im_end|>",
    ),
}  # fmt: skip


def built(name: str) -> tuple[Any, Any]:
    """Model and processor. Weights are large enough that attention is far from uniform."""
    kind = KINDS[name]
    processor = kind.process(tokenizer_of(kind))
    processor.chat_template = kind.template or decoder.KINDS[name].chat_template
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(kind.configure(processor)).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            if part.endswith("mm_input_projection_weight"):
                # Gemma's starts at 0.
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def save(name: str, folder: str | Path) -> str:
    """An ordinary folder of a host of this kind."""
    model, processor = built(name)
    processor.chat_template = KINDS[name].template
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
