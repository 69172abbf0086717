"""Processors that cannot be built whole: what is built makes the same inputs, and a folder that it saves still names the whole."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import zoo
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from lavender_min.hosts import processors

KINDS = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
SETTINGS = {"video_processor_type": "SomeVideoProcessor", "do_resize": True, "size": {"height": 28, "width": 28}}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
missing = pytest.mark.skipif(is_torchvision_available(), reason="with torchvision these processors are built whole")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each kind: config, tokenizer, image processor, chat template; nothing about videos."""
    where = tmp_path_factory.mktemp("processors")
    for kind in (*KINDS, "llava"):
        zoo.save(kind, where / kind)
    return where


@pytest.fixture(autouse=True)
def untold():
    processors.tell.cache_clear()


def edit(file, change):
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))
    return held


def nested(folder):
    """As transformers 5 saves it: the parts stand in the processor's own file."""
    edit(folder / "processor_config.json", lambda held: held.update(video_processor=SETTINGS))
    return SETTINGS


def beside(folder):
    """As transformers 4 saved it last: in a file of its own."""
    (folder / "video_preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return SETTINGS


def old(folder):
    """As it was saved first: videos follow the pictures' file."""
    held = edit(folder / "processor_config.json", lambda held: None)
    (folder / "preprocessor_config.json").write_text(json.dumps(held["image_processor"]))
    return held["image_processor"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_pictures_become_the_same_inputs(folders, kind):
    found, expected = processors.load(str(folders / kind)), zoo.built(kind)[1]
    text = expected.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert found.apply_chat_template(MESSAGES, add_generation_prompt=True) == text
    pictures = [[Image.effect_noise(size, 90).convert("RGB")] for size in ((150, 90), (40, 133))]
    ours, theirs = (p(text=[text, text], images=pictures, padding=True, return_tensors="pt") for p in (found, expected))
    assert ours.keys() == theirs.keys() and len(ours["input_ids"][0]) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@missing
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", [nested, beside, old])
def test_a_saved_folder_loads_as_the_whole_elsewhere(folders, tmp_path, kind, written):
    """It names the whole class, and its settings for videos are those that transformers read from the first folder."""
    source = shutil.copytree(folders / kind, tmp_path / "source")
    settings = written(source)
    class_name = json.loads((source / "processor_config.json").read_text())["processor_class"]
    for folder in (source, tmp_path / "saved"):
        processor = processors.load(str(folder))
        processor.save_pretrained(tmp_path / "saved")
        shutil.copy(source / "config.json", tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "processor_config.json").read_text())["processor_class"] == class_name
        assert BaseVideoProcessor.get_video_processor_dict(tmp_path / "saved")[0] == settings
        assert (tmp_path / "saved" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


@missing
def test_it_is_said_once_in_one_line(folders, capsys):
    for _ in range(2):
        processors.load(str(folders / "qwen2_5_vl"))
    said = [line for line in capsys.readouterr().err.splitlines() if "videos" in line]
    assert said == [
        "Qwen2_5_VLProcessor is used for pictures only: its part for videos, which wants torchvision, could not be built"
    ]


def test_a_processor_that_can_be_built_whole_is_left_as_it_is(folders, monkeypatch, capsys):
    whole = SimpleNamespace(chat_template="of its own")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name, trust_remote_code: whole)
    assert processors.load(str(folders / "qwen2_5_vl")) is whole and not capsys.readouterr().err


def test_a_processor_without_a_part_for_videos_is_transformers_own(folders, capsys):
    assert type(processors.load(str(folders / "llava"))).__module__.startswith("transformers.")
    assert "videos" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("file", ["tokenizer.json", "processor_config.json"])
def test_files_that_are_broken_stay_an_error(folders, tmp_path, kind, file, capsys):
    broken = shutil.copytree(folders / kind, tmp_path / kind)
    (broken / file).write_text('{"version": ')
    with pytest.raises((OSError, ValueError)):
        processors.load(str(broken))
    assert "videos" not in capsys.readouterr().err
