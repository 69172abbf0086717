"""`evaluate.py` from end to end with untrained toy models, and what it says when something is wrong."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lavender_min import data
from lavender_min.evaluation import command, compare, models, own_picture
from lavender_min.evaluation.models import Loaded
from lavender_min.evaluation.sheet import make_sheet
from lavender_min.geometry import minmax
from lavender_min.hosts import base as hosts
from lavender_min.maps import MapStore, MapWriter
from lavender_min.toy import data as toy
from lavender_min.toy import models as toy_models
from lavender_min.tuning import collator, runs
from lavender_min.tuning.model import Lavender
from lavender_min.words import find_words

ROOT = Path(__file__).parents[2]


def script(name):
    spec = spec_from_file_location(name, ROOT / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


evaluate, train = script("evaluate"), script("train")
STAGES = {module: name for name, module in compare.STAGES.items()}


def store_of(folder, examples):
    """Maps that are the masks themselves; words without a mask get noise."""
    draw = torch.Generator().manual_seed(0)
    with MapWriter(folder, {"frame": "whole"}) as writer:
        for example in examples:
            words = find_words(example.fields)
            maps = torch.rand(len(words), 32, 32, generator=draw) * 0.01
            masks = {region[:3]: torch.from_numpy(region.mask) for region in example.regions(32)}
            for i, word in enumerate(words):
                if word[1:] in masks:
                    maps[i] = masks[word[1:]].float()
            writer.add(example.id, example.question, example.answer, words, maps, 0.9)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An untrained VLM, maps to tune with, maps of two held-out pictures."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    tune = toy.load("tune", 16)
    texts = [part for e in tune for part in (e.question, e.answer)] + [data.CAPTION_PROMPT, "user", "assistant"] * 10
    vlm, processor = toy_models.mllama(texts * 40)
    for name, parameter in vlm.named_parameters():
        if "gate" in name:
            parameter.data.fill_(0.5)  # gates start at 0: the picture would not be seen at all
    vlm.save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    store_of(folder / "maps", tune[:6])
    return folder


@pytest.fixture(scope="module")
def asked(world):
    train_flags = f"--vlm {world / 'vlm'} --maps {world / 'maps'} --limit 6 --max_steps 2 --logging_steps 1 --match all"
    out = ["--out", str(world / "out"), "--maps", str(world / "held"), "--scenes", "2"]
    return [*out, "--seeds", "2", "--train", train_flags]


@pytest.fixture
def stages(world, monkeypatch):
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


@pytest.fixture(scope="module")
def host(world):
    return hosts.load(str(world / "vlm"))


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
        evaluate.main(["--data", "coco"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and all(name in err for name in data.SOURCES)


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
    collating = collator.Collator(processor, vlm.config, family)

    class Echo(Lavender):
        def read(self, word_rows, echo, **inputs):
            assert {"layout", "input_ids", "pixel_values"} <= set(inputs) and not {"labels", "targets"} & set(inputs)
            return {"own": echo}

    def collate(rows):
        batch = collating(rows)
        return batch | {"echo": batch["targets"]}

    maps = models.read_maps(Echo(vlm), collate, sheet, 5)
    torch.testing.assert_close(maps["own"], minmax(sheet.maps), rtol=0, atol=0)

    def lossy(rows):
        batch = collating(rows)
        batch["word_rows"][0, 0] = -1
        return batch

    with pytest.raises(ValueError, match="lost a word"):
        models.read_maps(Echo(vlm), lossy, sheet, 5)


def test_answers_are_the_greedy_ones(host):
    """In a padded batch as in a plain argmax loop, one example at a time, without a cache."""
    vlm, processor, _ = host
    model = Lavender(vlm).eval()
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


def test_a_model_of_broken_weights_is_an_error(host, world, tmp_path):
    vlm, processor, family = host
    examples = toy.load("heldout", 1)
    store_of(tmp_path, examples)
    sheet = make_sheet(examples, MapStore(tmp_path))

    class Broken(Lavender):
        def read(self, word_rows, **inputs):
            return {"own": torch.full((*word_rows.shape[:2], 32, 32), torch.nan)}

    with pytest.raises(ValueError, match="not numbers"):
        models.read_maps(Broken(vlm), collator.Collator(processor, vlm.config, family), sheet, 8)


def test_a_4_bit_host_is_read_and_asked_outside_training(world, tmp_path):
    """bitsandbytes has a way of its own for evaluation on CPUs with AVX512-BF16, and it cannot do widths like 96."""
    vlm, processor, family = hosts.load(str(world / "vlm"), quantize=True)
    examples = toy.load("heldout", 1)
    store_of(tmp_path, examples)
    sheet = make_sheet(examples, MapStore(tmp_path))
    loaded = Loaded(Lavender(vlm), processor, family, "predicting")
    numbers, maps = compare.measure(loaded, sheet, "whole", 8, "4 bits")
    assert maps["own"].shape == sheet.maps.shape and "answers.all" in numbers["own"]


# ------------------------------------------------------------------------------------------------ one's own picture


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.jpg"
    toy.load("heldout", 1)[0].image().resize((150, 90)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """Folders of a Lavender run, as train.py leaves it, and of its adapter alone; and the run's model."""
    flags = runs.ModelFlags(str(world / "vlm"), attend="reading")
    model, *_ = runs.build(flags)
    with torch.no_grad():
        for name, parameter in model.vlm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    run, alone = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("alone")
    for folder in (run, alone):
        model.vlm.save_pretrained(folder)
    runs.remember(flags, run)
    save_file(model.align.state_dict(), run / runs.ALIGN_FILE)
    return run, alone, model.eval()


