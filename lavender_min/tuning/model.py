"""Lavender: a vision-language model and, beside it, what aligns its attention; one forward gives the two losses.

    loss = cross entropy + λ · mean over words of ‖Aligner(A_VLM) − A_SD‖²                                (paper, Eq. 10)

Everything trainable is called from inside this one forward, because FSDP and DDP only know of what happens there. With
`align=None` it is plain fine-tuning, and λ = 0 gives bit-equal updates of the host.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lavender_min.align import layers
from lavender_min.align.aligner import Align
from lavender_min.geometry import PatchLayout, minmax
from lavender_min.hosts.base import Family, WordRows
from lavender_min.hosts.reading import Sink
from lavender_min.tuning.grammar import SameRoot


class Predicted(NamedTuple):
    """What the host says at the rows where logits are wanted."""

    wanted: Bool[Tensor, "b t"]
    logits: Float[Tensor, "wanted vocabulary"]  # of those rows, text after text


class Lavender(nn.Module):
    """`host` is hooked (see `hosts.reading`), with or without PEFT adapters; `align` is trained beside it and left behind.

    `match` says which words are aligned: "all"; "exact", those that the host predicts right; or a function that says whether two
    words have the same root, for which it is enough to predict another form of the word. `align_layers` says which layers are
    read (see `align.layers`), with or without alignment: compared models must be read in the same ones.
    """

    def __init__(
        self,
        host: Any,
        family: Family,
        align: Align | None = None,
        lambda_att: float = 10.0,
        match: str | SameRoot = "exact",
        align_layers: str = "",
    ):
        super().__init__()
        self.host: Any = host
        self.family, self.align = family, align
        self.lambda_att, self.match = lambda_att, match
        self.layers = list(read_layers(family, self.base, align_layers))
        # Of the cross entropy, in training; what is measured stays plain.
        self.label_smoothing = 0.0

    @property
    def base(self) -> Any:
        """The host without its adapters' wrapping."""
        return self.host.get_base_model() if hasattr(self.host, "get_base_model") else self.host

    @property
    def config(self) -> Any:
        """The host's. The Trainer looks here for it, and for the embeddings."""
        return self.base.config

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def forward(
        self,
        labels: Int[Tensor, "b t"],
        words: dict[str, Any],
        num_items_in_batch: Tensor | int | float | None = None,
        accumulation_steps: int = 1,
        lambda_scale: float = 1.0,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """The losses of a batch, as `loss`, `loss_vlm`, `loss_att`, and `words`, how many words of it were aligned.

        `labels` are −100 where nothing is to be learnt. `words` are the fields of a WordRows (Trainer, DDP and FSDP carry a dict,
        but no NamedTuple). `loss_vlm` is summed over labels and divided by `num_items_in_batch`, the labels of a whole accumulated
        batch, as the Trainer counts them; `loss_att` is a mean, so it is divided by `accumulation_steps` before it joins the loss.
        `lambda_scale` is what λ is multiplied by in this step (see `schedules`).
        """
        align, spoken = self.align, word_rows(words)
        sink = None if align is None else self.sink(spoken, self.layers if align.how.reads == "host" else [])
        hidden = self.family.hidden_states(self.base, inputs, sink)

        next_token = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        wanted = next_token != -100
        if align is not None and self.match != "all":
            wanted = wanted | self.predictors(spoken, labels)
        predicted = Predicted(wanted, self.family.logits(self.base, hidden[wanted]))
        expected = next_token[wanted]
        total = nn.functional.cross_entropy(
            predicted.logits.float(),
            expected,
            ignore_index=-100,
            reduction="sum",
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )
        count = num_items_in_batch if num_items_in_batch is not None else (expected != -100).sum().clamp(min=1)
        loss_vlm = total / count
        if align is None or sink is None:
            return {"loss": loss_vlm, "loss_vlm": loss_vlm.detach()}

        valid = self.matched(predicted, inputs["input_ids"], spoken)
        with without_autocast(hidden):
            trust = spoken.trust * valid
            loss_att = align.loss(self.word_maps(align, sink), spoken.targets, trust)
        loss = loss_vlm + self.lambda_att * lambda_scale * loss_att / accumulation_steps
        return {"loss": loss, "loss_vlm": loss_vlm.detach(), "loss_att": loss_att.detach(), "words": (trust > 0).sum()}

    def sink(self, words: WordRows, own: list[int]) -> Sink:
        """Collects what is aligned: the maps of parallel attention, and of these layers' own, their heads pooled."""
        assert self.align is not None
        return Sink(self.family, words, own, self.align.parallel, self.align.pool_heads)

    @staticmethod
    def word_maps(align: Align, sink: Sink) -> Float[Tensor, "m c g g"]:
        """Layers pooled; a word of several tokens is the mean of its rows."""
        return per_word(align.pool_layers(sink.own_maps, sink.parallel_maps), sink.words.lengths)

    @staticmethod
    def predictors(words: WordRows, labels: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """The rows whose logits say whether a mapped word is predicted: one before each of its tokens."""
        before = words.tokens.long() - 1
        rows = torch.zeros(labels.shape[0], labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        # A row that speaks for no token goes to an extra column.
        rows[words.texts, before.where(before >= 0, labels.shape[1])] = True
        return rows[:, :-1]

    def matched(self, predicted: Predicted, input_ids: Int[Tensor, "b t"], words: WordRows) -> Bool[Tensor, " m"]:
        """`exact`: the words all of whose tokens the teacher-forced argmax gets right (paper, 6: exact word match).

        With a function in place of a name, those too of which it says another form (see `by_root`).
        """
        real, tokens = words.tokens >= 0, words.tokens.long().clamp(min=0)
        if self.match == "all":
            return every(real, words.lengths)
        guess = torch.full_like(input_ids, -1)
        guess[predicted.wanted] = predicted.logits.argmax(-1)
        # said[b, i]: what the host says in place of token i. Before the first nothing is said.
        said = nn.functional.pad(guess[:, :-1], (1, 0), value=-1)[words.texts, tokens].where(real, -1)
        own = input_ids[words.texts, tokens]
        exact = every(said == own, words.lengths)
        return exact if isinstance(self.match, str) else exact | by_root(said, own, words.lengths, self.match)

    @torch.no_grad()
    def read(self, words: dict[str, Any], **inputs: Any) -> dict[str, Float[Tensor, "m g g"]]:
        """Word maps for pictures and measures: `own`, the host's attention, mean over the read layers and all heads, in units of
        uniform attention; and, if there is an Aligner, `aligned`, what it makes of its input, in [0, 1].
        """
        align = self.align
        # Heads are kept: pooled as the Aligner takes them, "own" would depend on --aggregate, and runs could not be compared.
        parallel = None if align is None else align.parallel
        sink = Sink(self.family, word_rows(words), self.layers, parallel, lambda maps: maps)
        self.family.hidden_states(self.base, inputs, sink)
        own = torch.stack(list(sink.own_maps.values())).mean(0)
        found = {"own": per_word(own, sink.words.lengths).mean(1)}
        if align is not None:
            for maps in (sink.own_maps, sink.parallel_maps):
                maps.update({layer: align.pool_heads(of) for layer, of in maps.items()})
            found["aligned"] = minmax(align.aligner.predict(self.word_maps(align, sink)))
        return found

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **options) -> None:
        """Non-reentrant only: the reentrant kind drops the gradient of a tensor that leaves through the sink.

        It also makes every embedding's output require gradients, the vision patches' too, so that a frozen vision tower would
        build a graph; the non-reentrant kind does not need that.
        """
        kwargs = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        self.base.gradient_checkpointing_enable(kwargs, **options)
        self.base.disable_input_require_grads()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **options) -> None:
        """The same under the name that newer versions of transformers give it."""
        kwargs = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        self.base.activation_checkpointing_enable(kwargs, **options)
        self.base.disable_input_require_grads()


def read_layers(family: Family, host: Any, align_layers: str) -> dict[int, Any]:
    """The attention modules that are read, by index. "" stands for the family's default."""
    seeing = family.layers(host)
    return {i: seeing[i] for i in layers.choose(align_layers or family.align_layers, list(seeing))}


def word_rows(words: dict[str, Any]) -> WordRows:
    """The dict that a batch carries, typed again."""
    return WordRows(**{**words, "views": [PatchLayout(*view) for view in words["views"]]})


def per_word(maps: Float[Tensor, "n c g g"], lengths: Int[Tensor, " m"]) -> Float[Tensor, "m c g g"]:
    """The mean over each word's rows."""
    return torch.segment_reduce(maps, "mean", lengths=lengths.long(), axis=0)


def every(holds: Bool[Tensor, " n"], lengths: Int[Tensor, " m"]) -> Bool[Tensor, " m"]:
    """Whether something holds at every row of each word."""
    return torch.segment_reduce(holds.float(), "min", lengths=lengths.long()) > 0


def by_root(
    said: Int[Tensor, " n"], own: Int[Tensor, " n"], lengths: Int[Tensor, " m"], same_root: SameRoot
) -> Bool[Tensor, " m"]:
    """The words in whose place the host says another form of them (paper, 7.1: root word match).

    `own` are the tokens of the words, `said` what the host says in place of each. Teacher forcing shows what it says up to the
    first token that differs, and no further: after that it has read the word's own tokens, not what it said. So for "dog|s" it
    may say "dog" and the next word, and for "do|g" the one token "dogs"; what it says in more tokens stays half heard.
    """
    counts = lengths.tolist()
    found = []
    for rows in zip(said.cpu().split(counts), own.cpu().split(counts), strict=True):
        heard, word = (tokens.tolist() for tokens in rows)
        # A word whose every token is right is no other form, and one without rows says −1.
        wrong = next((i for i, token in enumerate(word) if heard[i] != token), None)
        found.append(wrong is not None and heard[wrong] >= 0 and same_root(heard[: wrong + 1], word))
    return torch.tensor(found, device=said.device)


def without_autocast(like: Tensor):
    """Maps are small numbers and small tensors: the Aligner runs in float32 whatever the host runs in."""
    return torch.autocast(like.device.type, enabled=False)
