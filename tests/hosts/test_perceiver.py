"""A host that sees through a small VLM: built by the command, loaded, tuned in 4 bits by train.py, exported."""

import shutil

import pytest
import tiny_parts
import torch
import zoo
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from lavender_min.hosts import assemble, perceiver
from lavender_min.hosts.architectures import VlmPerceiver
from lavender_min.hosts.load import load
from lavender_min.toy import models
from lavender_min.tuning import command, export, runs
from lavender_min.tuning.flags import ModelFlags

PATCHES = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("hosts")
    torch.manual_seed(0)
    tiny_parts.siglip(where / "siglip")
    tiny_parts.qwen2(where / "small")
    # Another width, and no chat template: a language model that was never asked anything.
    tiny_parts.qwen2(where / "large", None, hidden_size=96, num_attention_heads=6, num_hidden_layers=3)
    for mask in assemble.MASKS:
        words = ["--vision", str(where / "siglip"), "--llm", str(where / "small"), "--mask", mask, str(where / mask)]
        assert assemble.main(words) == 0
        words = ["--perceiver", str(where / mask), "--llm", str(where / "large"), str(where / f"through-{mask}")]
        assert perceiver.main(words) == 0
    return where


def picture():
    image = Image.new("RGB", (90, 60), "white")
    image.paste("red", (0, 0, 30, 60))
    return image


def inputs_of(processor):
    return dict(processor(text=["USER: <image>\nwhat? ASSISTANT: "], images=[[picture()]], return_tensors="pt"))


@pytest.mark.parametrize("mask", assemble.MASKS)
def test_it_gives_what_the_small_vlm_makes_of_a_picture(folders, mask):
    """Its last hidden states at the picture's tokens, in a turn that the small VLM's own processor has written."""
    tower = AutoModelForImageTextToText.from_pretrained(folders / f"through-{mask}").model.vision_tower.eval()
    assert type(tower) is VlmPerceiver and tower.config.hidden_size == 64
    small = AutoModel.from_pretrained(folders / mask).eval()
    processor = AutoProcessor.from_pretrained(folders / mask)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    inputs = processor(text=[processor.apply_chat_template(asked)], images=[[picture()]], return_tensors="pt")
    with torch.no_grad():
        hidden = small(**inputs).last_hidden_state[inputs["input_ids"] == processor.image_token_id]
        seen = tower(pixel_values=inputs["pixel_values"]).last_hidden_state[0]
    # What follows the picture in the text changes nothing, since neither mask lets it be seen from there.
    torch.testing.assert_close(seen, hidden, atol=1e-5, rtol=1e-4)
    assert len(seen) == PATCHES and seen.std(0).min() > 0.01


def test_it_loads_bit_equal_and_trains_whole(folders, tmp_path):
    name = folders / "through-bidirectional"
    model, processor = AutoModelForImageTextToText.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = inputs_of(processor)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == PATCHES
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # LLaVA takes the last layer's output before SigLIP's closing norm.
    assert all("vision_tower.post_layernorm" in n for n in unreached)


def test_only_the_large_models_attention_is_read(folders):
    host = load(str(folders / "through-causal"))
    attention = host.model.model.language_model.config._attn_implementation
    small = host.model.model.vision_tower.vlm.language_model.config._attn_implementation
    assert (attention, small) == ("lavender", "sdpa") and list(host.family.layers(host.model)) == [0, 1, 2]
    assert next(iter(host.family.layers(host.model).values())).config.hidden_size == 96
    adapted = runs.with_adapters(host.model, host.family, ModelFlags("", lora_targets="language"))
    assert not any("vision_tower" in name for name, p in adapted.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", ["qlora", "full"])
def test_it_is_tuned_and_exported(folders, store_folder, tmp_path, mode):
    """Two steps with alignment. What is exported has the tuned host's logits."""
    name, run = folders / "through-bidirectional", tmp_path / "run"
    argv = [
        "--data", "toy", "--vlm", str(name), "--maps", store_folder, "--limit", "8", f"--{mode}", "--match", "all",
        "--output_dir", str(run), "--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true",
        *([] if mode == "full" else ["--lora_dropout", "0"]), "--gradient_checkpointing", "--learning_rate", "1e-2",
    ]  # fmt: skip
    assert command.main(argv) == 0
    assert export.main([str(run), str(tmp_path / "exported")]) == 0
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder).eval() for folder in (name, tmp_path / "exported")
    )
    inputs = inputs_of(AutoProcessor.from_pretrained(tmp_path / "exported"))
    with torch.no_grad():
        assert (before(**inputs).logits - after(**inputs).logits).abs().max() > 1e-3
        if mode == "full":
            tuned = AutoModelForImageTextToText.from_pretrained(run).eval()
            assert torch.equal(tuned(**inputs).logits, after(**inputs).logits)


@pytest.mark.parametrize(
    ("small", "message"),
    [
        ("large", "expected a vision-language model, found a qwen2"),
        ("toy", "mllama takes pixel_values of shape [1, 1, 4, 3, 64, 64], aspect_ratio_ids, aspect_ratio_mask"),
        ("nowhere", "there is no such folder"),
    ],
)
def test_what_cannot_be_a_perceiver_is_refused_in_one_line(folders, tmp_path, capsys, small, message):
    name = models.VLM_FOLDER if small == "toy" else folders / small
    assert perceiver.main(["--perceiver", str(name), "--llm", str(folders / "large"), str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perceiver: ")]
    assert len(lines) == 1 and message in lines[0] and str(name) in lines[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_only_one_square_picture_will_do(kind):
    """Tiles, native resolutions and extra inputs are refused, before any weight is loaded."""
    model, processor = zoo.built(kind)
    if kind in ("llava", "bidirectional_llava"):
        config = perceiver.config_of(model.config, processor)
        assert (config.image_size, config.patch_size) == (zoo.TILE, zoo.PATCH)
        assert config.prompt[-PATCHES:] == [model.config.image_token_id] * PATCHES
    else:
        with pytest.raises(ValueError, match=rf"^{kind} takes pixel_values of shape .*; a perceiver takes one square"):
            perceiver.config_of(model.config, processor)


def test_a_folder_that_is_not_empty_is_left_alone(folders, tmp_path, capsys):
    shutil.copytree(folders / "siglip", tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        perceiver.main(["--perceiver", "x", "--llm", "y", str(tmp_path / "out")])
    assert f"perceiver: argument out: {tmp_path / 'out'} is not empty: give a new folder" in capsys.readouterr().err
