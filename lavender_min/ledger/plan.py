"""The runs that claims need. A run is known by a digest of all that decides its result, so claims share the runs of an arm."""

import functools
import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lavender_min.data import SOURCES
from lavender_min.ledger.declared import Arm, Claim, Setup, Values
from lavender_min.toy import data as toy

# Part of each digest. It is raised when runs are measured in another way, so that no older result is taken for a new one.
VERSION = 1
# The folder of the shipped hosts.
MODELS = Path(SOURCES["toy"].vlm).parent

# In a stage: the kind of host that is put together before it (`parts`).
ASSEMBLE = "assemble"

# (name of a choice, host) ─► the flags of its best trial; None while a trial is still to be run.
Best = Callable[[str, str], Values | None]


class Run(NamedTuple):
    """One arm on one host with one seed: what is trained, and what is measured."""

    arm: str
    host: str
    seed: int
    # `Arm.measured`
    kind: str
    # Flags of train.py for each stage; [] if nothing is trained. Folders, seed and host are added by `runs.train`.
    stages: list[Values]
    # `Arm.maps`
    maps: str
    # {split: number of scenes} whose questions are answered.
    measured: dict[str, int]
    # The split on which maps are read too; "" for none.
    mapped: str
    # Scenes that are measured at each checkpoint too; 0 for none.
    curve: int
    # (k, n): of n parts of the scenes, the k-th is measured. What is not tuned has no seeds; n parts stand in for n seeds.
    part: tuple[int, int]

    @property
    def digest(self) -> str:
        """The run's name in the ledger's folder: 16 hexadecimal digits."""
        # The arm's name decides nothing.
        decides = {**self._asdict(), "arm": "", "host": host_digest(self.host), "version": VERSION}
        return sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.arm} {self.host} seed {self.seed}"


def host_folder(host: str) -> Path:
    return MODELS / host


def is_there(host: str) -> bool:
    """Whether a declared host is shipped."""
    return (host_folder(host) / "config.json").exists()


@functools.cache
def host_digest(host: str) -> str:
    """The SHA-256 of the names and bytes of a host's files."""
    digest = sha256()
    for file in sorted(host_folder(host).iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def stages_of(setup: Setup, arm: Arm, chosen: Values) -> list[Values]:
    """The flags of each training of an arm; `chosen` are those of its choice. Its stages share the steps equally."""
    adapters = {} if arm.flags.get("full") else setup.adapters
    flags = {**setup.common, **adapters, **chosen, **arm.flags}
    each = {"max_steps": arm.times * flags["max_steps"] // max(1, len(arm.stages))}
    return [{**flags, **each, **own} for own in arm.stages] or [flags]


def run_of(setup: Setup, arm_name: str, host: str, seed: int, chosen: Values) -> Run:
    """The run of an arm; `chosen` are the flags of its choice, {} if it has none."""
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
    """The runs among which a choice is made: one for each trial, measured by its answers on the validation split."""
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
    """The choice of the trial with the most right answers; of equals, the first. `results` gives what a finished run left."""

    def best(choice: str, host: str) -> Values | None:
        found = [results(run) for run in trials(setup, choice, host)]
        (split,) = setup.validation
        scores = [result["measures"][f"{split}/answers.all"] for result in found if result]
        complete = len(scores) == len(found)
        return setup.choices[choice].trials[scores.index(max(scores))] if complete else None

    return best


def first_trial(setup: Setup) -> Best:
    """The first trial of each choice: it stands in for choices that are not made yet when the time is planned."""
    return lambda choice, host: setup.choices[choice].trials[0]


class Plan(NamedTuple):
    """The runs that are known by now."""

    # By digest, in the order in which they are run.
    runs: dict[str, Run]
    # Whether some arms are not among them yet, because their choice is not made.
    waiting: bool


def plan(setup: Setup, claims: Sequence[Claim], best: Best) -> Plan:
    """All runs of the claims, on the hosts that are shipped.

    The trials of choices come first, because arms wait for them. Then come all arms with the first seed, with the second, and so
    on: whenever the work is stopped, all arms have about as many seeds.
    """
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
    """How long a run takes on one core, by the declared pace of its host."""
    pace = setup.pace[run.host]
    if run.kind == "maps":
        return pace.start
    steps = sum(stage["max_steps"] for stage in run.stages)
    share = 1 / run.part[1]
    texts = {split: scenes * len(toy.SPLITS[split].every) * share for split, scenes in run.measured.items()}
    answered = sum(texts.values())
    mapped = texts.get(run.mapped, 0)
    if run.curve:
        checkpoints = round(1 / run.stages[-1]["save_steps"])
        in_curve = checkpoints * run.curve * len(toy.SPLITS[run.mapped].every)
        answered, mapped = answered + in_curve, mapped + in_curve
    return pace.start + pace.step * steps + pace.answer * answered + pace.maps * mapped
