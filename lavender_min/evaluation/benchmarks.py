"""Public benchmarks, run by lmms-eval: the untuned host, plain tuning and Lavender on its tasks, and the paper's Fig. 15.

    python evaluate.py --benchmarks mme,pope --plain runs/a --lavender runs/b --out runs/benchmarks

lmms-eval runs in a process of its own, with an interpreter of its own, and loads a model from an ordinary folder. So each model is
merged and exported to OUT/<model>/exported, one at a time, and that folder is removed when the model's last task is done.

lmms-eval's JSON of each task is kept as OUT/<model>/<task>.json. A task whose JSON is there is not run again, so the same command
continues a comparison that was killed. The task at which it was killed starts anew, as lmms-eval keeps no answers of it.
"""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig

from lavender_min import data
from lavender_min.evaluation import benchmark_report
from lavender_min.evaluation.benchmark_names import PAPER, VIDEO_PARTS, named, wrapper_of
from lavender_min.evaluation.benchmark_report import Scores, read_scores
from lavender_min.evaluation.compare import recall_all
from lavender_min.evaluation.flags import Flags, split_flags
from lavender_min.evaluation.names import UNTUNED, settings
from lavender_min.failing import naming, read_json, say
from lavender_min.tuning import export


class Model(NamedTuple):
    """The untuned host, or one run."""

    # UNTUNED, PLAIN or LAVENDER: the runs of several seeds share it.
    name: str
    # Hub id or folder of the host.
    vlm: str
    # The run's folder; None for the untuned host.
    run: str | None

    @property
    def folder(self) -> str:
        """The name of its folder in OUT: the model's own path, without slashes."""
        return (self.run or self.vlm).strip("./").replace("/", "__")


def benchmark(flags: Flags, command: str) -> None:
    """Runs the tasks that are missing, then prints and writes the comparison; `command` is its command line, for the reader.

    Raises ValueError, in one line, if lmms-eval is not there or cannot load such hosts, and at the end if a task left no result.
    """
    tasks, out = named(str(flags.benchmarks)), Path(flags.out)
    models = models_of(flags)
    with naming(models[0].vlm):
        model_type = AutoConfig.from_pretrained(models[0].vlm, trust_remote_code=False).model_type
    wrapper = wrapper_of(models[0].vlm, model_type)
    say_what_differs(str(flags.benchmarks), tasks)
    more = split_flags("--bench", flags.bench)
    start = [interpreter(flags.bench_python), "-m", "lmms_eval", "--model", wrapper]
    failed: list[str] = []
    for model in models:
        failed += run_model(model, model_type, tasks, out / model.folder, start, more)

    scores: dict[str, list[Scores]] = {}
    for model in models:
        files = {task: out / model.folder / f"{task}.json" for task in tasks}
        found = [read_scores(file, task) for task, file in files.items() if file.exists()]
        scores.setdefault(model.name, []).append({row: score for of in found for row, score in of.items()})
    print(benchmark_report.write(out, scores, [model._asdict() for model in models], command))
    if failed:
        raise ValueError(f"lmms-eval left no result for {', '.join(failed)}; the same command tries them again")


def models_of(flags: Flags) -> list[Model]:
    """The untuned host and the finished runs. Raises ValueError for runs of several hosts, or of several settings of Lavender."""
    finished = recall_all(flags.plain, flags.lavender)
    if len(found := settings({run.report.name for run in finished})) > 1:
        raise ValueError(
            f"--benchmarks compares one setting of Lavender with plain tuning; got {', '.join(sorted(found))}"
        )
    hosts = [run.flags.vlm for run in finished] or [data.SOURCES[flags.data].vlm]
    for run in finished:
        if run.flags.vlm != hosts[0]:
            raise ValueError(f"{run.report.folder} tuned {run.flags.vlm}, {finished[0].report.folder} {hosts[0]}")
    tuned = [Model(run.report.name, hosts[0], run.report.folder) for run in finished]
    return [Model(UNTUNED, hosts[0], None), *tuned]


