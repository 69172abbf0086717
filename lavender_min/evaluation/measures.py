"""Where a model looks and what it answers, measured on held-out texts whose words have exact masks.

Every model is held against the same `Sheet`: some texts about pictures, and for each word of an answer that names
something visible, where that something is (a mask) and where Stable Diffusion looked for it (a map). Maps are read while
the true answer stands as text (teacher forcing), so all models speak of the same words; answers are generated freely.

Measures are named "what.of which words": "pointing.shape", "answers.color", "mass.all".
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lavender_min.data import Example
from lavender_min.geometry import MAP_SIDE, minmax
from lavender_min.maps import MAX_ENTROPY, MapStore, StoredMaps, entropy
from lavender_min.toy.world import COLORS, SHAPES, SIZES
from lavender_min.tuning.collator import Collator, chat
from lavender_min.tuning.model import Lavender

WORD_KINDS = {"shape": set(SHAPES), "color": set(COLORS), "size": set(SIZES)}
Masks = Callable[
    [str, int], dict[tuple[str, int, int], np.ndarray]
]  # (example id, side) ─► {(field, start, end): mask}


class Sheet(NamedTuple):
    """What models are measured against: m texts, and the n words of their answers that name something visible."""

    examples: list[Example]  # m
    stored: list[StoredMaps]  # m
    place: list[tuple[int, int]]  # n: the example, and which of its answer's words; ascending
    texts: list[str]  # n
    kinds: list[str]  # n: shape, color, size, or "" for other words ("shapes")
    pictures: list[str]  # n: words of one picture share this
    masks: Bool[Tensor, "n g g"]
    maps: Float[Tensor, "n g g"]  # Stable Diffusion's, raw probabilities


def make_sheet(examples: list[Example], store: MapStore, masks_of: Masks) -> Sheet:
    """Texts whose ids differ only after the last hyphen ("heldout-00012-color") are about one picture."""
    missing = [example.id for example in examples if example.id not in store]
    if missing:
        raise ValueError(
            f"{store.path} has no maps for {len(missing)} of {len(examples)} examples, {missing[0]} the first"
        )
    stored = [store[example.id] for example in examples]
    place, texts, kinds, pictures, masks, maps = [], [], [], [], [], []
    for e, (example, row) in enumerate(zip(examples, stored, strict=True)):
        if (row.question, row.answer) != (example.question, example.answer):
            raise ValueError(
                f"the maps of {example.id} were made for {row.answer!r}, the data now says {example.answer!r}"
            )
        seen = masks_of(example.id, MAP_SIDE)
        answer = [i for i, word in enumerate(row.words) if word.field == "answer"]
        for w, i in enumerate(answer):
            word = row.words[i]
            mask = seen.get((word.field, word.start, word.end))
            if mask is not None and mask.any():
                place.append((e, w))
                texts.append(word.text)
                kinds.append(next((kind for kind, words in WORD_KINDS.items() if word.text in words), ""))
                pictures.append(example.id.rsplit("-", 1)[0])
                masks.append(torch.from_numpy(mask))
                maps.append(row.maps[i])
    if not masks:
        raise ValueError(f"no answer of the {len(examples)} examples holds a word with a mask")
    return Sheet(examples, stored, place, texts, kinds, pictures, torch.stack(masks), torch.stack(maps))


# ------------------------------------------------------------------------------------------------- asking the model


def batches(items: Sequence, size: int, what: str) -> Iterator[Sequence]:
    with tqdm(total=len(items), desc=what, unit=" texts", smoothing=0.1) as bar:
        for i in range(0, len(items), size):
            yield items[i : i + size]
            bar.update(len(items[i : i + size]))


def autocast(model: Lavender):
    """As the Trainer runs it: what is trained beside a half-precision host is kept in float32."""
    return torch.autocast(model.host.device.type, model.host.dtype, enabled=model.host.dtype != torch.float32)


def read_maps(
    model: Lavender, collate: Collator, sheet: Sheet, batch_size: int, what: str = "maps"
) -> dict[str, Float[Tensor, "n g g"]]:
    """The model's map of every word of the sheet: "own", and "aligned" if the model has an Aligner (`Lavender.read`)."""
    model.eval()
    words_of: dict[int, list[int]] = {}
    for e, w in sheet.place:
        words_of.setdefault(e, []).append(w)
    found: dict[str, list[Tensor]] = {}
    for chosen in batches(list(words_of), batch_size, what):
        rows = [(sheet.examples[e], sheet.stored[e]) for e in chosen]
        batch = collate(rows)
        collated = (batch["word_rows"] >= 0).any(-1).sum(1).tolist()
        if collated != [sum(word.field == "answer" for word in stored.words) for _, stored in rows]:
            raise ValueError("the tokenizer lost a word of an answer, so words and maps cannot be matched")
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "targets", "word_tokens")}
        with autocast(model):
            read_out = model.read(**to_device(inputs, model.host.device))
        which = [(b, w) for b, e in enumerate(chosen) for w in words_of[e]]
        b, w = torch.tensor(which).T
        for name, value in read_out.items():
            found.setdefault(name, []).append(value.float().cpu()[b, w])
    maps = {name: torch.cat(values) for name, values in found.items()}
    if not all(value.isfinite().all() for value in maps.values()):
        raise ValueError(f"{what} hold values that are not numbers: did this model's training diverge?")
    return maps


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: [x.to(device) for x in v] if isinstance(v, list) else v.to(device) for k, v in inputs.items()}


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

    Of at most `longest` tokens; by default 8 more than the longest true answer has: one that goes on is wrong already.
    """
    model.eval()
    tokenizer = processor.tokenizer
    if longest is None:
        true = [tokenizer(example.answer, add_special_tokens=False)["input_ids"] for example in examples]
        longest = 8 + max(map(len, true), default=0)
    replies: list[str] = []
    for asked in batches(examples, batch_size, what):
        prompts = [text[:start] for text, start, _ in (chat(processor, example) for example in asked)]
        inputs = processor(
            text=prompts,
            images=[[example.image()] for example in asked],
            padding=True,
            padding_side="left",  # all answers start in one column
            add_special_tokens=False,
            return_tensors="pt",
        )
        with autocast(model):
            out = model.vlm.generate(
                **to_device(dict(inputs), model.host.device),
                max_new_tokens=longest,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        replies += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


# ------------------------------------------------------------------------------------------------------- measures


def same(reply: str, truth: str) -> bool:
    """The whole answer, but for upper case and spaces."""
    return reply.lower().split() == truth.lower().split()


def answer_numbers(examples: list[Example], replies: list[str]) -> dict[str, float]:
    """The share of right answers, over all questions and by kind of question (the end of the example's id)."""
    right: dict[str, list[bool]] = {"all": []}
    for example, reply in zip(examples, replies, strict=True):
        for kind in ("all", example.id.rsplit("-", 1)[-1]):
            right.setdefault(kind, []).append(same(reply, example.answer))
    return {f"answers.{kind}": sum(hits) / len(hits) for kind, hits in right.items() if hits}


def pointing(maps: Float[Tensor, "n g g"], masks: Bool[Tensor, "n g g"]) -> Float[Tensor, " n"]:
    """1 where the map's largest cell lies in the mask, 0 where not; of equally large cells, the share that does.

    So an even map scores what a blind guess would: the mask's share of the picture.
    """
    top = maps == reduce(maps, "n y x -> n 1 1", "max")
    return (top & masks).sum((1, 2)) / top.sum((1, 2))


def mass_inside(maps: Float[Tensor, "n g g"], masks: Bool[Tensor, "n g g"]) -> Float[Tensor, " n"]:
    """The share of the map's sum that lies in the mask."""
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-30)


