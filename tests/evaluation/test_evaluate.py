"""`evaluate.py` from end to end with untrained toy models, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from conftest import ROOT
from mask_maps import store_of

from lavender_min import data
from lavender_min.evaluation import compare, models
from lavender_min.evaluation.models import Loaded
from lavender_min.evaluation.sheet import make_sheet
from lavender_min.geometry import minmax
from lavender_min.hosts import load as hosts
from lavender_min.maps import MapStore
from lavender_min.toy import data as toy
from lavender_min.tuning import collator
from lavender_min.tuning.model import Lavender


def script(name):
    spec = spec_from_file_location(name, ROOT / f"{name}.py")
    module = module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


evaluate, train = script("evaluate"), script("train")
STAGES = {module: name for name, module in compare.STAGES.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder in which everything is made."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def host(vlm_folder):
    return hosts.load(vlm_folder)


@pytest.fixture(scope="module")
def asked(world, vlm_folder, store_folder):
    train_flags = f"--vlm {vlm_folder} --maps {store_folder} --limit 6 --max_steps 2 --logging_steps 1 --match all"
    out = ["--out", str(world / "out"), "--maps", str(world / "held"), "--scenes", "2"]
    return [*out, "--seeds", "2", "--train", train_flags]


@pytest.fixture
def stages(monkeypatch):
    """Runs stages 1 and 2 in this process (or not at all) and notes their flags."""
    called = []

    def run(command):
        assert command[:2] == [sys.executable, "-m"]
        name, flags = STAGES[command[2]], command[3:]
        called.append((name, flags))
        if name == "extract.py":
            store_of(flags[flags.index("--maps") + 1], toy.load("heldout")[: int(flags[flags.index("--limit") + 1])])
        else:
            monkeypatch.setattr(sys, "argv", [name, *flags])
            train.main()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    return called


def test_end_to_end_and_once_more(asked, stages, world, capsys):
    assert evaluate.main(asked) == 0
    names = [name for name, _ in stages]
    assert names == ["extract.py"] + ["train.py"] * 4
    assert stages[0][1][:7] == ["--data", "toy", "--split", "heldout", "--limit", "12", "--maps"]
    assert ["--plain" in flags for _, flags in stages[1:]] == [False, True, False, True]
    assert [flags[flags.index("--seed") + 1] for _, flags in stages[1:]] == ["0", "0", "1", "1"]

    out, err = capsys.readouterr()
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    expected = [
        "",
        "an even map (chance)",
        "Stable Diffusion",
        "untuned",
        "plain tuning",
        "Lavender",
        "Lavender, through the Aligner",
    ]
    assert [row for row in rows[:8] if not row.startswith("-")] == expected
    assert "interval excludes 0" in out and "untuned: maps" in err and "Lavender lavender-1: answers" in err

    folder = world / "out"
    content = json.loads((folder / "report.json").read_text())
    found = content["models"]
    assert found["Stable Diffusion"]["mean"]["pointing.all"] == found["Stable Diffusion"]["mean"]["mass.all"] == 1
    assert {name: len(of["runs"]) for name, of in found.items()} == {
        "an even map (chance)": 1, "Stable Diffusion": 1, "untuned": 1,
        "plain tuning": 2, "Lavender": 2, "Lavender, through the Aligner": 2,
    }  # fmt: skip
    assert {f"answers.{kind}" for kind in ("all", "color", "exists", "place", "count", "relation")} <= set(
        found["untuned"]["mean"]
    )
    assert len(content["commands"]) == 6 and content["commands"][-1].startswith("python evaluate.py --out")
    assert [run["flags"]["plain"] for run in content["training"]] == [True, True, False, False]
    text = (folder / "report.md").read_text()
    assert all(command in text for command in content["commands"]) and "Lavender against plain tuning" in text
    for picture in ("maps.png", "curves.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG" and f"]({picture})" in text

    # All is there already: nothing is made again, one pair of the runs can be given by hand, and numbers stay.
    stages.clear()
    pair = ["--plain", str(folder / "plain-1"), "--lavender", str(folder / "lavender-1"), "--out", str(world / "again")]
    assert evaluate.main([*pair, "--maps", str(world / "held"), "--scenes", "2", "--batch_size", "5"]) == 0
    assert stages == []
    again = json.loads((world / "again" / "report.json").read_text())
    assert again["models"]["Lavender"]["interval95"]["mass.all"] is None
    for name in ("untuned", "plain tuning", "Lavender", "Lavender, through the Aligner"):
        assert again["models"][name]["runs"][0] == pytest.approx(found[name]["runs"][-1], rel=1e-3, abs=1e-6)

    capsys.readouterr()
    wrong = {
        f"{folder} holds runs made with --train": [*asked[:-1], "--max_steps 3"],
        "was tuned without alignment: give it as --plain": ["--lavender", str(folder / "plain-0"), *asked[:6]],
        "was tuned with alignment: give it as --lavender": ["--plain", str(folder / "lavender-0"), *asked[:6]],
        "holds runs that --seeds did not make": ["--out", str(world / "other"), *asked[2:]],
    }
    (world / "other").mkdir()
    (folder / "lavender-1").rename(world / "other" / "lavender-1")
    (world / "other" / "plain-0").mkdir()
    (world / "other" / "plain-0" / "lavender.json").write_text((folder / "plain-0" / "lavender.json").read_text())
    wrong["is not finished (no trainer_state.json)"] = ["--plain", str(world / "other" / "plain-0"), *asked[:6]]
    for message, argv in wrong.items():
        assert evaluate.main(argv) == 2
        err = capsys.readouterr().err.strip()
        assert message in err and "\n" not in err, err
    assert stages == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--data", "flickr30k"],
            "--data flickr30k has no regions: it does not say where the thing that a word names is",
        ),
        (["--scenes", "9999"], "--scenes 9999: there are 512 held-out pictures"),
        (["--train", "--lora"], "give --seeds too"),
        (["--plain", "no/such"], "no/such is not the --output_dir of a run of train.py"),
        (["--seeds", "2", "--plain", "a"], "--seeds makes its own runs: leave out --plain and --lavender"),
        (["--seeds", "2", "--train", "--seed=3"], "--train must not hold --seed=3"),
        (["--seeds", "2", "--train", '--vlm "x'], "--train '--vlm \"x' cannot be read as flags: No closing quotation"),
    ],
)
def test_one_line_says_what_is_wrong(argv, message, capsys, stages, tmp_path):
    assert evaluate.main([*argv, "--out", str(tmp_path / "out"), "--maps", str(tmp_path / "maps")]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err and err.startswith("evaluate.py: ")
    assert [name for name, _ in stages] == []  # before anything that takes time
    assert not (tmp_path / "out").exists()


def test_a_flag_of_no_use_ends_with_exit_code_2(capsys):
    assert evaluate.main(["--scenes", "0"]) == 2
    assert capsys.readouterr().err == "evaluate.py: --scenes must be a whole number of at least 1; got 0\n"
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--data", "imagenet"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and all(name in err for name in data.SOURCES)


def test_flags_are_checked_before_torch_is_imported(tmp_path):
    """So the help and the first errors come at once, from any folder and without the scripts."""
    code = "import sys, lavender_min.evaluation.command as c; c.main(sys.argv[1:]); print('torch' in sys.modules)"
    for argv, message in {
        ("--data", "folder"): "--data folder has no regions",
        ("--scenes", "0"): "--scenes must be a whole number",
        ("--image", "nowhere.jpg"): "--image nowhere.jpg: there is no such file",
    }.items():
        command = [sys.executable, "-c", code, *argv]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert (done.stdout, message in done.stderr) == ("False\n", True), done.stderr


@pytest.mark.parametrize("script", list(compare.STAGES))
def test_the_other_stages_are_started_as_modules(script, tmp_path, monkeypatch):
    """From a folder without scripts, as where the package is installed. Code 2: it came as far as its own flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(ValueError, match=f"{script} ended with exit code 2"):
        compare.call(script, ["--data", "nowhere"])


