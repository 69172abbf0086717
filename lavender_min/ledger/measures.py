"""What is measured of a run.

Numbers are named "split/measure.kind", such as "crowd_test/answers.all"; measures and kinds are those of `evaluation.metrics`, and
"kl". Numbers of maps behind the Aligner have "aligned." before the measure. Those of the second checkpoint have "curve2" in place
of the split.
"""

import copy
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lavender_min import data
from lavender_min.data import Example
from lavender_min.evaluation import figures, metrics, models
from lavender_min.evaluation.names import Numbers
from lavender_min.evaluation.sheet import Sheet, first_pictures, make_sheet, picture_of
from lavender_min.ledger import parts
from lavender_min.ledger.plan import Run, host_folder
from lavender_min.maps import MapStore, entropy
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags

# Texts at once.
BATCH = 50
# Bars of a histogram.
BINS = 40
# The share of the ideal attention that is spread over the whole picture. If that were 0 outside the mask, KL would be infinite.
ELSEWHERE = 0.01
# {a digest of the host and a batch: what the vision tower made of it}; see `remember`.
REMEMBERED: dict[bytes, Any] = {}


class Measured(NamedTuple):
    """What is measured. Kinds of maps are "own" and "aligned" of a host, or `Arm.maps` of a store."""

    numbers: Numbers
    # {kind of map: its `extent`}
    extents: dict[str, list[int]]
    # {kind of map: the maps of the few words that `figures.choose` picks}; at checkpoint 2 the key is "curve2/<kind>".
    shown: dict[str, Float[Tensor, "m g g"]]


def of_run(run: Run, store: Path | None, trained: Path | None, apart: Path | None = None) -> Measured:
    """All that is measured of a run: at its end on every split, and on a few scenes at each of its checkpoints.

    `store` holds Stable Diffusion's maps of the split `run.mapped`; None if no maps are read. `trained` is the folder that the
    training left; None if nothing was trained. `apart` holds the parts of a host that was put together anew (`parts`), else None.
    """
    if run.kind == "maps":
        return of_store(run.maps, sheet_of(store, run.mapped, run.measured[run.mapped], run.part), run.mapped)
    flags = runs.recall(trained) if trained else ModelFlags(vlm=str(host_folder(run.host)))
    loaded = load(flags, trained)
    found = []
    for split, scenes in run.measured.items():
        if split == run.mapped:
            found.append(of_host(loaded, sheet_of(store, split, scenes, run.part), split))
        else:
            found.append(Measured(answers(loaded, examples_of(split, scenes, run.part), split), {}, {}))
    if run.curve:
        sheet = sheet_of(store, run.mapped, run.curve)
        for number, checkpoint in enumerate(checkpoints(trained), 1):
            found.append(of_checkpoint(of_host(load(flags, checkpoint), sheet, run.mapped), f"curve{number}/"))
    if apart:
        captions = [example for example in examples_of("heldout", run.measured["pretrained"]) if not example.question]
        numbers = parts.numbers(loaded, apart, captions)
        found.append(Measured({f"pretrained/{name}": value for name, value in numbers.items()}, {}, {}))
    return Measured(
        merged([part.numbers for part in found]),
        merged([part.extents for part in found]),
        merged([part.shown for part in found]),
    )


def merged(dicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for one in dicts for name, value in one.items()}


def load(flags: ModelFlags, trained: Path | None) -> models.Loaded:
    """The host that `flags` name, in float32; as the run or checkpoint in the folder `trained` has tuned it, if given."""
    loaded = models.load(flags, torch.float32, None if trained is None else str(trained))
    if flags.mode != "full":
        remember(loaded.model.family.vision(loaded.model.base)[0], flags.vlm)
    return loaded


def remember(tower: nn.Module, host: str) -> None:
    """Makes a frozen vision tower look up what it, or the tower of another run of this process, made of the same batch.

    Scenes are measured in the same batches after every run, and more than half of the time to answer goes into the tower.
    """
    forward = tower.forward

    def recalled(*args: Any, **named: Any) -> Any:
        key = sha256(host.encode())
        for value in (*args, *named, *named.values()):
            key.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
        if key.digest() not in REMEMBERED:
            REMEMBERED[key.digest()] = forward(*args, **named)
        # A copy, because Qwen2-VL replaces a field of what it gets.
        return copy.copy(REMEMBERED[key.digest()])

    tower.forward = recalled  # type: ignore[method-assign]


