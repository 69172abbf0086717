"""A host that sees through a small vision-language model instead of a ViT ("Deep Pre-Alignment").

    python -m lavender_min.hosts.perceiver --perceiver llava-hf/llava-interleave-qwen-0.5b-hf --llm Qwen/Qwen3-4B runs/dpa

The small model reads the beginning of a turn, up to its picture; its last hidden states there are the large one's picture. The
large one may be any causal language model. The folder is a LLaVA whose vision tower is an `architectures.VlmPerceiver`, and a
host as any other. The projector between them is new and must be trained first.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from lavender_min import cli, hub
from lavender_min.failing import naming
from lavender_min.hosts.architectures import VlmPerceiver, VlmPerceiverConfig
from lavender_min.hosts.assemble import assemble, new_folder

PROG = "perceiver"


def perceiver(name: str) -> tuple[VlmPerceiver, Any]:
    """(tower, its image processor) of a small VLM.

    Raises ValueError, in one line, for a model that wants more of a picture than one square of pixels, or whose tokens of it are
    no square grid: tiles, native resolutions, latents.
    """
    with naming(f"--perceiver {name}"):
        hub.ask(name, "config.json")
        vlm_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not hasattr(vlm_config, "vision_config"):
            raise ValueError(f"expected a vision-language model, found a {vlm_config.model_type}")
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        config = config_of(vlm_config, processor)
        vlm = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", trust_remote_code=False)
        # Nothing in it is new.
        with torch.device("meta"):
            tower = VlmPerceiver(config)
        tower.vlm = vlm.base_model
        return tower, processor.image_processor


def config_of(config: Any, processor: Any) -> VlmPerceiverConfig:
    """What the tower must know of a small VLM, found by a look at one picture, so wide that whoever makes tiles makes some."""
    asked = [{"role": "user", "content": [{"type": "image"}]}]
    encoded = processor(
        text=[processor.apply_chat_template(asked)],
        images=[[Image.new("RGB", (600, 200))]],
        add_special_tokens=False,
        return_tensors="pt",
    )
    more = sorted(set(encoded) - {"input_ids", "attention_mask", "pixel_values"})
    shape, ids = list(encoded["pixel_values"].shape), encoded["input_ids"][0]
    if more or len(shape) != 4 or shape[0] != 1 or shape[2] != shape[3]:
        raise ValueError(
            f"{config.model_type} takes pixel_values of shape {shape}" + "".join(f", {name}" for name in more)
            + "; a perceiver takes one square picture, [1, 3, side, side], and nothing else: a LLaVA 1.5, for instance"
        )  # fmt: skip
    (places,) = (ids == config.image_token_id).nonzero(as_tuple=True)
    patches, grid = len(places), math.isqrt(len(places))
    if not patches or patches != grid * grid or int(places[-1] - places[0]) != patches - 1:
        raise ValueError(
            f"{config.model_type} has {patches} tokens of a picture, which are no square grid in one piece"
        )
    return VlmPerceiverConfig(
        vlm_config=config,
        prompt=ids[: int(places[-1]) + 1].tolist(),
        image_size=shape[2],
        patch_size=shape[2] // grid,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog=PROG, description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--perceiver", required=True, help="hub id or folder of the small vision-language model")
    parser.add_argument("--llm", required=True, help="hub id or folder of the language model")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights")
    parser.add_argument("out", type=new_folder, help="a new folder")
    args = parser.parse_args(argv)

    def make() -> None:
        torch.manual_seed(args.seed)
        assemble(*perceiver(args.perceiver), args.llm, args.out)

    return cli.run(PROG, make)


if __name__ == "__main__":
    sys.exit(main())
