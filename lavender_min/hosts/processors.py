"""A model's processor, also where its part for videos cannot be had.

The processors of Qwen-VL, LLaVA-OneVision, InternVL and SmolVLM have a part for videos, and that part wants torchvision. Pictures
do not. So where the whole cannot be built, the image processor and the tokenizer are, and they make the same inputs of texts and
pictures.
"""

import functools
from typing import Any

from transformers import AutoConfig, AutoProcessor, Idefics3Processor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.video_processing_utils import BaseVideoProcessor

from lavender_min.failing import say

VIDEO = "video_processor"
# SmolVLM's own also wants num2words, for the times of a video. For pictures it does what Idefics 3's does.
FOR_PICTURES: dict[str, type] = {"SmolVLMProcessor": Idefics3Processor}


def load(name: str) -> Any:
    """The processor of a hub id or folder. No code of the model's folder is run.

    Raises what transformers raises for files that are missing or broken.
    """
    processor = read(name)
    # Idefics' takes no chat template from its folder, where the tokenizer finds it.
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return processor


def read(name: str) -> Any:
    try:
        return AutoProcessor.from_pretrained(name, trust_remote_code=False)
    # A missing torchvision is any of these, by how old the folder is.
    except (ImportError, OSError, ValueError):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        whole: Any = PROCESSOR_MAPPING.get(type(config), None)
        if whole is None or VIDEO not in whole.get_attributes():
            raise
        processor = without_video(whole, video_settings(name)).from_pretrained(name, trust_remote_code=False)
    tell(whole.__name__)
    return processor


def without_video(whole: type, settings: dict[str, Any] | None) -> Any:
    """The class `whole` without its part for videos.

    A folder that it saves says that it is the whole, and keeps the `settings` of the part. So it loads as the whole where
    torchvision is.
    """
    base: Any = FOR_PICTURES.get(whole.__name__, whole)

    def to_dict(self: Any) -> dict[str, Any]:
        return base.to_dict(self) | ({} if settings is None else {VIDEO: settings})

    parts = classmethod(lambda _: ["image_processor", "tokenizer"])
    return type(whole.__name__, (base,), {"get_attributes": parts, "to_dict": to_dict})


def video_settings(name: str) -> dict[str, Any] | None:
    """What the model's files say of its part for videos; None where they say nothing."""
    try:
        return BaseVideoProcessor.get_video_processor_dict(name)[0]
    except OSError:
        return None


@functools.cache
def tell(name: str) -> None:
    """Once a process."""
    say(f"{name} is used for pictures only: its part for videos, which wants torchvision, could not be built")
