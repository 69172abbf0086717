"""The vision-language models that can be tuned. A *host* is one of them, loaded; a *family* says what hosts of one kind share.

    base.py     what a family must say (`Family`): the only knowledge of model classes in the package
    reading.py  how a host's attention is read while it runs, the same for every family
    load.py     a hub id or folder ─► `Host`: model, processor, family
    mllama.py   Llama 3.2 Vision
    flamingo.py Flamingo as Idefics has it: text that looks at latents

To add a family: subclass `base.Family` in a file of its own, and add its row below (docs/extending.md).
"""

from typing import NamedTuple


class FamilyRow(NamedTuple):
    """What a `model_type` in a config.json stands for. A row of strings, so that listing families imports none."""

    where: str  # "module:class", a subclass of base.Family
    about: str


FAMILIES = {
    "mllama": FamilyRow("lavender_min.hosts.mllama:Mllama", "Llama 3.2 Vision: cross-attention over tiles"),
    "idefics": FamilyRow("lavender_min.hosts.flamingo:Flamingo", "Idefics: Flamingo, cross-attention over latents"),
}
