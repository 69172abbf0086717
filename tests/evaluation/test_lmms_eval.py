"""`evaluate.py --benchmarks`: how lmms-eval is called, what is read of its results, and how a comparison goes on.

A stub stands in for lmms-eval's process; one slow test runs lmms-eval itself, where `make bench-env` has built its environment.
"""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from lavender_min.data import Example
from lavender_min.evaluation import benchmark_names, benchmark_report, benchmarks, command, local_task
from lavender_min.evaluation.benchmark_report import Relative, Score
from lavender_min.hosts import FAMILIES
from lavender_min.toy import data as toy
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags

RESULT = Path(__file__).parent / "result_of_lmms_eval.json"
BENCH = ROOT / ".venv-bench" / "bin" / "python"


def test_the_papers_benchmarks_are_twenty_and_named_once():
    titles = [one.title for one in benchmark_names.PAPER]
    assert len(set(titles)) == 20
    tasks = benchmark_names.named("paper")
    assert len(tasks) == 17 and tasks[0] == "ai2d" and tasks[-1] == "pope"
    assert benchmark_names.named("mine, pope,mine") == ["mine", "pope"]
    for nothing in ("", " , "):
        with pytest.raises(ValueError, match="--benchmarks wants lmms-eval's names"):
            benchmark_names.named(nothing)


def test_wrappers_and_video_parts_are_of_families_there_are():
    assert set(benchmark_names.WRAPPERS) <= set(FAMILIES)
    assert set(benchmark_names.VIDEO_PARTS) <= set(benchmark_names.WRAPPERS)
    with pytest.raises(ValueError, match="x is a idefics, which lmms-eval cannot load"):
        benchmark_names.wrapper_of("x", "idefics")


# --------------------------------------------------------------------------------------------------------- results


def test_a_real_result_file_gives_the_score_and_its_standard_error():
    # 15 of 40 right: √(p(1−p)/(n−1)).
    (score,) = benchmark_report.read_scores(RESULT, "local_toy").values()
    assert score.value == 15 / 40 and score.error == pytest.approx((0.375 * 0.625 / 39) ** 0.5, rel=1e-9)


def write_result(path, **tasks):
    path.write_text(json.dumps({"results": tasks}))
    return path


def test_the_papers_measures_are_read_and_of_others_the_first(tmp_path):
    pope = {"alias": "pope", "pope_accuracy,none": 0.9, "pope_f1_score,none": 0.8, "pope_f1_score_stderr,none": "N/A"}
    file = write_result(tmp_path / "pope.json", pope=pope)
    assert benchmark_report.read_scores(file, "pope") == {"POPE": Score(0.8, None)}
    mme = {"mme_cognition_score,none": 300, "mme_perception_score,none": 1400.5}
    file = write_result(tmp_path / "mme.json", mme=mme)
    assert benchmark_report.read_scores(file, "mme") == {
        "MME, mme_perception_score": Score(1400.5, None),
        "MME, mme_cognition_score": Score(300.0, None),
    }
    # A group of tasks has a row for each; what is no number is none.
    parts = {
        "a": {"submission,none": None, "x,none": 0.25, "y,none": 1},
        "b": {"x,none": 0.5},
        "all": {"x,none": "NaN"},
    }
    file = write_result(tmp_path / "group.json", **parts)
    assert benchmark_report.read_scores(file, "group") == {"a": Score(0.25, None), "b": Score(0.5, None)}
    for wrong in ({"results": {"a": {"alias": "a"}}}, {"results": 3}, {}):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"wrong\.json"):
            benchmark_report.read_scores(tmp_path / "wrong.json", "a")


def test_relative_improvement_and_its_error():
    # 0.6 / 0.5 − 1, and √(0.03² + 1.2² · 0.04²) / 0.5.
    found = benchmark_report.relative(Score(0.5, 0.04), Score(0.6, 0.03))
    assert found == pytest.approx(Relative(0.2, (0.0009 + 1.44 * 0.0016) ** 0.5 / 0.5))
    assert benchmark_report.relative(Score(-2.0, None), Score(-1.0, 0.1)) == Relative(0.5, None)
    assert benchmark_report.relative(Score(0.0, 0.1), Score(1.0, 0.1)) is None


