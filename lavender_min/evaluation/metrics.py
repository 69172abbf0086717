"""What is measured of a model's word maps and of its answers.

Numbers are named "what.of which words": "pointing.shape", "answers.color", "mass.all".
"""

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from lavender_min.data import Example
from lavender_min.evaluation.names import Numbers
from lavender_min.evaluation.sheet import Sheet
from lavender_min.geometry import minmax
from lavender_min.maps import MAX_ENTROPY, entropy

# --------------------------------------------------------------------------------------------------------- answers


def same(reply: str, truth: str) -> bool:
    """Whether the whole answer is right. Upper case and spaces do not count."""
    return reply.lower().split() == truth.lower().split()


def answer_numbers(examples: list[Example], replies: list[str]) -> Numbers:
    """The share of right answers, over all questions and by kind of question (`Example.kind`)."""
    right: dict[str, list[bool]] = {"all": []}
    for example, reply in zip(examples, replies, strict=True):
        for kind in ("all", *([example.kind] if example.kind else [])):
            right.setdefault(kind, []).append(same(reply, example.answer))
    return {f"answers.{kind}": sum(hits) / len(hits) for kind, hits in right.items() if hits}


# ------------------------------------------------------------------------------------------------------------ maps


def pointing(maps: Float[Tensor, "m g g"], masks: Bool[Tensor, "m g g"]) -> Float[Tensor, " m"]:
    """The pointing game: 1 if the map's largest cell lies in the mask, 0 if not.

    Where several cells are equally large, the result is the share of them that lies in the mask. So an even map scores
    the mask's share of the picture, as a blind guess would.
    """
    top = maps == reduce(maps, "n y x -> n 1 1", "max")
    return (top & masks).sum((1, 2)) / top.sum((1, 2))


def mass_inside(maps: Float[Tensor, "m g g"], masks: Bool[Tensor, "m g g"]) -> Float[Tensor, " m"]:
    """The share of the map's sum that lies in the mask."""
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-30)


def alignment(
    maps: Float[Tensor, "m g g"], targets: Float[Tensor, "m g g"], masks: Bool[Tensor, "m g g"], pictures: list[str]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Mean squared error of each map against its own word's target, and against other words' targets.

    The other words are those of the same picture whose masks do not touch this word's: words that name other things.
    The second result is the mean over them. Where a picture has no such word both results are NaN, so that both are
    means over the same words. Maps and targets are min–max normalised here.
    """
    maps, targets = minmax(maps), minmax(targets)
    own, others = (torch.full((len(maps),), torch.nan) for _ in range(2))
    groups: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(picture, []).append(i)
    for members in groups.values():
        at = torch.tensor(members)
        flat = rearrange(masks[at], "n y x -> n (y x)").float()
        apart = (flat @ flat.T) == 0
        # [word whose map it is, word whose target it is]
        error = (maps[at][:, None] - targets[at][None]).square().mean((2, 3))
        some = apart.any(1)
        own[at[some]] = error.diagonal()[some]
        others[at[some]] = ((error * apart).sum(1) / apart.sum(1))[some]
    return own, others


def by_kind(name: str, values: Float[Tensor, " m"], sheet: Sheet) -> Numbers:
    """The mean of a measure over all words, and over those of each kind."""
    numbers = {f"{name}.all": values.mean().item()}
    for kind in sheet.kind_order:
        of_kind = values[torch.tensor([k == kind for k in sheet.kinds])]
        if len(of_kind):
            numbers[f"{name}.{kind}"] = of_kind.mean().item()
    return numbers


def map_numbers(maps: Float[Tensor, "m g g"], sheet: Sheet) -> Numbers:
    """All that is measured of a model's maps."""
    numbers = by_kind("pointing", pointing(maps, sheet.masks), sheet)
    numbers |= by_kind("mass", mass_inside(maps, sheet.masks), sheet)
    numbers |= by_kind("entropy", entropy(maps), sheet)
    own, others = alignment(maps, sheet.maps, sheet.masks, sheet.pictures)
    # If no picture shows two things, no word has others to compare with.
    if not own.isnan().all():
        mse, mse_others = own.nanmean().item(), others.nanmean().item()
        numbers |= {"mse.own": mse, "mse.others": mse_others, "mse.ratio": mse / max(mse_others, 1e-12)}
    return numbers


def chance_numbers(sheet: Sheet) -> Numbers:
    """What an even map scores: the masks' mean share of the picture, and the entropy ln(g²)."""
    area = reduce(sheet.masks.float(), "n y x -> n", "mean")
    numbers = by_kind("pointing", area, sheet) | by_kind("mass", area, sheet)
    return numbers | {name.replace("mass", "entropy"): MAX_ENTROPY for name in numbers if name.startswith("mass")}
