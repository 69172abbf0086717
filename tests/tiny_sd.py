"""A tiny Stable Diffusion with random weights, in an ordinary pipeline folder, and its maps by an explicit softmax."""

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from einops import rearrange
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lavender_min.geometry import resize_map
from lavender_min.teachers import find_recipe

# Tokens of a window; 77 in v1.4.
LENGTH = 20

TEXTS = [
    {"question": "", "answer": "A red dog runs on the grass"},
    # Longer than one window.
    {"question": "Is the turquoise cat with the dog?", "answer": "turquoise, yes"},
    {"question": "", "answer": "cat"},
]
IDS = ["one", "two", "three"]
NOISE = find_recipe("noise", timesteps=[40, 500], draws=2)
# Words of one token; others fall to letters.
WHOLE = ["a", "red", "dog", "on", "the", "grass", "runs", "cat", "with"]


def build_tiny_sd(folder, prediction_type="epsilon"):
    """An ordinary pipeline folder: two resolutions of 8 and 4, two heads, pictures of 16 px, a scheduler as v1.4's."""
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WHOLE:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocab.append(pieces[0])
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*vocab, "<|startoftext|>", "<|endoftext|>"]))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    CLIPTextModel(text_config).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    ).save_pretrained(folder / "vae")  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    sharpen(unet)
    unet.save_pretrained(folder / "unet")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    return folder


@torch.no_grad()
def sharpen(unet):
    """Random weights attend almost evenly: make their maps differ."""
    for name, parameter in unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            parameter.mul_(4)


def explicit_maps(unet, latents, timestep, text, g=32):
    """[layers, r, t, g, g]: every cross-attention's softmax, from the inputs of its projections; and the UNet's output."""
    found, handles = [], []

    def hook(attn, args, kwargs):
        query = rearrange(attn.to_q(args[0]), "r q (h d) -> r h q d", h=attn.heads)
        key = rearrange(attn.to_k(kwargs["encoder_hidden_states"]), "r t (h d) -> r h t d", h=attn.heads)
        a = ((query @ key.mT) * query.shape[-1] ** -0.5).softmax(-1).mean(1)
        found.append(resize_map(rearrange(a, "r (y x) t -> r t y x", y=int(a.shape[1] ** 0.5)), g))

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    out = unet(latents, timestep, text).sample
    for handle in handles:
        handle.remove()
    return torch.stack(found), out