def test_a_stage_that_fails_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 2))
    assert evaluate.main(["--maps", str(tmp_path / "maps"), "--scenes", "1", "--extract", "--recipe noise"]) == 2
    err = capsys.readouterr().err
    assert "extract.py ended with exit code 2" in err and "--limit 6" in err and "--recipe noise" in err


# ------------------------------------------------------------------------------------------- reading and answering


def test_maps_are_those_of_the_words(world, host, tmp_path):
    """A stand-in that hands back the targets the collator made: word by word they must be the sheet's own maps."""
    vlm, processor, family = host
    examples = toy.load("heldout", 2)
    store_of(tmp_path, examples)
    sheet = make_sheet(examples, MapStore(tmp_path))
    collating = collator.Collator(processor, family, vlm.config)

    class Echo(Lavender):
        def read(self, words, **inputs):
            assert {"input_ids", "pixel_values"} <= set(inputs) and "labels" not in inputs
            return {"own": words["targets"]}

    maps = models.read_maps(Echo(vlm, family), collating, sheet, 5)
    torch.testing.assert_close(maps["own"], minmax(sheet.maps), rtol=0, atol=0)

    def lossy(rows):
        batch = collating(rows)
        batch["words"]["tokens"][batch["words"]["lengths"][0] - 1] = -1
        return batch

    with pytest.raises(ValueError, match="lost a word"):
        models.read_maps(Echo(vlm, family), lossy, sheet, 5)


