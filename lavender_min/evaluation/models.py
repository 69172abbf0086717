"""The models that are measured: loaded, their maps read, their answers generated.

Maps are read while the true answer stands as text (teacher forcing), so all models speak of the same words. Answers are
generated freely.

This is the only file of this folder that calls a model; the others take what it returns.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from lavender_min.data import Example
from lavender_min.evaluation.sheet import Sheet
from lavender_min.failing import naming
from lavender_min.hosts.load import load as load_host
from lavender_min.hosts.reading import Sink
from lavender_min.maps import StoredMaps
from lavender_min.tuning import runs
from lavender_min.tuning.collator import Collator, chat
from lavender_min.tuning.export import base_of
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import Lavender, per_word, word_rows

Collate = Callable[[list[tuple[Example, StoredMaps | None]]], dict[str, Any]]


class Loaded(NamedTuple):
    """A model, and what is needed to hand it texts and pictures."""

    model: Lavender
    processor: Any
    # Which rows of the text speak for a word: "predicting" or "reading" (see `tuning.collator`).
    attend: str


def load(flags: ModelFlags, dtype: torch.dtype, trained: str | None = None) -> Loaded:
    """The host that `flags` name, as it is; or as the run in the folder `trained` has tuned it."""
    if trained is not None:
        return Loaded(*runs.build(flags, dtype, trained=trained), flags.attend)
    host, processor, family = load_host(flags.vlm, quantize=flags.mode == "qlora", dtype=dtype)
    lavender = Lavender(host, family.with_latents(flags.latents), align_layers=flags.align_layers)
    return Loaded(lavender, processor, flags.attend)


def load_adapter(vlm: str | None, adapter: str | None, dtype: torch.dtype) -> Loaded:
    """A host as it is, or with an adapter: the folder of a run of train.py, or of a PEFT adapter alone.

    An adapter's folder names the host it was tuned on. `vlm`, if given, is where that host lies now.
    """
    if adapter and (Path(adapter) / runs.FLAGS_FILE).exists():
        flags = runs.recall(adapter)
        return load(dataclasses.replace(flags, vlm=vlm or flags.vlm), dtype, adapter)
    tuned_on = base_of(Path(adapter)) if adapter else None
    host, processor, family = load_host(str(vlm or tuned_on), dtype=dtype)
    if adapter:
        with naming(adapter):
            host = PeftModel.from_pretrained(host, adapter)
    return Loaded(Lavender(host, family), processor, "predicting")


def collator(loaded: Loaded, frame: str) -> Collator:
    """Makes batches whose words are those of the answers."""
    model = loaded.model
    return Collator(loaded.processor, model.family, model.base.config, frame, "answer", loaded.attend)


def half_of_gpu() -> torch.dtype:
    """As in train.py: bf16 on a GPU that has it, fp16 on one that has not, float32 without a GPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# ------------------------------------------------------------------------------------------------------------ maps


@torch.no_grad()
def maps_of_batch(model: Lavender, batch: dict[str, Any]) -> dict[str, Float[Tensor, "m g g"]]:
    """The maps of a collated batch, on the CPU: "own", and "aligned" if the model has an Aligner (`Lavender.read`)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with autocast(model):
        found = model.read(**to_device(inputs, model.base.device))
    return {name: maps.float().cpu() for name, maps in found.items()}


@torch.no_grad()
def heads_of_batch(model: Lavender, batch: dict[str, Any]) -> Float[Tensor, "m l h g g"]:
    """The maps of a collated batch in every layer that is read and every head, on the CPU. Their mean is "own"."""
    batch = to_device(batch, model.base.device)
    words, inputs = word_rows(batch["words"]), {k: v for k, v in batch.items() if k not in ("words", "labels")}
    sink = Sink(model.family, words, model.layers, None, lambda maps: maps)
    with autocast(model):
        model.family.hidden_states(model.base, inputs, sink)
    return torch.stack([per_word(maps, words.lengths) for maps in sink.own_maps.values()], 1).float().cpu()


def words_of_batch(batch: dict[str, Any]) -> list[int]:
    """How many words each text of a collated batch has."""
    words, b = batch["words"], len(batch["input_ids"])
    last_rows = words["lengths"].cumsum(0) - 1
    spoken = last_rows[words["tokens"][last_rows] >= 0]
    return torch.bincount(words["texts"][spoken], minlength=b).tolist()


def read_maps(
    model: Lavender, collate: Collate, sheet: Sheet, batch_size: int, what: str = "maps"
) -> dict[str, Float[Tensor, "m g g"]]:
    """The model's maps of every word of the sheet, by name as in `maps_of_batch`. `what` labels the progress bar."""
    model.eval()
    words_of: dict[int, list[int]] = {}
    for e, w in sheet.place:
        words_of.setdefault(e, []).append(w)
    found: dict[str, list[Tensor]] = {}
    for chosen in batches(list(words_of), batch_size, what):
        batch = collate([(sheet.examples[e], sheet.stored[e]) for e in chosen])
        counts = words_of_batch(batch)
        if counts != [sum(w.field == "answer" for w in sheet.stored[e].words) for e in chosen]:
            raise ValueError("the tokenizer lost a word of an answer, so words and maps cannot be matched")
        first = [0, *accumulate(counts)]
        which = [first[b] + w for b, e in enumerate(chosen) for w in words_of[e]]
        for name, maps in maps_of_batch(model, batch).items():
            found.setdefault(name, []).append(maps[which])
    whole = {name: torch.cat(maps) for name, maps in found.items()}
    if not all(maps.isfinite().all() for maps in whole.values()):
        raise ValueError(f"{what} hold values that are not numbers: did this model's training diverge?")
    return whole


# --------------------------------------------------------------------------------------------------------- answers


@torch.no_grad()
def answer(
    model: Lavender,
    processor: Any,
    examples: list[Example],
    batch_size: int,
    what: str = "answers",
    longest: int | None = None,
) -> list[str]:
    """The model's greedy answer to each example's question, from the chat prompt it was tuned with.

    An answer is cut after `longest` tokens. The default is 8 more than the longest true answer has: an answer that is
    longer than that is wrong already.
    """
    model.eval()
    tokenizer = processor.tokenizer
    if longest is None:
        true = [tokenizer(example.answer, add_special_tokens=False)["input_ids"] for example in examples]
        longest = 8 + max(map(len, true), default=0)
    replies: list[str] = []
    for some in batches(examples, batch_size, what):
        prompts, pictures = [prompt_of(processor, example) for example in some], [example.image() for example in some]
        # Padded on the left, so that all answers begin in one column.
        inputs = model.family.encode(processor, prompts, pictures, padding_side="left").inputs
        with autocast(model):
            out = model.host.generate(
                **to_device(inputs, model.base.device),
                max_new_tokens=longest,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        replies += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def prompt_of(processor: Any, example: Example) -> str:
    """The conversation as it stands before the answer."""
    said = chat(processor, example)
    return said.text[: said.answer_start]


# --------------------------------------------------------------------------------------------------------- batches


def batches(items: Sequence, size: int, what: str) -> Iterator[Sequence]:
    with tqdm(total=len(items), desc=what, unit=" texts", smoothing=0.1) as bar:
        for i in range(0, len(items), size):
            yield items[i : i + size]
            bar.update(len(items[i : i + size]))


def autocast(model: Lavender) -> AbstractContextManager:
    """As the Trainer runs it: what is trained beside a half-precision host is kept in float32."""
    return torch.autocast(model.base.device.type, model.base.dtype, enabled=model.base.dtype != torch.float32)


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