def test_maps_of_an_answer_are_those_of_its_teacher_forced_rows(host, mine, monkeypatch):
    """Held against the host's own eager attention at the rows that say each word, by hand."""
    monkeypatch.setattr(own_picture, "LONGEST", 20)
    vlm, processor, family = host
    image = command.open_picture(mine)
    loaded = Loaded(Lavender(vlm).eval(), processor, family, "reading")
    reply, words, maps = own_picture.answer(loaded, image, "what is it")
    assert words and maps.keys() == {"own"} and maps["own"].shape == (len(words), 32, 32)
    assert [word.text for word in words] == [reply[word.start : word.end] for word in words]

    text = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]},
            {"role": "assistant", "content": [{"type": "text", "text": reply}]},
        ]
    )
    batch = dict(processor(text=text, images=[[image]], add_special_tokens=False, return_tensors="pt"))
    offsets = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    layers = vlm.config.text_config.cross_attention_layers
    vlm.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            found = vlm(**batch, output_attentions=True, use_cache=False).attentions
    finally:
        vlm.set_attn_implementation({"text_config": "lavender"})
    attention = torch.stack([found[i][0].mean(0) for i in layers]).mean(0)  # [t, p]
    layout = family.layout(*image.size, processor, vlm.config, (0.0, 1.0, 0.0, 1.0))
    index = layout.index[0].long()
    begin = text.rindex(reply)
    for word, found_map in zip(words, maps["own"], strict=True):
        rows = [t for t, (a, b) in enumerate(offsets) if a < begin + word.end and b > begin + word.start]
        canvas = attention[rows].mean(0)[index.clamp(min=0)] * (index >= 0) * (index >= 0).sum()
        torch.testing.assert_close(found_map, layout.resize_y[0] @ canvas @ layout.resize_x[0].T, rtol=1e-3, atol=1e-4)


def test_an_own_picture_from_the_command_line(tuned, mine, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own_picture, "LONGEST", 9)  # an untrained model does not stop by itself
    run, alone, model = tuned
    said = {}
    asked = ["--image", mine, "--question", "what is it", "--out"]
    for name, flags in {
        "untuned": ["--vlm", str(world / "vlm")],
        "run": ["--adapter", str(run)],
        "adapter": ["--adapter", str(alone)],
        "moved": ["--adapter", str(alone), "--vlm", str(world / "vlm")],
    }.items():
        assert evaluate.main([*asked, str(tmp_path / name), *flags]) == 0, name
        said[name], where = capsys.readouterr().out.strip().rsplit("\n", 1)
        assert (tmp_path / name / "mine.png").read_bytes()[:4] == b"\x89PNG" and where.startswith(str(tmp_path / name))
    assert said["run"] == said["adapter"] == said["moved"] != said["untuned"]
    high = {name: Image.open(tmp_path / name / "mine.png").height for name in said}
    assert high["run"] > high["adapter"]  # the Aligner's maps stand below the model's own

    loaded = models.load_adapter(None, str(run), torch.float32)
    assert loaded.attend == "reading"
    for (name, a), b in zip(loaded.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_one_line_about_a_bad_picture_or_adapter(mine, tmp_path, capsys, world):
    broken, empty = tmp_path / "broken.png", tmp_path / "empty"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    empty.mkdir()
    for argv, message in (
        (["--image", str(tmp_path / "no.png")], "no.png: there is no such file"),
        (["--image", str(broken)], "broken.png is not a picture that can be read"),
        (["--image", mine, "--adapter", str(empty)], "holds no adapter_config.json"),
        (
            ["--image", mine, "--adapter", str(empty), "--vlm", str(world / "vlm")],
            "holds no adapter_config.json",
        ),
        (["--image", mine, "--vlm", str(empty)], "Unrecognized model"),
        (["--question", "what is it"], "give --image too"),
    ):
        assert evaluate.main([*argv, "--out", str(tmp_path / "out")]) == 2, argv
        err = capsys.readouterr().err.strip().rsplit("\r", 1)[-1].split("it/s]")[-1].strip()
        assert message in err and "\n" not in err and err.startswith("evaluate.py: "), err
    assert not (tmp_path / "out").exists()