def test_answers_are_the_greedy_ones(host):
    """In a padded batch as in a plain argmax loop, one example at a time, without a cache."""
    vlm, processor, family = host
    model = Lavender(vlm, family).eval()
    examples = [e for e in toy.load("heldout", 1) if e.question][:3]
    replies = models.answer(model, processor, examples, 2)
    longest = max(len(processor.tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in examples)
    for example, reply in zip(examples, replies, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": example.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        batch = dict(processor(text=prompt, images=[[example.image()]], add_special_tokens=False, return_tensors="pt"))
        said = []
        while len(said) < longest + 8 and processor.tokenizer.eos_token_id not in said:
            with torch.no_grad():
                said.append(vlm(**batch, use_cache=False).logits[0, -1].argmax().item())
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([said[-1:]])], 1)
            for mask in ("attention_mask", "cross_attention_mask"):  # a new row sees what the last one saw
                batch[mask] = torch.cat([batch[mask], batch[mask][:, -1:]], 1)
        assert reply == processor.tokenizer.decode(said, skip_special_tokens=True), example.id


def test_a_model_of_broken_weights_is_an_error(host, tmp_path):
    vlm, processor, family = host
    examples = toy.load("heldout", 1)
    store_of(tmp_path, examples)
    sheet = make_sheet(examples, MapStore(tmp_path))

    class Broken(Lavender):
        def read(self, words, **inputs):
            return {"own": torch.full_like(words["targets"], torch.nan)}

    with pytest.raises(ValueError, match="not numbers"):
        models.read_maps(Broken(vlm, family), collator.Collator(processor, family, vlm.config), sheet, 8)


def test_a_4_bit_host_is_read_and_asked_outside_training(vlm_folder, tmp_path):
    """bitsandbytes has a way of its own for evaluation on CPUs with AVX512-BF16, and it cannot do widths like 96."""
    vlm, processor, family = hosts.load(vlm_folder, quantize=True)
    examples = toy.load("heldout", 1)
    store_of(tmp_path, examples)
    sheet = make_sheet(examples, MapStore(tmp_path))
    loaded = Loaded(Lavender(vlm, family), processor, "predicting")
    numbers, maps = compare.measure(loaded, sheet, "whole", 8, "4 bits")
    assert maps["own"].shape == sheet.maps.shape and "answers.all" in numbers["own"]