def test_the_table_the_bars_and_the_json(tmp_path):
    def run(a, b):
        return {"A": Score(*a), "B": Score(*b)}

    scores = {
        "untuned": [run((0.25, 0.01), (10.0, None))],
        "plain tuning": [run((0.5, 0.04), (0.0, None)), {"A": Score(0.7, 0.02)}],
        "Lavender": [run((0.6, 0.03), (20.0, None)), run((0.9, 0.03), (30.0, None))],
    }
    text = benchmark_report.write(tmp_path, scores, [{"run": "r"}], "python evaluate.py")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["benchmark", "untuned", "plain tuning", "Lavender", "relative, %"]
    # Means 0.6 ± 12.706 · 0.1 and 0.75 ± 12.706 · 0.15; errors 0.03 and 0.03: √(0.03² + 1.25² · 0.03²) / 0.6 = 0.080.
    assert rows[2] == ["A", "0.25 (0.01)", "0.6 ± 1.3 (0.03)", "0.75 ± 1.9 (0.03)", "+25.0 ± 8.0"]
    assert rows[3] == ["B", "10", "0", "25 ± 64", "–"]
    assert text in (tmp_path / "benchmarks.md").read_text()
    content = json.loads((tmp_path / "benchmarks.json").read_text())
    assert content["relative"]["A"]["gain"] == pytest.approx(0.25) and content["relative"]["B"] is None
    assert content["scores"]["Lavender"][1]["B"] == {"value": 30.0, "error": None}
    assert Image.open(tmp_path / "benchmarks.png").size[0] > 600


# ------------------------------------------------------------------------------------------------- lmms-eval called


@pytest.fixture
def finished(tmp_path, vlm_folder):
    """Two runs as train.py leaves them, as far as --benchmarks reads them: [plain, Lavender]."""
    folders = []
    for plain in (True, False):
        folder = tmp_path / ("plain" if plain else "lavender")
        flags = ModelFlags(vlm_folder, mode="lora", plain=plain, lora_targets="language")
        model, _ = runs.build(flags)
        model.host.save_pretrained(folder)
        runs.remember(flags, folder)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss_vlm": 1.0, "plain": plain}]}))
        folders.append(str(folder))
    return folders


class Stub:
    """lmms-eval's process: notes how it was called, and leaves a result where it would; is killed at the call `break_at`."""

    def __init__(self):
        self.calls, self.silent, self.break_at = [], (), None

    def __call__(self, words, **_):
        if words[1] == "-c":
            return subprocess.CompletedProcess(words, 0)
        given = dict(zip(words[3::2], words[4::2], strict=False))
        weights = Path(given["--model_args"].split(",")[0].removeprefix("pretrained="))
        assert (weights / "model.safetensors").exists() and not (weights / "adapter_config.json").exists()
        self.calls.append(words)
        folder = Path(given["--output_path"]) / "models__x"
        folder.mkdir(parents=True)
        if len(self.calls) == self.break_at:
            (folder / "half_samples.jsonl").touch()
            raise KeyboardInterrupt
        if given["--tasks"] not in self.silent:
            (folder / "20261126_results.json").write_text(RESULT.read_text().replace("local_toy", given["--tasks"]))
        return subprocess.CompletedProcess(words, 0)


@pytest.fixture
def stub(monkeypatch):
    made = Stub()
    monkeypatch.setattr(benchmarks.subprocess, "run", made)
    return made


def asked(finished, out, *more):
    names = ["--benchmarks", "one,two", "--bench", "--limit 4", "--bench_python", "python3"]
    return [*names, "--plain", finished[0], "--lavender", finished[1], "--out", str(out), *more]


