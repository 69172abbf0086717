"""Training in stages: each trains what it says and no other weight, goes on from the one before, and is done once."""

import json

import pytest
import tiny_parts
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from starting import digests
from transformers import AutoModelForImageTextToText

from lavender_min.hosts import assemble
from lavender_min.hosts.load import load
from lavender_min.tuning import runs, stages, tune
from lavender_min.tuning.flags import ModelFlags

SHARED = {
    "full": True, "plain": True, "data": "toy", "limit": 8, "max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no",
    "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True,
}  # fmt: skip
CONFIGS = sorted((ROOT / "configs").glob("*stages*.yaml"))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    where = tmp_path_factory.mktemp("host")
    torch.manual_seed(0)
    words = [
        "--vision",
        tiny_parts.siglip(where / "siglip"),
        "--llm",
        tiny_parts.qwen2(where / "qwen2"),
        where / "host",
    ]
    assert assemble.main(list(map(str, words))) == 0
    return where / "host"


@pytest.fixture(autouse=True)
def without_collections(monkeypatch):
    """Of garbage, between stages: with all that tests hold, each takes a second."""
    monkeypatch.setattr(stages.gc, "collect", lambda *generation: 0)


@pytest.fixture
def schedule(tmp_path):
    """Writes a schedule of these stages, and gives the words of the command that trains it into a folder."""

    def write(folder, shared=SHARED, **parts):
        file = tmp_path / "schedule.yaml"
        file.write_text(yaml.safe_dump({"shared": shared, "stages": parts}, sort_keys=False))
        return [str(file), "--output_dir", str(tmp_path / folder)]

    return write


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after):
    """The components of which a weight is another."""
    first, second = weights(before), weights(after)
    assert first.keys() == second.keys()
    names = {"model.vision_tower": "vision", "model.multi_modal_projector": "projector"}
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    return {names.get(".".join(name.split(".")[:2]), "language") for name in moved}


def test_four_stages_train_what_they_say_one_after_another(host, schedule, store_folder, tmp_path):
    argv = schedule(
        "out",
        projector={"train_only": "projector"},
        aligned={"train_only": "projector,language", "plain": False, "maps": store_folder, "match": "all"},
        adapters={"full": False, "lora": True, "lora_targets": "language", "lora_dropout": 0, "learning_rate": 1e-2},
        whole={},
    )
    assert stages.main([*argv, "--vlm", str(host)]) == 0
    out = tmp_path / "out"
    merged = out / "3-adapters" / stages.MERGED
    assert changed(host, out / "1-projector") == {"projector"}
    assert changed(out / "1-projector", out / "2-aligned") == {"projector", "language"}
    assert changed(out / "2-aligned", merged) == {"language"}
    assert changed(merged, out / "4-whole") == {"vision", "projector", "language"}
    assert (out / "2-aligned" / runs.ALIGN_FILE).exists() and not (out / "4-whole" / runs.ALIGN_FILE).exists()
    assert AutoModelForImageTextToText.from_pretrained(out / "4-whole").config.model_type == "bidirectional_llava"


def test_what_was_killed_in_a_stage_goes_on_there(host, schedule, monkeypatch, tmp_path, capsys):
    """And ends bit for bit as what was not. Stages that are finished are not trained again."""
    parts = {
        "projector": {"train_only": "projector"},
        "whole": {"max_steps": 3, "save_strategy": "steps", "save_steps": 2},
    }
    whole = [*schedule("whole", **parts), "--vlm", str(host)]
    assert stages.main(whole) == 0

    trained, train = [], tune.train
    monkeypatch.setattr(tune, "train", lambda *given: trained.append(given[1].output_dir) or train(*given))
    step = tune.LavenderTrainer.training_step

    def killed(trainer, *args, **kwargs):
        if trainer.args.output_dir.endswith("2-whole") and trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    broken = [*schedule("broken", **parts), "--vlm", str(host)]
    with monkeypatch.context() as patch:
        patch.setattr(tune.LavenderTrainer, "training_step", killed)
        assert stages.main(broken) == 130
    first = digests(tmp_path / "broken" / "1-projector")
    assert not (tmp_path / "broken" / "2-whole" / "model.safetensors").exists()
    assert stages.main(broken) == 0
    second = str(tmp_path / "broken" / "2-whole")
    assert f"going on from {second}/checkpoint-2" in capsys.readouterr().out
    assert trained == [str(tmp_path / "broken" / "1-projector"), second, second]
    assert digests(tmp_path / "broken" / "1-projector") == first
    assert not changed(tmp_path / "whole" / "2-whole", tmp_path / "broken" / "2-whole")
    assert stages.main(broken) == 0 and len(trained) == 3


def test_a_stage_that_is_stopped_stops_the_schedule(schedule, monkeypatch, tmp_path):
    """SIGTERM lets train.py save, and end with 143."""
    codes = [0, 143]
    monkeypatch.setattr(stages.command, "train", lambda argv: codes.pop(0))
    assert stages.main(schedule("out", a={}, b={}, c={})) == 143 and not codes


