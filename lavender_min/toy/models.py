"""How the two toy models are built: small twins of Stable Diffusion v1.4 and Llama-3.2-Vision, in their ordinary classes.

Both see 128 × 128 pictures. Stable Diffusion works on 16 × 16 latents with cross-attention at 16² and 8²; Mllama cuts
the picture into 2 × 2 tiles of 64 px, 8 × 8 patches each, so its canvas is 16 × 16 patches as well. The tokenizers are
byte-level BPE: short words are one token, longer ones ("turquoise", "crescent") are kept in two or three.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

SD_FOLDER = Path(__file__).parent / "models" / "sd"
VLM_FOLDER = Path(__file__).parent / "models" / "vlm"
# Tokens that Stable Diffusion's text encoder takes; 77 in v1.4.
TEXT_LENGTH = 40
# Pixels of Mllama's tiles and patches.
TILE, PATCH, MAX_TILES = 64, 8, 4
# Letters that a word may have and still be one token.
LONGEST_WORD = 6

# Llama 3.2's own tokens and layout, without its system header.
IMAGE_TOKEN = "<|image|>"
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def learn_merges(corpus: Iterable[str], pre_tokenizer, alphabet: list[str], suffix: str = "") -> list[tuple[str, str]]:
    """BPE merges learned on `corpus`, without the last merge of every word of more than LONGEST_WORD letters."""
    ending: Any = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**ending))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=100, initial_alphabet=alphabet, show_progress=False, **ending
    )
    texts = list(corpus)
    tokenizer.train_from_iterator(texts, trainer)
    words = {piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    long = {word + suffix for word in words if sum(map(str.isalpha, word.lstrip("Ġ"))) > LONGEST_WORD}
    learned = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return [(a, b) for a, b in learned if a + b not in long]


def clip_tokenizer(corpus: Iterable[str], folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer (lower case, `</w>` ends a word, EOS pads), trained on `corpus`, written to `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[a-z]+|[^\s\w]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(False, False, False),
        ]
    )
    merges = learn_merges(corpus, split, alphabet, "</w>")
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return tokenizer


def chat_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama 3.2's special tokens; the image token comes last, outside lm_head's range."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = learn_merges(corpus, split, alphabet)
    tokens = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, IMAGE_TOKEN])
    # Like Llama's tokenizer, it puts BOS first unless told not to.
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        clean_up_tokenization_spaces=False,
    )


def stable_diffusion(corpus: Iterable[str], folder: Path) -> Any:
    """The whole pipeline with untrained weights: v-prediction, 4 heads, 16 × 16 latents of 4 channels."""
    tokenizer = clip_tokenizer(corpus, folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        # The number of heads, in spite of its name.
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def mllama(corpus: Iterable[str]) -> tuple[Any, MllamaProcessor]:
    """An untrained Mllama: 6 text layers, cross-attention in 1, 3 and 5, 4 query heads over 2 key heads of 32."""
    tokenizer = chat_tokenizer(corpus)
    images = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=MAX_TILES)
    processor = MllamaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)
    vision = dict(
        hidden_size=96,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=4,
        intermediate_size=192,
        vision_output_dim=192,
        intermediate_layers_indices=[1],
        image_size=TILE,
        initializer_range=0.08,
        patch_size=PATCH,
        max_num_tiles=MAX_TILES,
        supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    )
    text = dict(
        # The image token has an embedding but no logit, as in Llama 3.2.
        vocab_size=len(tokenizer) - 1,
        hidden_size=128,
        # About 1/√width. The usual 0.02 is for widths of thousands; here it would hide the picture.
        initializer_range=0.08,
        num_hidden_layers=6,
        cross_attention_layers=[1, 3, 5],
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor
