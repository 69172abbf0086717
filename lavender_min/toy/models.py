"""How the toy Stable Diffusion is built: a small twin of v1.4 in its ordinary classes.

It sees 128 × 128 pictures as 16 × 16 latents, with cross-attention at 16² and 8². The toy hosts are in `hosts.py`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lavender_min.toy.tokenizers import TEXT_LENGTH, clip_tokenizer

SHIPPED = Path(__file__).parent / "models"
SD_FOLDER = SHIPPED / "sd"
# The host that goes with the toy data unless another is named.
VLM_FOLDER = SHIPPED / "mllama"


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