def test_called_once_a_task_and_model_and_goes_on_where_it_was_killed(finished, stub, tmp_path, capsys):
    out = tmp_path / "out"
    stub.break_at = 4
    assert command.main(asked(finished, out)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = stub.calls[0]
    assert first[1:5] == ["-m", "lmms_eval", "--model", "llama_vision"]
    assert (
        first[5] == "--model_args" and first[6].endswith("exported,device_map=cpu") and first[-2:] == ["--limit", "4"]
    )
    assert first[first.index("--tasks") + 1] == "one" and first[first.index("--batch_size") + 1] == "1"
    plain = next(out.glob("*plain"))
    assert sorted(path.name for path in plain.iterdir()) == [".tmp-two", "asked.json", "exported", "one.json"]

    stub.calls.clear()
    stub.break_at = None
    assert command.main(asked(finished, out)) == 0
    assert [words[words.index("--tasks") + 1] for words in stub.calls] == ["two", "one", "two"]
    assert not list(out.glob("*/exported")) and not list(out.glob("*/.tmp-*"))
    table = capsys.readouterr().out
    assert "| one       | 0.375 (0.078) | 0.375 (0.078) | 0.375 (0.078) | +0.0 ± 29.2 |" in table

    stub.calls.clear()
    assert command.main(asked(finished, out)) == 0 and stub.calls == []
    (Path(finished[1]) / "trainer_state.json").write_text('{"log_history": []}')
    for argv in (asked(finished, out), asked(finished, out, "--bench", "--limit 5")):
        assert command.main(argv) == 2
        assert "holds results of other weights or another --bench" in capsys.readouterr().err


def test_a_task_that_leaves_no_result_stops_no_other(finished, stub, tmp_path, capsys):
    stub.silent = ("one",)
    assert command.main(asked(finished[:1] * 2, tmp_path / "out")[:8] + ["--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert f"lmms-eval left no result for one of {vlm_of(finished)}, one of {finished[0]}; the same command" in err
    assert "| two " in out and "| one " not in out


def vlm_of(finished):
    return runs.recall(finished[0]).vlm


def test_one_line_says_what_is_wrong(finished, tmp_path, capsys):
    for argv, message in (
        (["--benchmarks", ",", "--plain", finished[0]], "--benchmarks wants lmms-eval's names of tasks"),
        (
            ["--benchmarks", "mme", "--bench_python", "nowhere/python"],
            "nowhere/python is no interpreter that has lmms-eval",
        ),
        (["--benchmarks", "mme", "--seeds", "2"], "--benchmarks compares finished runs"),
        (["--benchmarks", "mme", "--text", "val"], "--benchmarks and --text exclude each other"),
        (["--bench", "--limit 4"], "--bench is for lmms-eval: give --benchmarks too"),
    ):
        assert command.main([*argv, "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err.strip()
        assert message in err and "\n" not in err, err


def test_the_readers_are_told_what_is_left_out_and_who_judges(capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    benchmarks.say_what_differs("paper", benchmark_names.named("paper"))
    err = capsys.readouterr().err
    assert (
        "lmms-eval has no task for OCRVQA, MMBench, English, 1.1" in err and "CCBench, HallusionBench a model of" in err
    )
    benchmarks.say_what_differs("mme,pope", ["mme", "pope"])
    assert capsys.readouterr().err == ""


def test_a_folder_that_says_nothing_of_videos_names_their_part(tmp_path):
    file = tmp_path / "processor_config.json"
    file.write_text('{"processor_class": "Qwen2VLProcessor"}')
    benchmarks.complete(tmp_path, "mllama")
    assert "video" not in file.read_text()
    benchmarks.complete(tmp_path, "qwen2_vl")
    assert json.loads(file.read_text())["video_processor"] == {"video_processor_type": "Qwen2VLVideoProcessor"}
    file.write_text('{"video_processor": {"size": 3}}')
    benchmarks.complete(tmp_path, "qwen2_vl")
    assert json.loads(file.read_text()) == {"video_processor": {"size": 3}}


def test_an_export_is_completed_though_it_was_killed_right_after_it_was_written(tmp_path, monkeypatch):
    weights = tmp_path / "exported"
    weights.mkdir()
    (weights / "processor_config.json").write_text("{}")
    seen = []
    monkeypatch.setattr(
        benchmarks,
        "run_task",
        lambda task, folder, *_: seen.append(json.loads((folder / "processor_config.json").read_text())),
    )
    benchmarks.run_model(benchmarks.Model("untuned", "host", None), "qwen2_vl", ["one"], tmp_path, [], [])
    assert seen == [{"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}}]


# --------------------------------------------------------------------------------------------------- a task of ours


def test_a_local_task_holds_the_questions(tmp_path):
    from datasets import load_from_disk

    local_task.write_task(tmp_path, "mine", toy.load("heldout", 2), 9)
    rows = load_from_disk(tmp_path / "rows" / "mine")["test"]
    true = [example for example in toy.load("heldout", 2) if example.question]
    assert rows["question"] == [example.question for example in true] and len(true) == 10
    assert rows[3]["image"].tobytes() == true[3].image().tobytes()
    text = (tmp_path / "mine.yaml").read_text()
    assert f"dataset_path: {tmp_path / 'rows' / 'mine'}\n" in text and 'doc_to_text: "{{question}}"' in text
    assert "!function mine.picture" in text and "max_new_tokens: 9" in text and (tmp_path / "mine.py").exists()
    with pytest.raises(ValueError, match="none of 1 examples is a question"):
        local_task.write_task(tmp_path, "none", [Example("a", lambda: Image.new("RGB", (8, 8)), "", "a dog")])


@pytest.mark.slow
def test_lmms_eval_itself_on_an_exported_run(finished, tmp_path):
    if not BENCH.exists():
        pytest.skip("lmms-eval's environment is not there: make bench-env")
    local_task.write_task(tmp_path / "tasks", "local_toy", toy.load("heldout", 1), 4)
    names = [
        "--benchmarks",
        "local_toy",
        "--bench",
        f"--include_path {tmp_path / 'tasks'}",
        "--bench_python",
        str(BENCH),
    ]
    assert command.main([*names, "--plain", finished[0], "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    (score,) = content["scores"]["plain tuning"][0].values()
    # An untrained model says nothing right of five questions.
    assert score == {"value": 0.0, "error": 0.0}
    assert len(list((tmp_path / "out").glob("*/local_toy.json"))) == 2