def test_a_finished_stage_with_other_flags_is_refused(host, schedule, tmp_path, capsys):
    argv = [*schedule("out", projector={"train_only": "projector"}), "--vlm", str(host)]
    assert stages.main(argv) == 0
    schedule("out", projector={"train_only": "language"})
    assert stages.main(argv) == 2
    assert f"{tmp_path}/out/1-projector holds a run with other flags (--train_only " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {learnin_rate: 1}}", ", stage a: train.py has no flag learnin_rate"),
        ("stages: {a: {}}\nshred: {}", ", shred: extra inputs are not permitted; got {}"),
        ("shared: {}", ", stages: field required"),
        ("stages: {}", ": a schedule has at least one stage"),
        ("stages: {a: }", ", stages.a: input should be a valid dictionary; got None"),
        ("stages: {1: {}}", ", stages.1: input should be a valid string; got 1"),
        ("stages: {a: [", ": ParserError: "),
        ("stages: {a: {learning_rate: fast}}", ", stage a: train.py: argument --learning_rate"),
        ("stages: {a: {learning_rate: -1}}", ", stage a: --learning_rate must be a finite number"),
        ("stages: {a: {lora_r: 0}}", ", stage a: --lora_r must be a whole number of at least 1; got 0"),
        ("stages: {a: {output_dir: x}}", ", stage a: output_dir is not for a schedule to say"),
        ("stages: {a: {}, b: {vlm: x}}", ", stage b: its vlm is what the stage before it leaves"),
        ("stages: {a/b: {}}", ", stage a/b: a stage's name becomes a folder's"),
        ("stages: {a: {train_only: projector}}", ", stage a: --train_only projector goes with --full"),
        ("stages: {a: {full: true, train_only: (}}", ", stage a: --train_only ( is no regular expression"),
        ("stages: {a: {data: toy, plain: true}, b: {data: folder, plain: true}}", ", stage b: no data in data/folder"),
        ("stages: {a: {data: toy, plain: true}, b: {data: toy, maps: nowhere}}", ", stage b: no maps in nowhere; make them first"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_schedule_is_one_line_with_the_files_name(tmp_path, capsys, monkeypatch, text, message):
    """Before anything is trained: a fault in the last stage is found at once."""
    monkeypatch.setattr(stages.command, "train", lambda argv: pytest.fail("a stage was begun"))
    file = tmp_path / "schedule.yaml"
    file.write_text(text)
    assert stages.main([str(file), "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stages: ")]
    assert line.startswith(f"stages: {file}{message}") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_shipped_schedules_can_be(file, tmp_path):
    """Four stages; the first ones train the projector alone, the last ones all of the host."""
    found = [stages.flags_of(stage) for stage in stages.read(file, "", tmp_path)]
    assert [flags.train_only for flags in found] == ["projector", "projector", "", ""]
    assert all(flags.mode == "full" for flags in found)
    assert [flags.vlm for flags in found[1:]] == [str(tmp_path / name) for name in folders(file)[:-1]]


def folders(file):
    return [f"{i}-{name}" for i, name in enumerate(yaml.safe_load(file.read_text())["stages"], 1)]


def test_there_are_schedules():
    assert [file.name for file in CONFIGS] == ["four_stages.yaml", "four_stages_toy.yaml"]


def test_values_of_yaml_become_flags():
    given = yaml.safe_load("{a: 1e-3, b: true, c: [x, y], d: null, e: {f: 1}, g: text with spaces}")
    assert [stages.as_flag(*pair) for pair in given.items()] == [
        ["--a=1e-3"], ["--b=true"], ["--c", "x", "y"], [], ['--e={"f": 1}'], ["--g=text with spaces"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["bidirectional", "mllama"])
def test_components_are_the_familys(host, vlm_folder, name):
    model, _, family = load(str(host) if name == "bidirectional" else vlm_folder)
    tower, projector = family.vision(model)
    sizes = {
        "vision": sum(p.numel() for p in tower.parameters()),
        "projector": sum(p.numel() for p in projector.parameters()),
    }
    sizes["language"] = sum(p.numel() for p in model.parameters()) - sum(sizes.values())
    for wanted in ("vision", "projector", "language", "projector,vision"):
        runs.freeze_others(model, family, wanted)
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trains == sum(sizes[part] for part in wanted.split(","))
    runs.freeze_others(model, family, r".*layers\.0\..*q_proj\.weight")
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trains and all("layers.0." in n and n.endswith("q_proj.weight") for n in trains)
    with pytest.raises(ValueError, match="--train_only nothing names no parameter of the host"):
        runs.freeze_others(model, family, "nothing")


def test_a_run_remembers_what_it_trained(tmp_path):
    runs.remember(ModelFlags("host", mode="full", train_only="projector"), tmp_path)
    assert json.loads((tmp_path / runs.FLAGS_FILE).read_text())["train_only"] == "projector"