def checkpoints(trained: Path | None) -> list[Path]:
    """The checkpoints of a training, by their step."""
    found = [] if trained is None else list(trained.glob("checkpoint-*"))
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def of_checkpoint(found: Measured, name: str) -> Measured:
    """What was measured of a checkpoint, without the histograms: `name`, such as "curve2/", stands in place of the split."""
    numbers = {name + key.partition("/")[2]: value for key, value in found.numbers.items()}
    return Measured(numbers, {}, {name + kind: maps for kind, maps in found.shown.items()})


def part_of(examples: list[Example], number: int, parts: int) -> list[Example]:
    """The examples of every `parts`-th picture, from picture `number` on, counted from 0."""
    pictures = list(dict.fromkeys(map(picture_of, examples)))
    chosen = set(pictures[number::parts])
    return [example for example in examples if picture_of(example) in chosen]


def examples_of(split: str, scenes: int, part: tuple[int, int] = (0, 1)) -> list[Example]:
    """The examples of the first `scenes` scenes of a split, or of a part of them (`Run.part`)."""
    return part_of(first_pictures(data.load("toy", split=split), scenes), *part)


def sheet_of(store: Path | None, split: str, scenes: int, part: tuple[int, int] = (0, 1)) -> Sheet:
    """These examples, and the words of their answers that have a region. Raises ValueError if there is no store."""
    if store is None:
        raise ValueError(f"the maps of {split} are read, and there is no store of them")
    return make_sheet(examples_of(split, scenes, part), MapStore(store))


def kl(maps: Float[Tensor, "m g g"], masks: Bool[Tensor, "m g g"]) -> Float[Tensor, " m"]:
    """KL(p ‖ p*) in nats (appendix B.4, Eq. 24 and 25): how far each map p is from the ideal attention p*.

    The paper does not know p*. Here the masks are known, so it is declared: 1 − ELSEWHERE of it is spread evenly over the mask, and
    ELSEWHERE evenly over the picture. Maps are scaled to sum to 1 first.
    """
    cells = maps[0].numel()
    p = maps.flatten(1) / maps.flatten(1).sum(1, keepdim=True).clamp(min=1e-30)
    inside = masks.flatten(1).float()
    ideal = (1 - ELSEWHERE) * inside / inside.sum(1, keepdim=True) + ELSEWHERE / cells
    return (torch.special.xlogy(p, p) - p * ideal.log()).sum(1)


def of_maps(maps: Float[Tensor, "m g g"], sheet: Sheet) -> Numbers:
    """What evaluate.py measures of maps, and KL to the mask."""
    return metrics.map_numbers(maps, sheet) | metrics.by_kind("kl", kl(maps, sheet.masks), sheet)


def extent(maps: Float[Tensor, "m g g"]) -> list[int]:
    """How many maps are spread over each of BINS equal parts of 0 … 1 of the picture.

    A map of entropy H is spread over as much as an even map of the same entropy covers: exp(H) cells. Nearly all entropies lie
    within half a nat of the largest, where this tells them apart.
    """
    share = entropy(maps).exp() / maps[0].numel()
    return torch.histc(share.clamp(max=1), BINS, 0, 1).int().tolist()


def of_store(kind: str, sheet: Sheet, split: str) -> Measured:
    """Stable Diffusion's maps (`kind` "sd") or the masks themselves ("masks"), measured as a host's maps are."""
    maps = sheet.masks.float() if kind == "masks" else sheet.maps
    numbers = {f"{split}/{name}": value for name, value in of_maps(maps, sheet).items()}
    return Measured(numbers, {kind: extent(maps)}, {kind: maps[figures.choose(sheet)]})


def of_host(loaded: models.Loaded, sheet: Sheet, split: str) -> Measured:
    """A host's maps, own and behind the Aligner if it has one, and its answers to the sheet's questions."""
    maps = models.read_maps(loaded.model, models.collator(loaded, "whole"), sheet, BATCH)
    numbers = of_maps(maps["own"], sheet)
    if "aligned" in maps:
        numbers |= {f"aligned.{name}": value for name, value in of_maps(maps["aligned"], sheet).items()}
    found = {f"{split}/{name}": value for name, value in numbers.items()} | answers(loaded, sheet.examples, split)
    extents = {name: extent(of) for name, of in maps.items()}
    chosen = figures.choose(sheet)
    return Measured(found, extents, {name: of[chosen] for name, of in maps.items()})


def answers(loaded: models.Loaded, examples: list[Example], split: str) -> Numbers:
    """The shares of the examples' questions that are answered right."""
    questions = [example for example in examples if example.question]
    replies = models.answer(loaded.model, loaded.processor, questions, BATCH)
    return {f"{split}/{name}": value for name, value in metrics.answer_numbers(questions, replies).items()}
