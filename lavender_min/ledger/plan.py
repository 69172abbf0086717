"""The runs that claims need. A run is known by the digest of what decides its result, so that claims share it."""

import functools
import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lavender_min.data import SOURCES
from lavender_min.ledger.declared import Arm, Claim, Setup, Values
from lavender_min.toy import data as toy

# A result that was measured in another way, by an older version, is not taken for one of today.
VERSION = 1
# Shipped models lie beside that of the toy data's own host.
MODELS = Path(SOURCES["toy"].vlm).parent

# (name of a choice, host) ─► the flags of its best trial, None as long as they are not known.
Best = Callable[[str, str], Values | None]


class Run(NamedTuple):
    arm: str
    host: str
    seed: int
    kind: str  # Arm.measured
    # Flags of train.py, stage by stage; folders, seed and host are added when it runs.
    stages: list[Values]
    maps: str
    # Scenes of each split; maps are read on `mapped`, "" for none.
    measured: dict[str, int]
    mapped: str
    # Scenes that are measured at each checkpoint; 0: none.
    curve: int
    # Which part of the scenes, of how many: what is not tuned has no seeds, so parts of the scenes stand in for them.
    part: tuple[int, int]

    @property
    def digest(self) -> str:
        """The arm's name is for people, and decides nothing."""
        decides = {**self._asdict(), "arm": "", "host": host_digest(self.host), "version": VERSION}
        return sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.arm} {self.host} seed {self.seed}"


def host_folder(host: str) -> Path:
    return MODELS / host


def is_there(host: str) -> bool:
    return (host_folder(host) / "config.json").exists()


@functools.cache
def host_digest(host: str) -> str:
    h = sha256()
    for file in sorted(host_folder(host).iterdir()):
        h.update(file.name.encode() + file.read_bytes())
    return h.hexdigest()


def stages_of(setup: Setup, arm: Arm, chosen: Values) -> list[Values]:
    """Stages share the steps of a run."""
    adapters = {} if arm.flags.get("full") else setup.adapters
    flags = {**setup.common, **adapters, **chosen, **arm.flags}
    each = {"max_steps": flags["max_steps"] // max(1, len(arm.stages))}
    return [{**flags, **each, **own} for own in arm.stages] or [flags]


def run_of(setup: Setup, arm_name: str, host: str, seed: int, chosen: Values) -> Run:
    arm = setup.arms[arm_name]
    tuned = arm.measured == "tuned"
    return Run(
        arm=arm_name,
        host=host,
        seed=seed,
        kind=arm.measured,
        stages=stages_of(setup, arm, chosen) if tuned else [],
        maps=arm.maps,
        measured=setup.measured,
        mapped=next(iter(setup.measured)),
        curve=setup.curve_scenes if arm_name in setup.curves else 0,
        part=(0, 1) if tuned else (setup.seeds.index(seed), len(setup.seeds)),
    )


def trials(setup: Setup, choice: str, host: str) -> list[Run]:
    """What a choice is made among: answers on the validation split, one seed."""
    arm = setup.choices[choice].arm
    base = run_of(setup, arm, host, setup.choice_seed, {})
    return [
        base._replace(
            arm=f"{arm} {json.dumps(trial)}",
            stages=stages_of(setup, setup.arms[arm], trial),
            measured=setup.validation,
            mapped="",
            curve=0,
        )
        for trial in setup.choices[choice].trials
    ]


def best_of(setup: Setup, results: Callable[[Run], dict[str, Any] | None]) -> Best:
    """The trial with the most right answers; of equals the first."""

    def best(choice: str, host: str) -> Values | None:
        found = [results(run) for run in trials(setup, choice, host)]
        (split,) = setup.validation
        scores = [result["measures"][f"{split}/answers.all"] for result in found if result]
        complete = len(scores) == len(found)
        return setup.choices[choice].trials[scores.index(max(scores))] if complete else None

    return best


def first_trial(setup: Setup) -> Best:
    """What stands in for a choice that is not made yet, to plan the time."""
    return lambda choice, host: setup.choices[choice].trials[0]


class Plan(NamedTuple):
    # By digest, in the order in which they are run.
    runs: dict[str, Run]
    # Whether arms are missing, because their settings are not chosen yet.
    waiting: bool


def plan(setup: Setup, claims: Sequence[Claim], best: Best) -> Plan:
    """All runs of claims on the hosts that are there: choices first, then seed by seed, so that early figures are of all arms."""
    pairs = list(dict.fromkeys((arm, host) for claim in claims for host in claim.hosts for arm in claim.needed))
    pairs = [(arm, host) for arm, host in pairs if is_there(host)]
    asked = dict.fromkeys((setup.arms[arm].choice, host) for arm, host in pairs if setup.arms[arm].choice)
    runs = [run for choice, host in asked for run in trials(setup, choice, host)]
    waiting = False
    for seed in setup.seeds:
        for arm, host in pairs:
            choice = setup.arms[arm].choice
            chosen = best(choice, host) if choice else {}
            waiting |= chosen is None
            if chosen is not None:
                runs.append(run_of(setup, arm, host, seed, chosen))
    return Plan({run.digest: run for run in runs}, waiting)


def seconds(setup: Setup, run: Run) -> float:
    """On one core, from the declared pace of its host."""
    pace = setup.pace[run.host]
    steps = sum(stage["max_steps"] for stage in run.stages)
    share = 1 / run.part[1]
    texts = {split: scenes * len(toy.SPLITS[split].every) * share for split, scenes in run.measured.items()}
    answered = sum(texts.values())
    mapped = texts.get(run.mapped, 0)
    if run.curve:
        checkpoints = round(1 / run.stages[-1]["save_steps"])
        in_curve = checkpoints * run.curve * len(toy.SPLITS[run.mapped].every)
        answered, mapped = answered + in_curve, mapped + in_curve
    if run.kind == "maps":
        return pace.start
    return pace.start + pace.step * steps + pace.answer * answered + pace.maps * mapped
