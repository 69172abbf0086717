"""What a family of vision-language models must say about itself, so that nothing else in the package knows its classes.

Most of it is small: which layers look at the picture, how many heads they have, which modules see. Three things take thought.

Where the patches lie. The keys of an attention layer are numbered; a text is a row of token ids, and in a self-attention
model the picture's patches stand among them. A model may look at a picture several times: as one grid of tiles and, smaller, as
a thumbnail. Each look is a *view*, and `Family.views` gives a PatchLayout for each.

How q and k are made. Aligned projections of our own stand beside the host's (paper, Eq. 16). They must pass through the same
norms and the same rotation as the host's own. `Family.project` does that; it is handed the projections to use.

How a text grows. Most processors put hundreds of image tokens where the text has one. `Family.encode` gives, for every token,
the characters of the text before it grew.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from lavender_min.geometry import PatchLayout

Box = tuple[float, float, float, float]  # top, bottom, left, right, as shares of a picture
Projection = Callable[[Any, Tensor], Tensor]  # (attention module, its input [..., c]) ─► [..., heads · d]


class Heads(NamedTuple):
    """Of one attention layer."""

    query: int  # h
    key: int  # hkv; each serves h / hkv query heads
    dim: int  # d


class WordRows(NamedTuple):
    """Which rows of a batch's hidden states speak for which words. Rows and words stand in one list for all texts.

    Cost follows the rows there are: a word of ninety tokens adds ninety rows, and no row to any other word.
    """

    rows: Int[Tensor, " n"]  # which row of its text, text after text and word after word; −1: none, its map is 0
    counts: list[int]  # [b]: how many of the rows belong to each text
    texts: Int[Tensor, " n"]  # which text of the batch each row belongs to: the same as counts, as an index
    tokens: Int[Tensor, " n"]  # which token each row speaks for; −1 as above
    lengths: Int[Tensor, " m"]  # how many of the rows belong to each word, at least one
    targets: Float[Tensor, "m g g"]  # each word's map by the teacher, in [0, 1]
    views: list[PatchLayout]  # of the whole batch, at least one
    trust: Float[Tensor, " m"]  # how much each word's error counts, from 0 on; see `align.trust`


class Encoded(NamedTuple):
    """Texts as a host takes them."""

    inputs: dict[str, Tensor]  # of the model: input_ids, attention_mask, the picture's
    offsets: list[list[tuple[int, int]]]  # of each text: the characters of every token; (0, 0) for what stands for none


class Imagined(NamedTuple):
    """What the planner of memory needs of a picture: inputs of the right shapes, on the device `meta`."""

    inputs: dict[str, Tensor]
    views: list[PatchLayout]
    about: str  # "4 tiles"


class Family(ABC):
    """What is the same for all hosts of one kind. Methods are handed the host; a family keeps no state."""

    name: str
    # Inputs that are the picture's: what the vision tower takes, and what a cache of its output stands in for.
    picture_inputs: ClassVar[tuple[str, ...]]
    # Regular expressions over module names, by the names that --lora_targets takes.
    lora_targets: ClassVar[Mapping[str, str]]
    # What --align_layers is when nothing is said. Where one layer in five sees the picture, as in the paper's Llama, all are read.
    align_layers: ClassVar[str] = "all"
    # Which part of the config routes the text model's attention (`set_attn_implementation`); "" is the config itself.
    attention_config: ClassVar[str] = "text_config"
    # For hosts whose files hold none.
    chat_template: str | None = None

    def __init__(self, model_type: str = ""):
        """`model_type` is what the hosts' config.json says; it matters to a family of several kinds."""
        self.model_type = model_type

    # ---- attention

    @abstractmethod
    def layers(self, host: Any) -> dict[int, Any]:
        """The attention modules that can see the picture, by the index that each has as its `layer_idx`."""

    def heads(self, attention: Any) -> Heads:
        """Read from the config: many attention modules have no attribute for it."""
        config = attention.config.get_text_config()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Heads(config.num_attention_heads, config.num_key_value_heads, dim)

    @abstractmethod
    def project(
        self, attention: Any, layer_inputs: Mapping[str, Any], words: WordRows, query_of: Projection, key_of: Projection
    ) -> tuple[Float[Tensor, "n h d"], Float[Tensor, "b hkv p d"]]:
        """Queries of the rows in `words` and all keys, made by projections of ours and else as the layer itself makes them:
        the same norms, the same rotation. `layer_inputs` are the keyword arguments that the layer was called with.
        """

    def with_latents(self, how: str) -> "Family":
        """This family as --latents wants it. Raises ValueError if that says how to read latents that its hosts do not have."""
        if how != "lifted":
            raise ValueError(f"--latents {how} is for hosts that look at a resampler's latents; a {self.name} has none")
        return self

    # ---- the picture

    @abstractmethod
    def views(
        self, size: tuple[int, int], processor: Any, config: Any, ids: Int[Tensor, " t"], box: Box
    ) -> list[PatchLayout]:
        """Where the patches of a picture of `size` (width, height) lie among the keys of a text with these token ids.

        Each layout (with a batch axis of 1) covers `box`, a part of the picture: cell (y, x) of a map made through it covers the
        same ground as cell (y, x) of a teacher's map of that part.
        """

    @abstractmethod
    def vision(self, host: Any) -> list[nn.Module]:
        """The modules that turn pictures into what the text model takes: the tower first, the projector last."""

    @abstractmethod
    def picture_states(self, host: Any, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What those modules make of the picture inputs, picture by picture: tensors that a file can hold."""

    @abstractmethod
    def cached_inputs(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Inputs of the model that stand in for the picture inputs, from the states of a batch's pictures."""

    # ---- the text

    def encode(
        self,
        processor: Any,
        texts: Sequence[str],
        pictures: Sequence[Image.Image],
        padding_side: str = "right",
        answer_starts: Sequence[int] | None = None,
    ) -> Encoded:
        """One picture a text. `answer_starts` are the characters where answers begin, None if there are none yet; it matters to
        hosts that read the two differently.

        The texts come from a chat template. Most templates put BOS; where one does not (LLaVA 1.5's), the tokenizer does.
        """
        bos = processor.tokenizer.bos_token
        special = bos is not None and not texts[0].startswith(bos)
        inputs = processor(
            text=list(texts),
            images=[[picture] for picture in pictures],
            padding=True,
            padding_side=padding_side,
            add_special_tokens=special,
            return_tensors="pt",
        )
        kept = inputs["attention_mask"].bool()
        offsets = [
            expanded_offsets(processor.tokenizer, text, row[mask].tolist(), special)
            for text, row, mask in zip(texts, inputs["input_ids"], kept, strict=True)
        ]
        return Encoded(dict(inputs), offsets)

    # ---- the forward

    def decoder(self, host: Any) -> Any:
        """The text model, without its head."""
        return host.model.language_model

    def hidden_states(self, host: Any, inputs: Mapping[str, Any], sink: Any = None) -> Float[Tensor, "b t c"]:
        """What the head takes. `sink` (see `reading`) collects maps on the way."""
        extra = {} if sink is None else {"sink": sink}
        return host.model(**inputs, use_cache=False, **extra).last_hidden_state

    def logits(self, host: Any, hidden: Float[Tensor, "*lead c"]) -> Float[Tensor, "*lead vocabulary"]:
        """Of chosen rows only, because a vocabulary has a hundred thousand words."""
        return host.lm_head(hidden)

    # ---- planning

    def config(self, name: str) -> Any:
        """The config of a published model by its hub id, without a network; None if it is not known here."""
        return None

    @abstractmethod
    def imagine(self, config: Any, b: int, tokens: int) -> Imagined:
        """The largest pictures the processor makes, one for each of b texts of so many tokens."""


def expanded_offsets(
    tokenizer: Any, text: str, ids: list[int], special: bool = False, cut: int | None = None
) -> list[tuple[int, int]]:
    """Characters of `text` for each of the tokens `ids`, which are the text's with an image placeholder grown to many.

    What stands before the placeholder and behind it is the same in both lists of tokens. So the two are matched from both ends,
    and tokens between are the picture's, which stand for no character. This asks nothing of the processor but that. `special`
    says whether the tokenizer adds its special tokens; at the character `cut`, if given, the processor takes the text in two.
    """
    cut = len(text) if cut is None else cut
    short: list[int] = []
    offsets: list[tuple[int, int]] = []
    for begin, piece in ((0, text[:cut]), (cut, text[cut:])):
        if piece:
            encoded = tokenizer(piece, add_special_tokens=special, return_offsets_mapping=True)
            short += encoded["input_ids"]
            offsets += [(begin + start, begin + end) if end else (0, 0) for start, end in encoded["offset_mapping"]]
    before = 0
    while before < min(len(short), len(ids)) and short[before] == ids[before]:
        before += 1
    after = 0
    while after < min(len(short) - before, len(ids) - before) and short[-1 - after] == ids[-1 - after]:
        after += 1
    between = offsets[before : len(short) - after]
    # The placeholder alone may go, and white space beside it: newlines that the processor adds are joined to those of the text.
    lost = [text[start:end] for start, end in between if text[start:end].strip()]
    if len(lost) > 1:
        raise ValueError(
            f"the processor and its tokenizer disagree on a text ({len(lost)} of its {len(short)} tokens, from {lost[0]!r} "
            f"to {lost[-1]!r}), so words cannot be found in it"
        )
    return offsets[:before] + [(0, 0)] * (len(ids) - before - after) + offsets[len(short) - after :]


def collate_views(views: Sequence[Sequence[PatchLayout]]) -> list[PatchLayout]:
    """The views of each picture ─► one layout a view for the batch.

    Canvases differ in size: a smaller one gets empty cells (index −1) on the right and below. A picture that has fewer views than
    another gets an empty one, which adds nothing.
    """
    most = max(map(len, views))
    return [collate_layouts([own[v] if v < len(own) else empty_like(own[0]) for own in views]) for v in range(most)]


def empty_like(layout: PatchLayout) -> PatchLayout:
    return layout._replace(index=torch.full_like(layout.index, -1))


def collate_layouts(layouts: Sequence[PatchLayout]) -> PatchLayout:
    """One batch of layouts whose canvases differ in size."""
    height, width = (max(layout.index.shape[axis] for layout in layouts) for axis in (1, 2))
    pad = nn.functional.pad
    right, below = ([n - x.index.shape[a] for x in layouts] for n, a in ((width, 2), (height, 1)))
    return PatchLayout(
        torch.cat([pad(x.index, (0, r, 0, d), value=-1) for x, r, d in zip(layouts, right, below, strict=True)]),
        torch.cat([pad(x.resize_y, (0, d)) for x, d in zip(layouts, below, strict=True)]),
        torch.cat([pad(x.resize_x, (0, r)) for x, r in zip(layouts, right, strict=True)]),
    )


def patch_count(layout: PatchLayout) -> Float[Tensor, " b"]:
    """How many patches of a view hold the picture."""
    return (layout.index >= 0).sum((1, 2)).float()
