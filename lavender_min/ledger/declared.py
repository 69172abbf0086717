"""The declarations of experiments/*.toml, read through the shapes below."""

import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lavender_min.failing import naming, shaped
from lavender_min.ledger.verdicts import Contrast

FOLDER = Path(__file__).parent / "experiments"
SHARED = "shared.toml"
# Flags of train.py.
Values = dict[str, Any]


class Arm(NamedTuple):
    """One way to tune a host, or something that is measured as it is."""

    about: str
    # Another arm, from which it takes over whatever it does not say itself.
    like: str = ""
    # sd: Stable Diffusion's; masks: exact; sd-swapped: Stable Diffusion's with two of the four tiles exchanged.
    maps: Literal["sd", "masks", "sd-swapped"] = "sd"
    # The choice whose best trial gives the flags that `flags` leaves open.
    choice: str = ""
    flags: Values = {}
    # Several trainings, each of which goes on with what the one before it left, and what each changes of `flags`.
    stages: list[Values] = []
    # What is measured: a host after training, a host as it is, or a store of maps.
    measured: Literal["tuned", "untuned", "maps"] = "tuned"


class Choice(NamedTuple):
    """Settings that are chosen once, by the answers on a validation split, each time among the same number of trials."""

    about: str
    # The arm that is tried, its `choice` left out.
    arm: str
    trials: list[Values]


class Pace(NamedTuple):
    """Seconds on one core, measured: from these the planned time is computed."""

    start: float
    step: float
    answer: float
    # Of one text whose maps are read.
    maps: float


class Setup(NamedTuple):
    """What all experiments share."""

    hosts: dict[str, str]
    seeds: list[int]
    # Scenes of each split whose questions are answered. Maps are read on the first.
    measured: dict[str, int]
    # Scenes of the first of them that are measured at each checkpoint, of these arms.
    curve_scenes: int
    curves: list[str]
    # The split that choices are made on, its scenes, and their seed.
    validation: dict[str, int]
    choice_seed: int
    common: Values
    # What arms have that train adapters, all but those with --full.
    adapters: Values
    choices: dict[str, Choice]
    arms: dict[str, Arm]
    pace: dict[str, Pace]


class Claim(NamedTuple):
    """What is claimed, and what would count as holding."""

    number: int
    title: str
    # The figure or sentence of the paper that it answers.
    paper: str
    hosts: list[str] = []
    # In the table, beside the arms of its contrasts.
    arms: list[str] = []
    # The measures in the table.
    shown: list[str] = []
    contrasts: list[Contrast] = []
    # What it would need that is not shipped; it is not run then.
    needs: str = ""
    note: str = ""
    # The arms that plain tuning and exact masks stand for in its table.
    plain: str = "plain"
    oracle: str = "oracle"

    @property
    def needed(self) -> list[str]:
        """The names of all its arms, each once."""
        if self.needs:
            return []
        compared = [arm for contrast in self.contrasts for arm in (*contrast.plus, *contrast.minus)]
        return list(dict.fromkeys([self.plain, self.oracle, *self.arms, *compared]))


def read_toml(file: Path, shape: Any) -> Any:
    with naming(file):
        return shaped(tomllib.loads(file.read_text(encoding="utf-8")), shape, file)


def setup(quick: bool = False, folder: Path = FOLDER) -> Setup:
    """Raises ValueError, which names the file, for what cannot be. `quick` takes what stands under [quick] instead."""
    file = folder / SHARED
    with naming(file):
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        changed = content.pop("quick", {})
        if quick:
            for name, value in changed.items():
                content[name] = {**content[name], **value} if name == "common" else value
        found: Setup = shaped(content, Setup, file)
        arms = {name: inherited(found.arms, name) for name in found.arms}
        for name, arm in arms.items():
            if arm.choice and arm.choice not in found.choices:
                raise ValueError(f"arm {name}: there is no choice {arm.choice}")
        if lost := [host for host in found.hosts if host not in found.pace]:
            raise ValueError(f"pace: the seconds of {', '.join(lost)} are missing")
    return found._replace(arms=arms)


def inherited(arms: dict[str, Arm], name: str) -> Arm:
    """The arm with all that it takes over."""
    if name not in arms:
        raise ValueError(f"there is no arm {name}")
    arm = arms[name]
    if not arm.like:
        return arm
    base = inherited(arms, arm.like)
    own = {field: value for field, value in arm._asdict().items() if value != Arm._field_defaults.get(field, "")}
    return base._replace(**{**own, "like": "", "flags": {**base.flags, **arm.flags}})


def claims(setup: Setup, only: int | None = None, folder: Path = FOLDER) -> list[Claim]:
    """All claims by number, or the one with that number. Raises ValueError, which names the file, for what cannot be."""
    found: list[Claim] = []
    for file in sorted(folder.glob("*.toml")):
        if file.name != SHARED:
            claim: Claim = read_toml(file, Claim)
            with naming(file):
                check(claim, setup)
            found.append(claim)
    found.sort(key=lambda claim: claim.number)
    if only is not None and only not in [claim.number for claim in found]:
        raise ValueError(f"--only {only}: the claims are {', '.join(str(claim.number) for claim in found)}")
    return [claim for claim in found if only in (None, claim.number)]


def check(claim: Claim, setup: Setup) -> None:
    for arm in claim.needed:
        if arm not in setup.arms:
            raise ValueError(f"there is no arm {arm}")
    for host in claim.hosts:
        if host not in setup.hosts:
            raise ValueError(f"there is no host {host}")
    if not claim.needs and not (claim.contrasts and claim.shown and claim.hosts):
        raise ValueError("a claim that can be run has hosts, contrasts, and measures that are shown")
