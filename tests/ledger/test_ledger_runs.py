"""The runs: trained and measured in small, shared by processes, gone on with after a kill; and the page that is made of them."""

import json
import multiprocessing
import os
import re
import signal
import time

import pytest
import torch

from lavender_min import data
from lavender_min.evaluation import models
from lavender_min.geometry import MAP_SIDE
from lavender_min.ledger import declared, measures, plan, report, runs, stores
from lavender_min.maps import MapStore, MapWriter
from lavender_min.toy import data as toy
from lavender_min.tuning.flags import ModelFlags
from lavender_min.words import find_words

SHARED = """
seeds = [0, 1]
measured = { crowd_test = 2, pretrained = 2 }
curve_scenes = 2
curves = ["learn"]
validation = { crowd_val = 1 }
choice_seed = 9
[hosts]
tiny = "cross-attention"
lost = "decoder"
[pace]
tiny = { start = 1, step = 1, answer = 0.1, maps = 0.1 }
lost = { start = 1, step = 1, answer = 0.1, maps = 0.1 }
[common]
split = "crowd_64"
max_steps = 4
per_device_train_batch_size = 2
save_strategy = "steps"
save_steps = 0.25
save_total_limit = 8
disable_tqdm = true
[adapters]
lora = true
[choices.learn]
about = "default"
arm = "learn"
trials = [{ learning_rate = 1e-3 }, { learning_rate = 2e-3 }]
[arms.untuned]
about = "the host as it is"
measured = "untuned"
[arms.teacher]
about = "the teacher"
measured = "maps"
[arms.plain]
about = "plain"
flags = { plain = true }
[arms.learn]
about = "Lavender"
choice = "learn"
flags = { match = "all" }
[arms.oracle]
about = "exact masks"
maps = "masks"
flags = { aggregate = "layer-mean", aligner = "none", match = "all" }
[arms.switched]
about = "switched"
like = "oracle"
stages = [{ align_layers = "first" }, { align_layers = "last" }]
"""
CLAIM = """
number = 4
title = "Better"
paper = "Figure 10"
hosts = ["tiny", "lost"]
arms = ["untuned", "teacher", "switched"]
shown = ["crowd_test/answers.all", "pretrained/answers.all", "crowd_test/aligned.mse.ratio"]
[[contrasts]]
what = "answers"
plus = ["learn"]
minus = ["plain"]
measures = ["crowd_test/answers.all"]
[[contrasts]]
what = "KL"
plus = ["untuned"]
minus = ["teacher"]
measures = ["crowd_test/kl.all"]
"""