def alignment(
    maps: Float[Tensor, "n g g"], targets: Float[Tensor, "n g g"], masks: Bool[Tensor, "n g g"], pictures: list[str]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Mean squared error of each map against its own word's target, and against other words of the same picture.

    The second is the mean over all words whose masks do not touch this word's: those that name other things. It is NaN,
    and so is the first, where a picture has no such word, so that both are means over the same words. Maps and targets
    are min–max normalised here.
    """
    maps, targets = minmax(maps), minmax(targets)
    own, other = (torch.full((len(maps),), torch.nan) for _ in range(2))
    groups: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(picture, []).append(i)
    for members in groups.values():
        at = torch.tensor(members)
        flat = rearrange(masks[at], "n y x -> n (y x)").float()
        apart = (flat @ flat.T) == 0
        error = (maps[at][:, None] - targets[at][None]).square().mean((2, 3))  # [word, target]
        some = apart.any(1)
        own[at[some]] = error.diagonal()[some]
        other[at[some]] = ((error * apart).sum(1) / apart.sum(1))[some]
    return own, other


def by_kind(name: str, values: Float[Tensor, " n"], kinds: list[str]) -> dict[str, float]:
    """Means over all words and over those of each kind."""
    numbers = {f"{name}.all": values.mean().item()}
    for kind in WORD_KINDS:
        of_kind = values[torch.tensor([k == kind for k in kinds])]
        if len(of_kind):
            numbers[f"{name}.{kind}"] = of_kind.mean().item()
    return numbers


def map_numbers(maps: Float[Tensor, "n g g"], sheet: Sheet) -> dict[str, float]:
    """All that is measured of a model's maps."""
    numbers = by_kind("pointing", pointing(maps, sheet.masks), sheet.kinds)
    numbers |= by_kind("mass", mass_inside(maps, sheet.masks), sheet.kinds)
    numbers |= by_kind("entropy", entropy(maps), sheet.kinds)
    own, other = (x.nanmean().item() for x in alignment(maps, sheet.maps, sheet.masks, sheet.pictures))
    if own == own:  # not NaN: some picture shows two things
        numbers |= {"mse.own": own, "mse.others": other, "mse.ratio": own / max(other, 1e-12)}
    return numbers


def chance_numbers(sheet: Sheet) -> dict[str, float]:
    """What an even map scores: the masks' mean share of the picture, and the entropy ln(g²)."""
    area = reduce(sheet.masks.float(), "n y x -> n", "mean")
    numbers = by_kind("pointing", area, sheet.kinds) | by_kind("mass", area, sheet.kinds)
    return numbers | {name.replace("mass", "entropy"): MAX_ENTROPY for name in numbers if name.startswith("mass")}


def measure(
    model: Lavender, processor: Any, collate: Collator, sheet: Sheet, batch_size: int, name: str
) -> tuple[dict[str, dict[str, float]], dict[str, Float[Tensor, "n g g"]]]:
    """({"own": numbers, "aligned": numbers}, the maps themselves); the answers' numbers stand beside the host's own maps."""
    maps = read_maps(model, collate, sheet, batch_size, f"{name}: maps")
    questions = [example for example in sheet.examples if example.question]
    replies = answer(model, processor, questions, batch_size, f"{name}: answers")
    numbers = {kind: map_numbers(value, sheet) for kind, value in maps.items()}
    numbers["own"] = answer_numbers(questions, replies) | numbers["own"]
    return numbers, maps


# ------------------------------------------------------------------------------------------------------ intervals

# The upper 97.5 % point of Student's t for 1, 2, … 30 degrees of freedom (any table of the distribution).
T95 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
]  # fmt: skip


def interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half the width of its 95 % interval: t · s / √n); None where one value leaves nothing to judge by."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = T95[min(len(values) - 1, len(T95)) - 1]  # beyond the table its last value: a little too wide
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))