def interpreter(python: str) -> str:
    """The path of the interpreter `python`. Raises ValueError, in one line, if it cannot be found or has no lmms-eval."""
    ask = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lmms_eval') is None)"
    found = shutil.which(python)
    if found is None or subprocess.run([found, "-c", ask]).returncode:
        raise ValueError(
            f"--bench_python {python} is no interpreter that has lmms-eval: run make bench-env, or name one in whose "
            "environment pip install 'lavender-min[bench]' was run"
        )
    return found


def say_what_differs(asked: str, tasks: list[str]) -> None:
    """Says on stderr, before hours pass, which of the paper's benchmarks are left out, and which need a key of OpenAI's."""
    if "paper" in asked.split(","):
        say(f"lmms-eval has no task for {', '.join(one.title for one in PAPER if not one.task)}")
    judged = [one.title for one in PAPER if one.judged and one.task in tasks]
    if judged and "OPENAI_API_KEY" not in os.environ:
        say(f"OPENAI_API_KEY is not set: in {', '.join(judged)} a model of OpenAI judges unclear answers")


def run_model(
    model: Model, model_type: str, tasks: list[str], folder: Path, start: list[str], more: list[str]
) -> list[str]:
    """Runs the tasks that have no result yet; returns those that still have none, as "task of model"."""
    asked = {"bench": more, "run": fingerprint(model)}
    note = folder / "asked.json"
    if note.exists() and read_json(note, dict) != asked:
        raise ValueError(
            f"{folder} holds results of other weights or another --bench: take another --out, or delete it"
        )
    missing = [task for task in tasks if not (folder / f"{task}.json").exists()]
    if not missing:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asked) + "\n")
    weights = folder / "exported"
    if not weights.exists():
        base, adapter = model.vlm, model.run
        if model.run is not None and export.base_of(Path(model.run)) == model.run:
            # Every weight was tuned, so the run is a host of its own.
            base, adapter = model.run, None
        export.write(base, adapter, weights)
    complete(weights, model_type)
    for task in missing:
        run_task(task, weights, folder, start, more)
    shutil.rmtree(weights)
    return [f"{task} of {model.run or model.vlm}" for task in missing if not (folder / f"{task}.json").exists()]


def fingerprint(model: Model) -> str:
    """Tells a run's weights from another's in the same folder, without reading them: the SHA-256 of what the Trainer logged.

    Two runs log different losses. "" for the untuned host.
    """
    return hashlib.sha256((Path(model.run) / "trainer_state.json").read_bytes()).hexdigest() if model.run else ""


def complete(weights: Path, model_type: str) -> None:
    """Names the processor's class for videos in processor_config.json, if that names none and the wrapper needs one.

    A processor that was saved without torchvision names none, and then cannot be loaded where torchvision is, as beside lmms-eval.
    """
    file = weights / "processor_config.json"
    held = read_json(file, dict)
    if model_type in VIDEO_PARTS and "video_processor" not in held:
        held["video_processor"] = {"video_processor_type": VIDEO_PARTS[model_type]}
        file.write_text(json.dumps(held, indent=2) + "\n")


def run_task(task: str, weights: Path, folder: Path, start: list[str], more: list[str]) -> None:
    """Runs one task in a process of its own. If that leaves a result, it becomes `folder`/<task>.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    aside = folder / f".tmp-{task}"
    shutil.rmtree(aside, ignore_errors=True)
    words = [*start, "--model_args", f"pretrained={weights},device_map={device}", "--device", device, "--tasks", task]
    words += ["--batch_size", "1", "--output_path", str(aside), *more]
    print(f"── {folder.name}: {task}", flush=True)
    subprocess.run(words)
    # lmms-eval's exit code is 0 even after an error, so only a result tells that the task was finished.
    for result in aside.rglob("*_results.json"):
        os.replace(result, folder / f"{task}.json")
    shutil.rmtree(aside, ignore_errors=True)
