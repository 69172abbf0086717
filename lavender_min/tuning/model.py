"""Lavender: a vision-language model and, beside it, what aligns its attention; one forward gives the two losses.

    loss = cross entropy + λ · mean over words of ‖Aligner(A_VLM) − A_SD‖²                                (paper, Eq. 10)

Everything trainable is called from inside this one forward, because FSDP and DDP only know of what happens there. With
`align=None` it is plain fine-tuning, and λ = 0 gives bit-equal updates of the host.
"""

from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lavender_min.align.aligner import Align, without_autocast
from lavender_min.geometry import PatchLayout, minmax
from lavender_min.hosts.base import Sink, patch_count

MATCHES = ("exact", "all")


class Lavender(nn.Module):
    """`vlm` is a hooked host (see `hosts`), with or without PEFT adapters; `align` is trained beside it and left behind."""

    def __init__(self, vlm: Any, align: Align | None = None, lambda_att: float = 10.0, match: str = "exact"):
        super().__init__()
        if match not in MATCHES:
            raise ValueError(f"--match is one of {', '.join(MATCHES)}, got {match!r}")
        self.vlm: Any = vlm
        self.align = align
        self.lambda_att, self.match = lambda_att, match

    @property
    def host(self) -> Any:
        """The model under the adapters."""
        return self.vlm.get_base_model() if hasattr(self.vlm, "get_base_model") else self.vlm

    def forward(
        self,
        labels: Int[Tensor, "b t"],
        word_rows: Int[Tensor, "b w k"],
        word_tokens: Int[Tensor, "b w k"],
        targets: Float[Tensor, "b w g g"],
        layout: list[Tensor],
        num_items_in_batch: Tensor | int | None = None,
        accumulation_steps: int = 1,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a batch, as `loss`, `loss_vlm`, `loss_att`, and `words`, the matched words of it.

        `labels` are −100 where nothing is asked. Row `word_rows[b, w, k]` attends for token `word_tokens[b, w, k]` of word w;
        both are −1 where the word has fewer tokens. `targets` lie in [0, 1]. `layout` holds a PatchLayout's three tensors.
        `loss_vlm` is summed over labels and divided by `num_items_in_batch`, the labels of a whole accumulated batch, as the
        Trainer counts them; `loss_att` is a mean, so it is divided by `accumulation_steps` before it joins the loss.
        """
        align = self.align
        sink = self.sink(word_rows, PatchLayout(*layout)) if align is not None else None
        hidden = self.host.model(**inputs, use_cache=False, **({"sink": sink} if sink else {})).last_hidden_state

        # Logits (vocabulary 128,256) only where something is asked: at rows that predict a label or a mapped word's token.
        next_token = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        asked = next_token != -100
        if align is not None and self.match != "all":
            asked = asked | self.predictors(word_tokens, labels)
        logits = self.host.lm_head(hidden[asked])
        expected = next_token[asked]
        total = nn.functional.cross_entropy(logits.float(), expected, ignore_index=-100, reduction="sum")
        count = num_items_in_batch if num_items_in_batch is not None else (expected != -100).sum().clamp(min=1)
        loss_vlm = total / count
        if align is None or sink is None:
            return {"loss": loss_vlm, "loss_vlm": loss_vlm.detach()}

        exists = (word_rows >= 0).any(-1)  # [b, w]
        valid = exists & self.matched(logits, asked, inputs["input_ids"], word_tokens)
        if not exists.any():
            exists = torch.zeros_like(exists)
            exists[0, 0] = True  # one empty word: the Aligner then still gets (zero) gradients, as DDP wants
        with without_autocast(hidden):
            words = self.word_maps(align, sink, word_rows)
            loss_att = align.loss(words[exists], targets[exists], valid[exists])
        loss = loss_vlm + self.lambda_att * loss_att / accumulation_steps
        return {"loss": loss, "loss_vlm": loss_vlm.detach(), "loss_att": loss_att.detach(), "words": valid.sum()}

    def sink(self, word_rows: Int[Tensor, "b w k"], layout: PatchLayout, own: bool = False) -> Sink:
        tokens = rearrange(word_rows, "b w k -> b (w k)").int()
        parallel = self.align.parallel if self.align is not None else None
        return Sink(tokens, layout, own or parallel is None, parallel)

    @staticmethod
    def word_maps(align: Align, sink: Sink, word_rows: Int[Tensor, "b w k"]) -> Float[Tensor, "b w h g g"]:
        """Layers pooled, a word of several tokens the mean of its rows, in units of uniform attention."""
        return per_word(align.pooled(sink.own_maps, sink.parallel_maps), word_rows, sink.layout)

    @staticmethod
    def predictors(word_tokens: Int[Tensor, "b w k"], labels: Tensor) -> Bool[Tensor, "b t"]:
        """The rows whose logits say whether a mapped word is predicted: one before each of its tokens."""
        before = rearrange(word_tokens, "b w k -> b (w k)") - 1
        rows = torch.zeros(labels.shape[0], labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        rows.scatter_(1, before.where(before >= 0, labels.shape[1]).long(), True)  # padding goes to an extra column
        return rows[:, :-1]

    def matched(self, logits, asked, input_ids, word_tokens) -> Bool[Tensor, "b w"]:
        """`exact`: the words all of whose tokens the teacher-forced argmax gets right (paper, 6: exact word match)."""
        real = word_tokens >= 0
        if self.match == "all":
            return real.any(-1)
        guess = torch.full_like(input_ids, -1)
        guess[asked] = logits.argmax(-1)
        right = nn.functional.pad(guess[:, :-1] == input_ids[:, 1:], (1, 0))  # right[b, i]: token i was predicted
        at = rearrange(word_tokens, "b w k -> b (w k)").long().clamp(min=0)
        per_token = rearrange(right.gather(1, at), "b (w k) -> b w k", w=word_tokens.shape[1])
        return (per_token | ~real).all(-1) & real.any(-1)

    @torch.no_grad()
    def read(self, word_rows: Tensor, layout: list[Tensor], **inputs: Tensor) -> dict[str, Float[Tensor, "b w g g"]]:
        """Word maps for pictures and measures: `own`, the host's attention, mean over layers and heads, in units of uniform
        attention; and, if there is an Aligner, `aligned`, what it makes of its input, in [0, 1].
        """
        sink = self.sink(word_rows, PatchLayout(*layout), own=True)
        self.host.model(**inputs, use_cache=False, sink=sink)
        own = per_word(torch.stack(list(sink.own_maps.values())).mean(0), word_rows, sink.layout)
        maps = {"own": own.mean(2)}
        if self.align is not None:
            words = self.word_maps(self.align, sink, word_rows)
            maps["aligned"] = minmax(self.align.aligner.predict(words.flatten(0, 1)).unflatten(0, words.shape[:2]))
        return maps

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Non-reentrant only: the reentrant kind drops the gradient of a tensor that leaves through the sink.

        It also makes every embedding's output require gradients, the vision patches' too, so that a frozen vision tower would
        build a graph; the non-reentrant kind does not need that.
        """
        self.host.gradient_checkpointing_enable({**(gradient_checkpointing_kwargs or {}), "use_reentrant": False})
        self.host.disable_input_require_grads()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **options) -> None:
        """The same under the name, and with the options, that newer versions of transformers give it."""
        kwargs = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        self.host.activation_checkpointing_enable(kwargs, **options)
        self.host.disable_input_require_grads()


def per_word(
    maps: Float[Tensor, "b n h g g"], word_rows: Int[Tensor, "b w k"], layout: PatchLayout
) -> Float[Tensor, "b w h g g"]:
    """The mean over a word's rows, times the number of patches: 1 where attention is spread evenly over the canvas."""
    real = (word_rows >= 0).float()
    share = real / real.sum(-1, keepdim=True).clamp(min=1) * rearrange(patch_count(layout), "b -> b 1 1")
    rows = rearrange(maps, "b (w k) h y x -> b w k h y x", w=word_rows.shape[1])
    return einsum(rows, share, "b w k h y x, b w k -> b w h y x")
