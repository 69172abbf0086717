"""Folders of a tiny SigLIP and a tiny Qwen2, as their publishers lay them out: what a host is assembled from."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lavender_min.data import CAPTION_PROMPT
from lavender_min.toy import data
from lavender_min.toy.tokenizers import learn_merges

# Qwen2's own: a system's turn comes first unless there is one, and contents are texts.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Width and depth of both parts; large weights, so that attention is far from uniform.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "initializer_range": 0.12,
}


def qwen2(folder: Path, chat_template: str | None = CHATML, **size) -> Path:
    """No token for pictures, none for padding, none at the beginning."""
    lines = [f"{e.question} {e.answer}" for e in data.load("tune", 100)] + [f"{CAPTION_PROMPT} user assistant system"]
    alphabet, split = sorted(pre_tokenizers.ByteLevel.alphabet()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = learn_merges(lines * 3, split, alphabet)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, *alphabet, *(a + b for a, b in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(vocab),
        max_position_embeddings=256,
        num_key_value_heads=2,
        eos_token_id=vocab["<|im_end|>"],
        **{**SMALL, **size},
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def siglip(folder: Path, side: int = 56, patch: int = 14, **size) -> Path:
    """With the head that pools patches, as published ones have it."""
    SiglipVisionModel(SiglipVisionConfig(image_size=side, patch_size=patch, **{**SMALL, **size})).save_pretrained(
        folder
    )
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder
