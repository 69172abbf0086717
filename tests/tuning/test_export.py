"""A run becomes a folder that needs nothing of this package, and answers as the adapted model did."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from lavender_min.data import Example
from lavender_min.tuning import export, runs
from lavender_min.tuning.collator import Collator

ELSEWHERE = """
import sys
sys.modules["lavender_min"] = None  # importing it is an error now
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
vlm, processor = AutoModelForImageTextToText.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])
given = torch.load(sys.argv[2], weights_only=False)
text = processor.apply_chat_template(given["messages"])
batch = dict(processor(text=text, images=[[given["image"]]], add_special_tokens=False, return_tensors="pt"))
assert all(torch.equal(batch[name], value) for name, value in given["batch"].items())
with torch.no_grad():
    torch.save(vlm.eval()(**batch).logits, sys.argv[3])
"""


@pytest.fixture
def tuned(vlm_folder, tmp_path):
    """A finished run's folder, its adapter far from its start, and what it says: (folder, model, processor)."""

    def make(mode, **changes):
        flags = runs.ModelFlags(vlm_folder, mode=mode, lora_targets="language", **changes)
        model, processor = runs.build(flags)
        with torch.no_grad():
            for name, parameter in model.host.named_parameters():
                if "lora_B" in name or (mode == "full" and "q_proj" in name):
                    parameter.normal_(std=0.05)
        model.host.save_pretrained(tmp_path / "run")
        processor.save_pretrained(tmp_path / "run")
        runs.remember(flags, tmp_path / "run")
        return tmp_path / "run", model.eval(), processor

    return make


def test_the_folder_answers_alike_where_the_package_is_unknown(tuned, tmp_path):
    folder, model, processor = tuned("lora", plain=True)
    image = Image.effect_noise((130, 70), 80).convert("RGB")
    example = Example("one", lambda: image, "what is it", "a noise")
    batch = Collator(processor, model.family, model.base.config)([(example, None)])
    names = (
        "input_ids",
        "attention_mask",
        "cross_attention_mask",
        "pixel_values",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
    )
    batch = {name: batch[name] for name in names}
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a noise"}]},
    ]
    with torch.no_grad():
        expected = model.host(**batch).logits
        with model.host.disable_adapter():
            assert (model.host(**batch).logits - expected).abs().max() > 0.1
    torch.save({"messages": messages, "image": image, "batch": batch}, tmp_path / "given.pt")

    export.export(folder, tmp_path / "out")
    assert not any("adapter" in path.name or "lavender" in path.name for path in (tmp_path / "out").iterdir())
    command = [sys.executable, "-c", ELSEWHERE, tmp_path / "out", tmp_path / "given.pt", tmp_path / "logits.pt"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_tuned_on_4_bits_is_merged_into_the_published_weights(tuned, vlm_folder, tmp_path):
    folder, model, *_ = tuned("qlora", plain=True)
    export.export(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    from safetensors.torch import load_file

    before, after = (load_file(f"{at}/model.safetensors") for at in (vlm_folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    name = "model.language_model.layers.1.cross_attn.q_proj"
    layer = model.host.get_submodule(f"base_model.{name.replace('model.', 'model.model.', 1)}")
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    key = next(key for key in before if key.endswith("layers.1.cross_attn.q_proj.weight"))
    torch.testing.assert_close(after[key] - before[key], change.detach(), rtol=1e-4, atol=1e-6)
    same = [key for key in before if "language_model" not in key]
    assert same and all(torch.equal(before[key], after[key]) for key in same)


def test_a_run_that_tuned_every_weight_is_its_own_base(tuned, tmp_path):
    folder, model, *_ = tuned("full", plain=True)
    export.export(folder, tmp_path / "out")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in model.host.state_dict().items())


def test_a_plain_peft_adapter_will_do(tuned, vlm_folder):
    folder, *_ = tuned("lora", plain=True)
    (folder / runs.FLAGS_FILE).unlink()
    assert export.base_of(folder) == vlm_folder


def test_one_line_says_what_is_wrong(tuned, tmp_path, capsys):
    folder, *_ = tuned("lora", plain=True)
    capsys.readouterr()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for argv, message in (
        ([tmp_path / "no", tmp_path / "out"], "holds no adapter_config.json: give the --output_dir"),
        ([folder, tmp_path / "full"], "is not empty: give a new folder"),
    ):
        assert export.main([*map(str, argv)]) == 2
        err = capsys.readouterr().err.strip()
        assert message in err and "\n" not in err
    with pytest.raises(SystemExit):
        export.main([])
    err = capsys.readouterr().err.strip()
    assert err.startswith("export: the following arguments are required: dir, out") and "\n" not in err
