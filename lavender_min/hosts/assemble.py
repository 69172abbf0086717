"""A new host from two parts that know nothing of each other: a tower that sees and a language model, a new projector between.

    python -m lavender_min.hosts.assemble --vision google/siglip-so400m-patch14-384 --llm Qwen/Qwen2-0.5B runs/siglip-qwen2

The folder is a host as any other, for --vlm and for `tuning.stages`, but its projector has random weights: it must be trained
first, alone. `--mask bidirectional` lets the tokens of a picture attend to each other (see `architectures`); `--mask causal`
makes an ordinary LLaVA of the same parts, to compare with.
"""

import os
import shutil
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaConfig,
    LlavaProcessor,
    SiglipVisionModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lavender_min import cli, hub
from lavender_min.failing import naming
from lavender_min.hosts.architectures import BidirectionalLlavaConfig

PROG = "assemble"
MASKS = {"bidirectional": BidirectionalLlavaConfig, "causal": LlavaConfig}
IMAGE_TOKEN = "<image>"

# A language model's chat template takes texts; a host's messages are lists of pictures and texts. This goes in front of it.
AS_TEXTS = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message.content is string -%}{%- set said = message.content -%}{%- else -%}"
    "{%- set said -%}{%- for part in message.content -%}"
    "{{ 'IMAGE_TOKEN\n' if part.type == 'image' else part.text }}"
    "{%- endfor -%}{%- endset -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=said)] -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
# For a language model without a template: LLaVA 1.5's, whose answers end with the tokenizer's own token. No space ends the
# generation prompt, because most tokenizers make one token of a space and the word behind it.
PLAIN_TEMPLATE = (
    "{{ 'BOS' }}{%- for message in messages -%}"
    "{{ 'USER: ' + message.content + ' ' if message.role == 'user' else 'ASSISTANT: ' + message.content + 'EOS' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def chat_template(tokenizer: Any, image_token: str) -> str:
    """The language model's own template, made to take pictures."""
    own = tokenizer.chat_template
    if not own:
        own = PLAIN_TEMPLATE.replace("BOS", tokenizer.bos_token or "").replace("EOS", tokenizer.eos_token)
    return AS_TEXTS.replace("IMAGE_TOKEN", image_token) + own


def new_folder(name: str) -> Path:
    """For argparse, which puts the name of the argument before the error."""
    if Path(name).exists() and any(Path(name).iterdir()):
        raise ArgumentTypeError(f"{name} is not empty: give a new folder")
    return Path(name)


def siglip(name: str) -> tuple[Any, Any]:
    """(tower, its image processor) of a SigLIP, without the head that pools its patches."""
    with naming(f"--vision {name}"):
        hub.ask(name, "config.json")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type not in ("siglip", "siglip_vision_model"):
            raise ValueError(f"expected a SigLIP, found a {config.model_type}")
        # Published ones hold a text model beside it.
        config = getattr(config, "vision_config", config)
        config.vision_use_head = False
        tower = SiglipVisionModel.from_pretrained(name, config=config, dtype="auto")
        # The kind that needs no torchvision.
        return tower, SiglipImageProcessorPil.from_pretrained(name)


def assemble(tower: Any, images: Any, llm: str, out: Path, config_class: type[LlavaConfig] = LlavaConfig) -> None:
    """Writes the host to the new folder `out`.

    `tower` gives hidden states of all patches of a square picture, row by row, and of nothing else; `images` is its image
    processor. The projector follows torch's random state. Raises ValueError or OSError, in one line, which name the flag.
    """
    with naming(f"--llm {llm}"):
        hub.ask(llm, "config.json")
        language: Any = AutoModelForCausalLM.from_pretrained(llm, dtype="auto", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
    image_token = getattr(tokenizer, "image_token", IMAGE_TOKEN)
    tokenizer.add_tokens([image_token], special_tokens=True)
    # Padding is masked and has no label, so any token will do.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if len(tokenizer) > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer))
    size, patch = tower.config.image_size, tower.config.patch_size
    placeholder: Any = tokenizer.convert_tokens_to_ids(image_token)
    config = config_class(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=placeholder,
        image_seq_length=(size // patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=chat_template(tokenizer, image_token),
        image_token=image_token,
    )
    # Nothing but the projector is new, and only it needs room.
    with torch.device("meta"):
        host = AutoModelForImageTextToText.from_config(config)
    host.model.vision_tower, host.model.language_model = tower, language.base_model
    host.model.multi_modal_projector = LlavaMultiModalProjector(config)
    host.lm_head = language.get_output_embeddings()
    host.to(language.dtype)
    host.generation_config = language.generation_config
    # Written aside and renamed, so that what is killed midway is in nobody's way.
    aside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with naming(out):
        host.save_pretrained(aside)
        processor.save_pretrained(aside)
        os.replace(aside, out)
    print(f"{out} holds the host; its projector is new: train it first")


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog=PROG, description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--vision", required=True, help="hub id or folder of a SigLIP")
    parser.add_argument(
        "--llm", required=True, help="hub id or folder of a causal language model, for instance a Qwen2"
    )
    parser.add_argument(
        "--mask", choices=MASKS, default="bidirectional", help="how a picture's tokens attend to each other"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights")
    parser.add_argument("out", type=new_folder, help="a new folder")
    args = parser.parse_args(argv)

    def make() -> None:
        torch.manual_seed(args.seed)
        assemble(*siglip(args.vision), args.llm, args.out, MASKS[args.mask])

    return cli.run(PROG, make)


if __name__ == "__main__":
    sys.exit(main())
