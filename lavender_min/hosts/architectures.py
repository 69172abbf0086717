"""Two models that transformers does not have, made known to it: a folder of either then loads through its Auto classes.

`BidirectionalLlava` is LLaVA with another mask ("Improved Alignment of Modalities in Large Vision Language Models"): the tokens
of a picture attend to each other in both directions, text attends to what stands before it. Which kind a folder holds is its
`model_type`, so it cannot be loaded as the causal one by mistake.

`VlmPerceiver` is a small vision-language model that stands where LLaVA has its vision tower ("Deep Pre-Alignment"): what it makes
of a picture has passed through a language model already, and so lies closer to text than what a ViT gives.

A program without this package cannot load such a folder. With it, one line before the loading does:

    import lavender_min.hosts.architectures
"""

from typing import Any, Literal, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput

# ------------------------------------------------------------------------------------------------- bidirectional LLaVA


# A config takes all that stands in a config.json, not its declared fields alone.
@no_type_check
class BidirectionalLlavaConfig(LlavaConfig):
    """LLaVA's fields. What is left out is as the paper has it: SigLIP's last layer, all of its patches, and Qwen2."""

    model_type = "bidirectional_llava"

    vision_feature_select_strategy: Literal["default", "full"] = "full"
    vision_feature_layer: int | list[int] = -1

    def __post_init__(self, **kwargs: Any) -> None:
        for part, usual in (("vision_config", "siglip_vision_model"), ("text_config", "qwen2")):
            given = getattr(self, part)
            if not isinstance(given, PreTrainedConfig):
                setattr(self, part, AutoConfig.for_model(**{"model_type": usual, **(given or {})}))
        super().__post_init__(**kwargs)


def picture_blocks(ids: Int[Tensor, "b t"], image_token: int) -> Int[Tensor, "b t"]:
    """Which picture of its text each token belongs to, counted from 0; −1 for text. Pictures have text between them."""
    is_picture = ids == image_token
    begins = is_picture & ~nn.functional.pad(is_picture[:, :-1], (1, 0))
    return (begins.cumsum(1) - 1).where(is_picture, -1)


class BidirectionalLlavaModel(LlavaModel):
    """LLaVA without its head. It makes the mask itself, and hands it to the language model ready-made."""

    config: BidirectionalLlavaConfig
    # FlashAttention takes no mask of this kind, and would be causal without a word.
    _supports_flash_attn = False

    def __init__(self, config: BidirectionalLlavaConfig) -> None:
        kinds = set(getattr(config.text_config, "layer_types", None) or [])
        if not kinds <= {"full_attention"}:
            raise ValueError(f"every layer of the language model must be of full attention; it has {', '.join(kinds)}")
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As LLaVA's. Raises ValueError without `input_ids`, which say where the picture stands.

        With a cache, `input_ids` are the new tokens only. Those before them attend to nothing any more, so their blocks do not
        matter.
        """
        if input_ids is None:
            raise ValueError("the mask is made from input_ids, which were not given (inputs_embeds alone will not do)")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        blocks = picture_blocks(input_ids, self.config.image_token_id)
        mask = create_causal_mask(
            self.language_model.config,
            # Only its batch, length, dtype and device are looked at.
            torch.empty(*input_ids.shape, 0, dtype=self.dtype, device=input_ids.device),
            attention_mask,
            past_key_values,
            position_ids=position_ids,
            block_sequence_ids=nn.functional.pad(blocks, (past, 0), value=-1),
        )
        return super().forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class BidirectionalLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The same with its head."""

    config: BidirectionalLlavaConfig
    _supports_flash_attn = False

    def __init__(self, config: BidirectionalLlavaConfig) -> None:
        # LLaVA's own __init__ would build the causal model first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = BidirectionalLlavaModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """`generate` would make causal masks itself where the cache has a fixed size."""
        return attention_mask


# ------------------------------------------------------------------------------------- a small VLM as a vision tower


@no_type_check
class VlmPerceiverConfig(PreTrainedConfig):
    """`vlm_config` is the small VLM's own; `prompt` are the token ids that it reads, of which the last are the picture's.

    `image_size` and `patch_size` are pixels, as every vision tower has them: the side of the picture, and of what one token
    covers of it.
    """

    model_type = "vlm_perceiver"
    sub_configs = {"vlm_config": AutoConfig}

    vlm_config: dict | PreTrainedConfig | None = None
    prompt: list[int] | None = None
    image_size: int = 0
    patch_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vlm_config, dict):
            self.vlm_config = AutoConfig.for_model(**self.vlm_config)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """The small VLM's width, for the projector behind it."""
        vlm: Any = self.vlm_config
        return vlm.get_text_config().hidden_size


class VlmPerceiver(PreTrainedModel):
    """A small VLM that looks at a picture: the last hidden states of its language model at the picture's tokens."""

    config: VlmPerceiverConfig
    config_class = VlmPerceiverConfig
    base_model_prefix = "perceiver"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VlmPerceiverConfig) -> None:
        super().__init__(config)
        self.vlm = AutoModel.from_config(config.vlm_config)
        self.post_init()

    def forward(self, pixel_values: Float[Tensor, "b 3 y x"], **_: Any) -> BaseModelOutput:
        """[b, patches, c]. The only hidden states it shows are the last ones (`vision_feature_layer` −1)."""
        patches = (self.config.image_size // self.config.patch_size) ** 2
        ids = torch.tensor(self.config.prompt, device=pixel_values.device).expand(len(pixel_values), -1)
        seen = self.vlm(input_ids=ids, pixel_values=pixel_values, use_cache=False).last_hidden_state[:, -patches:]
        return BaseModelOutput(last_hidden_state=seen, hidden_states=(seen,))


AutoConfig.register(BidirectionalLlavaConfig.model_type, BidirectionalLlavaConfig)
AutoModel.register(BidirectionalLlavaConfig, BidirectionalLlavaModel)
AutoModelForImageTextToText.register(BidirectionalLlavaConfig, BidirectionalLlavaForConditionalGeneration)
AutoProcessor.register(BidirectionalLlavaConfig, LlavaProcessor)
AutoConfig.register(VlmPerceiverConfig.model_type, VlmPerceiverConfig)
AutoModel.register(VlmPerceiverConfig, VlmPerceiver)
