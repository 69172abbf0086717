"""One's own picture: the answer, and where each of its words looked."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lavender_min.evaluation import command, models, own_picture
from lavender_min.evaluation.models import Loaded
from lavender_min.hosts import load as hosts
from lavender_min.toy import data as toy
from lavender_min.toy import models as toy_models
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import Lavender

VLM = str(toy_models.VLM_FOLDER)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.jpg"
    toy.load("heldout", 1)[0].image().resize((150, 90)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Folders of a Lavender run, as train.py leaves it, and of its adapter alone; and the run's model."""
    flags = ModelFlags(VLM, attend="reading")
    torch.manual_seed(0)
    model, *_ = runs.build(flags)
    # Adapters start as zero. These change the answer.
    with torch.no_grad():
        for name, parameter in model.host.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    run, alone = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("alone")
    for folder in (run, alone):
        model.host.save_pretrained(folder)
    runs.remember(flags, run)
    save_file(model.align.state_dict(), run / runs.ALIGN_FILE)
    return run, alone, model.eval()


def test_maps_of_an_answer_are_those_of_its_teacher_forced_rows(mine, monkeypatch):
    """Held against the host's own eager attention at the rows that say each word, by hand."""
    monkeypatch.setattr(own_picture, "LONGEST", 20)
    vlm, processor, family = hosts.load(VLM)
    image = command.open_picture(mine)
    loaded = Loaded(Lavender(vlm, family).eval(), processor, "reading")
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
    with torch.no_grad():
        found = vlm(**batch, output_attentions=True, use_cache=False).attentions
    attention = torch.stack([found[i][0].mean(0) for i in layers]).mean(0)  # [t, p]
    [layout] = family.views(image.size, processor, vlm.config, torch.zeros(0, dtype=torch.long), (0.0, 1.0, 0.0, 1.0))
    index = layout.index[0].long()
    begin = text.rindex(reply)
    for word, found_map in zip(words, maps["own"], strict=True):
        rows = [t for t, (a, b) in enumerate(offsets) if a < begin + word.end and b > begin + word.start]
        canvas = attention[rows].mean(0)[index.clamp(min=0)] * (index >= 0) * (index >= 0).sum()
        torch.testing.assert_close(found_map, layout.resize_y[0] @ canvas @ layout.resize_x[0].T, rtol=1e-3, atol=1e-4)


def test_an_own_picture_from_the_command_line(tuned, mine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own_picture, "LONGEST", 9)
    run, alone, model = tuned
    said = {}
    asked = ["--image", mine, "--question", "what is it", "--out"]
    for name, flags in {
        "untuned": ["--vlm", VLM],
        "run": ["--adapter", str(run)],
        "adapter": ["--adapter", str(alone)],
        "moved": ["--adapter", str(alone), "--vlm", VLM],
    }.items():
        assert command.main([*asked, str(tmp_path / name), *flags]) == 0, name
        said[name], where = capsys.readouterr().out.strip().rsplit("\n", 1)
        assert (tmp_path / name / "mine.png").read_bytes()[:4] == b"\x89PNG" and where.startswith(str(tmp_path / name))
    assert said["run"] == said["adapter"] == said["moved"] != said["untuned"]
    high = {name: Image.open(tmp_path / name / "mine.png").height for name in said}
    # The Aligner's maps stand below the model's own.
    assert high["run"] > high["adapter"]

    loaded = models.load_adapter(None, str(run), torch.float32)
    assert loaded.attend == "reading"
    for (name, a), b in zip(loaded.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_one_line_about_a_bad_picture_or_adapter(mine, tmp_path, capsys):
    broken, empty = tmp_path / "broken.png", tmp_path / "empty"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    empty.mkdir()
    for argv, message in (
        (["--image", str(tmp_path / "no.png")], "no.png: there is no such file"),
        (["--image", str(broken)], "broken.png is not a picture that can be read"),
        (["--image", mine, "--adapter", str(empty)], "holds no adapter_config.json"),
        (
            ["--image", mine, "--adapter", str(empty), "--vlm", VLM],
            "holds no adapter_config.json",
        ),
        (["--image", mine, "--vlm", str(empty)], "Unrecognized model"),
        (["--question", "what is it"], "give --image too"),
        # An empty name is no wish for the whole evaluation.
        (["--image", ""], "--image needs the file of a picture"),
    ):
        assert command.main([*argv, "--out", str(tmp_path / "out")]) == 2, argv
        err = capsys.readouterr().err.strip().rsplit("\r", 1)[-1].split("it/s]")[-1].strip()
        assert message in err and "\n" not in err and err.startswith("evaluate.py: "), err
    assert not (tmp_path / "out").exists()


def test_the_drawing_does_not_replace_the_picture(tmp_path, capsys):
    picture = tmp_path / "cat.png"
    toy.load("heldout", 1)[0].image().save(picture)
    (tmp_path / "link").symlink_to(tmp_path)
    before = picture.read_bytes()
    for out in (tmp_path, tmp_path / "link"):
        assert command.main(["--image", str(picture), "--vlm", VLM, "--out", str(out)]) == 2
        assert f"--out {out} would write over --image {picture}" in capsys.readouterr().err
    assert picture.read_bytes() == before


def test_a_picture_that_links_to_itself_is_one_line(tmp_path, capsys):
    (tmp_path / "1.png").symlink_to(tmp_path / "1.png")
    assert command.main(["--image", str(tmp_path / "1.png"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"evaluate.py: --image {tmp_path / '1.png'}") and said.count("\n") == 1
