"""The declarations: all can be read, all can be run, in the time that was given."""

import json

import pytest

from lavender_min.ledger import declared, plan, report
from lavender_min.toy import data as toy
from lavender_min.tuning import stages


@pytest.fixture(scope="module")
def setup():
    return declared.setup()


@pytest.fixture
def all_hosts(monkeypatch):
    """The decoder does not ship yet; its runs are planned as the other's."""
    monkeypatch.setattr(plan, "is_there", lambda host: True)
    monkeypatch.setattr(plan, "host_digest", lambda host: host)


def whole(setup):
    return list(plan.plan(setup, declared.claims(setup), plan.first_trial(setup)).runs.values())


def test_every_claim_is_declared_with_what_would_count(setup):
    claims = declared.claims(setup)
    assert [claim.number for claim in claims] == list(range(1, 23))
    for claim in claims:
        assert claim.paper and claim.contrasts
        # What a contrast reads is measured: of the arms that have curves only where it names a checkpoint.
        for contrast in claim.contrasts:
            assert contrast.of == "correlation" or contrast.minus
            for arm in (*contrast.plus, *contrast.minus):
                for measure in contrast.measures:
                    split = measure.partition("/")[0]
                    assert split in setup.measured or (split.startswith("curve") and arm in setup.curves), (
                        claim.number,
                        arm,
                    )
        assert "oracle" in claim.oracle and claim.oracle in claim.needed
        assert all(report.heading(name) and report.measure_of(name) for name in claim.shown)
    assert len(setup.seeds) >= 5
    used = {arm for claim in claims for arm in claim.needed} | {choice.arm for choice in setup.choices.values()}
    assert used == set(setup.arms)


def test_plain_and_lavender_choose_among_as_many_trials(setup):
    assert len({len(choice.trials) for choice in setup.choices.values()}) == 1
    assert setup.choice_seed not in setup.seeds and not set(setup.validation) & set(setup.measured)


def test_train_py_takes_the_flags_of_every_run(setup, all_hosts):
    seen = set()
    for run in whole(setup):
        for values in run.stages:
            splits = values["split"] if isinstance(values["split"], list) else [values["split"]]
            assert all(split in toy.SPLITS for split in splits)
            key = json.dumps(values, sort_keys=True)
            if key in seen:
                continue
            seen.add(key)
            maps = [f"maps/{split}" for split in splits]
            values = values | {"data": ["toy"] * len(splits), "maps": maps, "output_dir": "out"}
            built = values.pop(plan.ASSEMBLE, None)
            argv = [word for pair in values.items() for word in stages.as_flag(*pair)]
            flags = stages.flags_of(stages.Stage(run.name, "out", argv))
            whole_host = run.host == "idefics3"
            assert built in (None, "causal", "bidirectional", "perceiver") and (whole_host or not built)
            assert flags.plain == ("plain" in run.arm or whole_host and "oracle" not in run.arm)
            assert flags.mode == ("full" if "full" in run.arm or whole_host else "lora")
    assert len(seen) > 30


def test_runs_are_shared_and_take_the_time_that_was_given(setup, all_hosts):
    runs = whole(setup)
    assert len({run.digest for run in runs}) == len(runs)
    alone = sum(len(plan.plan(setup, [claim], plan.first_trial(setup)).runs) for claim in declared.claims(setup))
    assert len(runs) < 0.6 * alone
    assert sum(plan.seconds(setup, run) for run in runs) / 3600 / 2 < 4.4
    quick = declared.setup(quick=True)
    assert sum(plan.seconds(quick, run) for run in whole(quick)) / 60 / 2 < 15


def test_a_run_is_known_by_what_decides_it(setup, all_hosts):
    one = plan.run_of(setup, "learn", "mllama", 0, {"learning_rate": 1e-3})
    assert one.digest == one._replace(arm="another name").digest
    others = [
        plan.run_of(setup, "learn", "mllama", 1, {"learning_rate": 1e-3}),
        plan.run_of(setup, "learn", "mllama", 0, {"learning_rate": 2e-3}),
        plan.run_of(setup, "oracle_learn", "mllama", 0, {"learning_rate": 1e-3}),
        plan.run_of(setup, "learn", "qwen2_vl", 0, {"learning_rate": 1e-3}),
        one._replace(measured={"crowd_test": 1}),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 6
    (first, second) = plan.run_of(setup, "switched", "mllama", 0, {}).stages
    assert (first["align_layers"], second["align_layers"]) == ("first", "last")
    assert first["max_steps"] + second["max_steps"] == setup.common["max_steps"]
    # The arm that trains a small model first has twice the steps, so the host itself has as many as the other.
    (*_, last), (_, other) = (plan.run_of(setup, arm, "idefics3", 0, {}).stages for arm in ("perceiver", "causal"))
    assert last == other
    full = plan.run_of(setup, "full_half", "mllama", 0, {"learning_rate": 1e-4}).stages[0]
    assert full["pretrain_aligner_steps"] == 0.5 and not set(setup.adapters) & set(full)


def test_the_best_trial_is_taken_once_all_are_there(setup, all_hosts):
    runs = plan.trials(setup, "learn", "mllama")
    assert {run.seed for run in runs} == {setup.choice_seed} and {*runs[0].measured} == {"crowd_val"}
    scores = dict(zip((run.digest for run in runs), (0.2, 0.5, 0.5, 0.1), strict=True))

    def result(run):
        return {"measures": {"crowd_val/answers.all": scores[run.digest]}} if run.digest in scores else None

    assert plan.best_of(setup, result)("learn", "mllama") == setup.choices["learn"].trials[1]
    del scores[runs[3].digest]
    assert plan.best_of(setup, result)("learn", "mllama") is None
    known = plan.plan(setup, declared.claims(setup, 21), plan.best_of(setup, result))
    assert known.waiting and {run.arm.split()[0] for run in known.runs.values()} >= {"untuned", "learn"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('hosts = ["nowhere"]', "there is no host nowhere"),
        ("contrasts = []", "has hosts, contrasts"),
        ('arms = ["nobody"]', "there is no arm nobody"),
        ("number = '3'", "01_x.toml.*number"),
        ("suprise = 1", "01_x.toml.*suprise"),
        ("[", "01_x.toml"),
    ],
)
def test_a_wrong_declaration_is_named(tmp_path, setup, change, said):
    lines = {"number": "number = 1", "title": 'title = "t"', "paper": 'paper = "p"', "hosts": 'hosts = ["mllama"]'}
    lines |= {
        "shown": 'shown = ["crowd_test/answers.all"]',
        "contrasts": 'contrasts = [{ what = "w", plus = ["plain"] }]',
    }
    lines[change.partition(" ")[0]] = change
    (tmp_path / "01_x.toml").write_text("\n".join(lines.values()))
    with pytest.raises(ValueError, match=said):
        declared.claims(setup, folder=tmp_path)


def test_only_one_claim(setup):
    assert [claim.number for claim in declared.claims(setup, 4)] == [4]
    with pytest.raises(ValueError, match="--only 99: the claims are 1, 2"):
        declared.claims(setup, 99)