@pytest.fixture
def ledger(tmp_path, monkeypatch, vlm_folder):
    """Six arms of a tiny host, its stores made: each word's mask, or an even map where it has none."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(vlm_folder)
    monkeypatch.setattr(plan, "MODELS", tmp_path / "models")
    plan.host_digest.cache_clear()
    for split, scenes in (("crowd_64", 6), ("crowd_test", 2)):
        monkeypatch.setitem(toy.SPLITS, split, toy.SPLITS[split]._replace(scenes=scenes))
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "shared.toml").write_text(SHARED)
    (folder / "04.toml").write_text(CLAIM)
    setup = declared.setup(folder=folder)
    found = runs.Ledger(tmp_path / "out", setup, declared.claims(setup, folder=folder))
    for split, kind in (("crowd_64", "sd"), ("crowd_64", "masks"), ("crowd_test", "sd")):
        fill(stores.folder(found.out, split, kind), data.load("toy", split=split))
    return found


def fill(folder, examples):
    with MapWriter(folder, {"frame": "whole"}) as writer:
        for example in examples:
            words = find_words(example.fields)
            masks = {region[:3]: torch.from_numpy(region.mask) for region in example.regions(MAP_SIDE)}
            maps = torch.stack([masks.get(word[1:], torch.ones(MAP_SIDE, MAP_SIDE)).float() + 0.01 for word in words])
            writer.add(example.id, example.question, example.answer, words, maps, 0.9)


def by_arm(ledger, host="tiny"):
    return {run.arm: run for run in reversed(ledger.whole_plan().runs.values()) if run.host == host}


def written(run, ledger):
    """A stand-in for training and measuring."""
    file = ledger.file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(ledger.out / "log", "a") as log:
        log.write(f"{run.digest} {os.getpid()}\n")
    time.sleep(0.02)
    score = 0.1 + 0.1 * ("learn" in run.arm) + 0.01 * run.seed
    numbers = {f"{split}/answers.all": score for split in run.measured}
    numbers |= {"crowd_test/kl.all": 2.0 - ("untuned" not in run.arm), "crowd_test/aligned.mse.ratio": 0.5}
    result = {"run": run._asdict(), "commit": "abc", "measures": numbers, "seconds": {"all": 36.0}}
    file.write_text(json.dumps(result))


def test_runs_are_trained_measured_and_written_down(ledger, monkeypatch):
    """One of each kind, for real. The one with a curve is stopped after its training; the next try measures the same."""
    arms = by_arm(ledger)
    of_host = measures.of_host
    with monkeypatch.context() as broken:
        broken.setattr(measures, "of_host", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runs.take(ledger, arms["learn"])
    assert measures.of_host is of_host and ledger.result(arms["learn"]) is None
    state = ledger.out / "tuning" / arms["learn"].digest / "1" / "trainer_state.json"
    before = state.stat().st_mtime_ns
    monkeypatch.setattr(runs.shutil, "rmtree", lambda *a, **k: None)
    for arm in ("learn", "untuned", "teacher", "switched"):
        assert runs.take(ledger, arms[arm]) and not runs.take(ledger, arms[arm])
    assert state.stat().st_mtime_ns == before
    found = {arm: ledger.result(run)["measures"] for arm, run in arms.items() if ledger.result(run)}
    assert {"crowd_test/answers.all", "crowd_test/answers.sized", "pretrained/answers.color"} <= set(found["learn"])
    for name in ("pointing.all", "kl.all", "aligned.mse.ratio", "answers.all"):
        assert f"crowd_test/{name}" in found["learn"]
        # Two scenes are measured at the end and at the last checkpoint, which is the end.
        assert found["learn"][f"curve4/{name}"] == pytest.approx(found["learn"][f"crowd_test/{name}"], abs=1e-5)
        assert found["learn"]["curve1/kl.all"] != found["learn"]["curve4/kl.all"]
    # The store holds masks: they point right, and nothing is nearer to the ideal.
    assert found["teacher"]["crowd_test/pointing.all"] == 1
    assert found["teacher"]["crowd_test/kl.all"] < found["untuned"]["crowd_test/kl.all"]
    assert "crowd_test/aligned.kl.all" not in found["untuned"] and found["switched"]
    files = {file.stem for file in (ledger.out / "results").glob("*.safetensors")}
    assert files == {arms[arm].digest for arm in ("learn", "untuned", "teacher", "switched")}
    # What the tower says of the six pictures is kept for all runs.
    assert len(list((ledger.out / "vision" / "tiny").glob("*.safetensors"))) == 6


def test_two_processes_share_the_runs_without_doubling_one(ledger, monkeypatch):
    monkeypatch.setattr(runs, "make", lambda ledger, run: written(run, ledger))
    monkeypatch.setattr(runs, "PATIENCE", 0.05)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=runs.work, args=(ledger,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    digests, processes = zip(*(line.split() for line in (ledger.out / "log").read_text().splitlines()), strict=True)
    # Two trials; six arms with two seeds each.
    assert len(digests) == len(set(digests)) == 14 and len(set(processes)) == 2
    assert not ledger.known_plan().waiting and "0 of 14 runs" in runs.forecast(ledger, 1)


def test_the_lock_of_a_killed_process_is_free(ledger, monkeypatch):
    run = by_arm(ledger)["plain"]

    def hang(ledger, run):
        time.sleep(60)

    with monkeypatch.context() as hanging:
        hanging.setattr(runs, "make", hang)
        worker = multiprocessing.get_context("fork").Process(target=runs.take, args=(ledger, run))
        worker.start()
    lock = ledger.out / "locks" / f"{run.digest}.lock"
    while not lock.exists() or not lock.read_text():
        time.sleep(0.02)
    monkeypatch.setattr(runs, "make", lambda ledger, run: written(run, ledger))
    assert f"process {worker.pid} on" in lock.read_text() and not runs.take(ledger, run)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(10)
    assert runs.take(ledger, run) and ledger.result(run)


def test_the_page_says_what_came_out(ledger, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs, "make", lambda ledger, run: written(run, ledger))
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{report.BEGIN}\nyesterday\n{report.END}\n\n## Kept\n")
    report.write(ledger, page)
    assert "| not run |" in page.read_text()
    # One of two seeds: its effects are shown, and nothing is sure. A second run of one arm changes nothing.
    plain = by_arm(ledger)["plain"]
    for _ in "trials", "arms":
        for run in [*ledger.known_plan().runs.values(), plain._replace(seed=1)]:
            if run.seed != 1 or run.arm == "plain":
                runs.take(ledger, run)
    report.write(ledger, page)
    assert "not clear (1 of 2 seeds so far)" in page.read_text()
    assert re.search(r"\| answers +\| +\+10 \(matters from 0\): not clear", page.read_text())
    runs.work(ledger)
    report.write(ledger, page)
    text = page.read_text()
    assert text.startswith("# Mine\n") and text.endswith("## Kept\n") and "yesterday" not in text
    # Lavender is 10 points above plain at both seeds, and 1 nat in KL.
    assert re.search(r"\| answers +\| +\+10 ± \S+ \(matters from 0\): holds", text)
    assert re.search(r"\| KL +\| +\+1 ± \S+ \(matters from 0\): holds", text)
    assert re.search(r"\| +Figure 10 \| +holds \|", text) and "commit abc" in text
    assert "`lost` (decoder) does not ship yet" in text
    assert "Even exact masks gain no answers on `tiny` that these seeds can show (+0.0 ± 0.0 points" in text
    report.write(ledger, page)
    assert page.read_text() == text
    page.write_text("# No marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.write(ledger, page)


def test_numbers_are_printed_with_their_measures_digits():
    assert report.cell("crowd_test/mse.own", [0.01234]) == "0.0123" and report.cell("crowd_test/kl.all", []) == "–"
    # Half the interval of two values is 12.706 times half their difference.
    assert report.cell("crowd_test/aligned.answers.all", [0.5, 0.51]) == "50.5 ± 6.4"


def test_stores_are_made_once_and_at_their_largest(ledger, monkeypatch):
    arms = by_arm(ledger)
    large = arms["learn"]._replace(stages=[arms["learn"].stages[0] | {"split": ["crowd_4096", "tune"]}])
    assert set(stores.wanted([arms["learn"], large, arms["teacher"]])) == {
        ("crowd_4096", "sd"), ("tune", "sd"), ("crowd_test", "sd"),
    }  # fmt: skip
    swapped = arms["oracle"]._replace(maps="sd-swapped")
    assert stores.wanted([swapped])[:2] == [("crowd_64", "sd"), ("crowd_64", "sd-swapped")]
    monkeypatch.setattr(stores.subprocess, "run", lambda *a: pytest.fail("all are there"))
    for one in stores.wanted([swapped, arms["learn"]]):
        stores.make(ledger.out, one)
    right, wrong = (MapStore(stores.folder(ledger.out, "crowd_64", kind)) for kind in ("sd", "sd-swapped"))
    half = MAP_SIDE // 2
    pairs = [(right[id].maps, wrong[id].maps) for id in right.ids]
    for a, b in pairs:
        assert torch.equal(a[:, :half, half:], b[:, half:, :half]) and torch.equal(
            a[:, half:, half:], b[:, half:, half:]
        )
        assert torch.equal(stores.exchanged(b), a)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_parts_of_the_scenes_stand_in_for_seeds():
    whole = data.load("toy", split="crowd_test")[:28]
    parts = [measures.part_of(whole, k, 3) for k in range(3)]
    assert [len(part) for part in parts] == [12, 8, 8]
    assert sorted(e.id for part in parts for e in part) == sorted(e.id for e in whole)


def test_kl_to_the_mask_by_hand():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[:, 0, :2] = True
    maps = torch.stack([masks[0].float(), torch.ones(4, 4)])
    inside, outside = 0.99 / 2 + 0.01 / 16, 0.01 / 16
    expected = [
        2 * 0.5 * torch.tensor(0.5 / inside).log(),
        (torch.tensor([1 / 16 / inside] * 2 + [1 / 16 / outside] * 14).log() / 16).sum(),
    ]
    assert torch.allclose(measures.kl(maps, masks), torch.stack(expected), atol=1e-5)


def test_the_command_plans(ledger, monkeypatch, capsys):
    from lavender_min.ledger.__main__ import main

    assert main(["plan", "--only", "12", "--processes", "2", "--out", str(ledger.out)]) == 0
    assert "runs are to be made, about" in capsys.readouterr().out
    assert main(["plan", "--only", "77"]) == 2 and "--only 77" in capsys.readouterr().err


def test_a_map_extends_as_far_as_an_even_map_of_its_entropy():
    even, half, cell = torch.ones(3, MAP_SIDE, MAP_SIDE)
    half[: MAP_SIDE // 2] = 0
    cell[:] = 0
    cell[3, 5] = 2
    counts = measures.extent(torch.stack([even, half, half, cell]))
    assert len(counts) == measures.BINS and counts[-1] == 1 and counts[0] == 1
    assert sum(counts[measures.BINS // 2 - 1 : measures.BINS // 2 + 1]) == 2


@pytest.mark.parametrize("host", ["mllama", "qwen2_vl"])
def test_a_frozen_tower_looks_at_a_batch_once(host, monkeypatch):
    monkeypatch.setattr(measures, "REMEMBERED", {})
    flags = ModelFlags(vlm=str(plan.host_folder(host)))
    examples = measures.examples_of("crowd_test", 3)
    plain = models.load(flags, torch.float32)
    replies = models.answer(plain.model, plain.processor, examples, 6)
    kind = type(plain.model.family.vision(plain.model.base)[0])
    looked, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **named: looked.append(1) or forward(*args, **named))
    # Two batches, and after the next run none.
    for times in (2, 2):
        loaded = measures.load(flags, None)
        assert models.answer(loaded.model, loaded.processor, examples, 6) == replies
        assert len(looked) == times
    # Another host's are not taken for this one's.
    measures.remember(plain.model.family.vision(plain.model.base)[0], "another")
    models.answer(plain.model, plain.processor, examples, 6)
    assert len(looked) == 4
