"""A small Flamingo (`idefics`) with random weights, large enough that attention is far from uniform, and its real processor."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor, PreTrainedTokenizerFast
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from lavender_min.data import CAPTION_PROMPT
from lavender_min.toy import data

# 4 × 4 patches, and latents that also make a square.
PIXELS, PATCH, SIDE, LATENTS = 56, 14, 4, 9
# The processor takes no template; the tokenizer does.
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'] + ':' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<fake_token_around_image><image><fake_token_around_image>' }}"
    "{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; the tokens that stand for a picture are the last two, as in the published model."""
    lines = [f"{e.question} {e.answer}" for e in data.load("tune", 100)] + [CAPTION_PROMPT]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "<end_of_utterance>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens(["<fake_token_around_image>", "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def config(own: PreTrainedTokenizerFast) -> IdeficsConfig:
    """Cross-attention before two of four text layers."""
    return IdeficsConfig(
        vocab_size=len(own) - 2,
        additional_vocab_size=2,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=True,
        alpha_initializer="ones",
        use_resampler=True,
        vision_config={
            "embed_dim": 32, "intermediate_size": 64, "image_size": PIXELS, "patch_size": PATCH, "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": LATENTS, "resampler_depth": 2, "resampler_n_heads": 2,
            "resampler_head_dim": 16, "qk_layer_norms_perceiver": True,
        },
        pad_token_id=own.pad_token_id,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
    )  # fmt: skip


def save(folder: Path) -> str:
    torch.manual_seed(0)
    own = tokenizer()
    own.chat_template = TEMPLATE
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=PIXELS), own)
    model = IdeficsForVisionText2Text(config(own))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "latents" not in name:
                parameter.mul_(6)
            elif name.endswith(("q_layer_norm.weight", "k_layer_norm.weight")):
                parameter.fill_(1.5)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = own.eos_token_id, own.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
