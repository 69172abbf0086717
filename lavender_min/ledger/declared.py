"""The declarations in experiments/*.toml: shared.toml is read as a `Setup`, every other file as a `Claim`."""

import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lavender_min.failing import naming, shaped
from lavender_min.ledger.verdicts import Contrast

FOLDER = Path(__file__).parent / "experiments"
SHARED = "shared.toml"
# {flag of train.py: value}, without the dashes.
Values = dict[str, Any]


class Arm(NamedTuple):
    """One way to tune a host; or, if it is not `tuned`, what tuned hosts are compared with."""

    # What tables and figures call it.
    about: str
    # Another arm, from which this one takes whatever it does not say itself (see `inherited`).
    like: str = ""
    # The targets. sd: Stable Diffusion's maps; masks: exact masks; sd-swapped: sd with two of the four tiles exchanged.
    maps: Literal["sd", "masks", "sd-swapped"] = "sd"
    # The name of a `Choice`. Its best trial gives flags, which `flags` may override.
    choice: str = ""
    flags: Values = {}
    # Several trainings in a row, each of which continues the one before; an entry holds what its training changes of `flags`. With
    # "assemble" it begins with another host instead (`parts`).
    stages: list[Values] = []
    # How often --max_steps they have in all.
    times: int = 1
    # What is measured: a host after tuning, a host as it is, or the maps themselves.
    measured: Literal["tuned", "untuned", "maps"] = "tuned"


class Choice(NamedTuple):
    """Flags that are chosen once a host, by the most right answers on the validation split."""

    about: str
    # The arm that is run with each trial's flags.
    arm: str
    # As many in every choice, so that no arm is tried more often than another.
    trials: list[Values]


class Pace(NamedTuple):
    """How many seconds things take with a host on one core. They were measured, and `plan.seconds` computes with them."""

    # What every run takes once, such as loading the host.
    start: float
    # One training step.
    step: float
    # One question answered.
    answer: float
    # One text whose maps are read.
    maps: float


class Setup(NamedTuple):
    """What all claims share: shared.toml."""

    # {folder in toy/models: kind of host}
    hosts: dict[str, str]
    seeds: list[int]
    # {split: number of scenes}: what is measured when a run ends. All questions are answered, and maps are read on the first split.
    measured: dict[str, int]
    # The arms that are measured at each checkpoint too, and on how many scenes of the first split.
    curve_scenes: int
    curves: list[str]
    # {split: number of scenes}, one entry: where choices are made, by runs that all have the seed `choice_seed`.
    validation: dict[str, int]
    choice_seed: int
    # Flags of every training.
    common: Values
    # Flags of every training without --full: those that train adapters.
    adapters: Values
    choices: dict[str, Choice]
    arms: dict[str, Arm]
    pace: dict[str, Pace]


class Claim(NamedTuple):
    """What is claimed, and what would count as holding: one file."""

    number: int
    title: str
    # The figure or section of the paper whose claim this is.
    paper: str
    hosts: list[str]
    # Columns of its table: names of measures (see `measures`).
    shown: list[str]
    contrasts: list[Contrast]
    # Rows of its table, beside the arms of its contrasts.
    arms: list[str] = []
    # What a reader must know, printed behind the verdict.
    note: str = ""
    # Its arms of plain tuning and of exact masks as targets: those that are tuned on as many scenes as its other arms.
    plain: str = "plain"
    oracle: str = "oracle"

    @property
    def needed(self) -> list[str]:
        """The names of all arms to be run for it, each once."""
        compared = [arm for contrast in self.contrasts for arm in (*contrast.plus, *contrast.minus)]
        return list(dict.fromkeys([self.plain, self.oracle, *self.arms, *compared]))


def read_toml(file: Path, shape: Any) -> Any:
    with naming(file):
        return shaped(tomllib.loads(file.read_text(encoding="utf-8")), shape, file)


def setup(quick: bool = False, folder: Path = FOLDER) -> Setup:
    """The shared declarations. With `quick`, entries under [quick] take the place of those of the same name.

    Raises ValueError, which names the file, for a wrong value, and for an arm, a choice or a pace that is missing.
    """
    file = folder / SHARED
    with naming(file):
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        changed = content.pop("quick", {})
        if quick:
            for name, value in changed.items():
                # The flags that [quick] does not name stay.
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
    """The arm, filled in with what it takes from the arm that it is `like`. Flags are merged one by one.

    A field that has its default value counts as not said.
    """
    if name not in arms:
        raise ValueError(f"there is no arm {name}")
    arm = arms[name]
    if not arm.like:
        return arm
    base = inherited(arms, arm.like)
    own = {field: value for field, value in arm._asdict().items() if value != Arm._field_defaults.get(field, "")}
    return base._replace(**{**own, "like": "", "flags": {**base.flags, **arm.flags}})


def claims(setup: Setup, only: int | None = None, folder: Path = FOLDER) -> list[Claim]:
    """All claims by number, or the one with the number `only`.

    Raises ValueError, which names the file, for a wrong value or an unknown arm or host, and if there is no such number.
    """
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
    """Raises ValueError unless the claim's arms and hosts are declared, and there is something to run and to show."""
    for arm in claim.needed:
        if arm not in setup.arms:
            raise ValueError(f"there is no arm {arm}")
    for host in claim.hosts:
        if host not in setup.hosts:
            raise ValueError(f"there is no host {host}")
    if not (claim.contrasts and claim.shown and claim.hosts):
        raise ValueError("a claim has hosts, contrasts, and measures that are shown")
