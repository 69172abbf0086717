"""The vision-language models that can be tuned. A *host* is one of them, loaded; a *family* says what hosts of one kind share.

    base.py        what a family must say (`Family`): the only knowledge of model classes in the package
    reading.py     how a host's attention is read while it runs, the same for every family
    load.py        a hub id or folder ─► `Host`: model, processor, family
    processors.py  its processor, also where it cannot be built whole
    mllama.py      Llama 3.2 Vision
    decoder.py     LLaVA, Qwen-VL, SmolVLM, Gemma 3 and other hosts whose picture stands among the text
    layouts.py     where their patches lie
    largest.py     for the planner: their largest pictures; published.py: configs of published models
    flamingo.py    Flamingo as Idefics has it: text that looks at latents

    architectures.py  two models of our own, which transformers learns to load
    assemble.py       a new host from a SigLIP and a language model
    perceiver.py      the same with a small VLM in place of the SigLIP

To add a family: subclass `base.Family` in a file of its own, and add its row below (docs/extending.md).
"""

from typing import NamedTuple


class FamilyRow(NamedTuple):
    """What a `model_type` in a config.json stands for. A row of strings, so that listing families imports none."""

    where: str  # "module:class", a subclass of base.Family
    about: str


_DECODER = "lavender_min.hosts.decoder:Decoder"
FAMILIES = {
    "mllama": FamilyRow("lavender_min.hosts.mllama:Mllama", "Llama 3.2 Vision: cross-attention over tiles"),
    "llava": FamilyRow(_DECODER, "LLaVA 1.5: one square, cropped"),
    "bidirectional_llava": FamilyRow(_DECODER, "LLaVA on SigLIP and Qwen2, its picture seen both ways"),
    "llava_next": FamilyRow(_DECODER, "LLaVA-NeXT (1.6): a thumbnail, then tiles"),
    "llava_onevision": FamilyRow(_DECODER, "LLaVA-OneVision: a thumbnail, then tiles, with a limit"),
    "qwen2_vl": FamilyRow(_DECODER, "Qwen2-VL: the picture's own shape"),
    "qwen2_5_vl": FamilyRow(_DECODER, "Qwen2.5-VL"),
    "qwen3_vl": FamilyRow(_DECODER, "Qwen3-VL: the picture enters several layers"),
    "qwen3_5": FamilyRow(_DECODER, "Qwen3.5: every fourth layer has attention"),
    "idefics3": FamilyRow(_DECODER, "Idefics 3: tiles, then a thumbnail"),
    "smolvlm": FamilyRow(_DECODER, "SmolVLM and SmolVLM2: as Idefics 3"),
    "gemma3": FamilyRow(_DECODER, "Gemma 3: one square; every sixth layer sees far"),
    "paligemma": FamilyRow(_DECODER, "PaliGemma (not 2): one square, read both ways together with the question"),
    "internvl": FamilyRow(_DECODER, "InternVL 2 to 3.5: tiles, then a thumbnail"),
    "idefics": FamilyRow("lavender_min.hosts.flamingo:Flamingo", "Idefics: Flamingo, cross-attention over latents"),
}
