"""The model card beside an adapter: the hub can read it, and it says what was run."""

import json
import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from lavender_min.tuning import card, export, runs
from lavender_min.tuning.command import main
from lavender_min.tuning.flags import ModelFlags

LLAMA = "meta-llama/Llama-3.2-11B-Vision-Instruct"
DECIDED = {
    "--data": "flickr30k:0.7 folder:0.3",
    "the examples": "97 with sha256 0123456789abcdef",
    "the maps' recipe": "paper",
    "--learning_rate": 2e-4,
    "--adam_beta1": 0.9,
}
HISTORY = [
    {"step": 10, "loss": 9.0, "loss_vlm": 3.0, "loss_att": 0.6},
    {"step": 20, "loss_vlm": 2.5, "loss_att": 0.25},
    {"step": 20, "eval_loss_vlm": 2.75},
]


def written(folder, flags, whole=False):
    runs.remember(flags, folder, DECIDED)
    card.write(folder, folder, HISTORY, whole)
    return ModelCard.load(folder / "README.md")


def test_it_names_base_data_flags_and_measures(tmp_path):
    found = written(
        tmp_path, ModelFlags(LLAMA, mode="qlora", lora_r=16, lora_targets=r".*(q|v)_proj", trust="contrast")
    )
    about = found.data.to_dict()
    assert (about["base_model"], about["base_model_relation"]) == (LLAMA, "adapter")
    assert about["library_name"] == "peft" and {"lora", "lavender"} <= set(about["tags"])
    # The folder is nobody else's.
    assert about["datasets"] == ["nlphuji/flickr30k"]
    text = found.text
    for line in (
        f'host = AutoModelForImageTextToText.from_pretrained("{LLAMA}", dtype="auto")',
        "model = PeftModel.from_pretrained(host, here)",
        "`--data flickr30k:0.7 folder:0.3`: 97 examples with sha256 0123456789abcdef.",
        "| recipe | paper |",
        "| --lora_r | 16 |",
        # A bar would end the cell.
        "| --lora_targets | .*(q¦v)_proj |",
        "| --trust | contrast |",
        "| --lambda_att | 10.0 |",
        "| --learning_rate | 0.0002 |",
        "| cross entropy per token, training | 2.5000 |",
        "| alignment loss, training | 0.2500 |",
        "| cross entropy per token, validation | 2.7500 |",
    ):
        assert line in text.splitlines(), line
    assert "in 20 steps" in text and "4-bit host" in text and "adam_beta1" not in text and "{" not in text


def test_other_runs_say_what_they_are(tmp_path):
    plain = written(tmp_path / "plain", ModelFlags(LLAMA, plain=True))
    assert "plain tuning" in plain.text and "Lavender" not in plain.text and "--lambda_att" not in plain.text
    full = written(tmp_path / "full", ModelFlags(LLAMA, mode="full"))
    merged = written(tmp_path / "merged", ModelFlags(LLAMA), whole=True)
    for found in (full, merged):
        assert found.data.library_name == "transformers" and found.data.base_model_relation == "finetune"
        assert "PeftModel" not in found.text and "from_pretrained(here, dtype" in found.text
    assert "lora" not in full.data.tags and "lora" in merged.data.tags


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_host_that_transformers_does_not_know_is_made_known_first(tmp_path, mode):
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "config.json").write_text('{"vision_config": {"model_type": "vlm_perceiver"}}')
    found = written(tmp_path / "run", ModelFlags(str(tmp_path / "host"), mode=mode))
    assert "```python\nimport lavender_min.hosts.architectures\nfrom " in found.text
    assert "lavender_min" not in written(tmp_path / "other", ModelFlags(LLAMA, mode=mode)).text


@pytest.fixture(scope="module")
def run(vlm_folder, store_folder, tmp_path_factory):
    """A run that was saved at its second step of three, then finished."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    said = f"--data toy --vlm {vlm_folder} --maps {store_folder} --limit 6 --max_steps 3 --save_steps 2 --save_strategy steps"
    said += f" --logging_steps 1 --match all --per_device_train_batch_size 2 --output_dir {out}"
    assert main(shlex.split(said)) == 0
    return out


def test_train_leaves_it_in_place_of_pefts(run, vlm_folder, tmp_path):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    last = [entry["loss_att"] for entry in history if "loss_att" in entry][-1]
    found = ModelCard.load(run / "README.md")
    # A folder of this machine is no name of the hub's.
    assert found.data.base_model is None and found.data.library_name == "peft"
    assert f"| alignment loss, training | {last:.4f} |" in found.text and "in 3 steps" in found.text
    assert "More Information Needed" not in found.text and f"`{vlm_folder}`" in found.text
    assert "in 2 steps" in ModelCard.load(run / "checkpoint-2" / "README.md").text

    # What it tells a reader to do works.
    (code,) = [part for part in found.text.split("```") if part.startswith("python\n")]
    told: dict = {}
    exec(code.removeprefix("python\n").replace('here = "."', f"here = {str(run)!r}"), told)
    expected = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(vlm_folder), str(run))
    assert told["processor"].tokenizer.vocab_size > 0
    for a, b in zip(told["model"].parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_export_has_one_of_its_own(run, tmp_path):
    export.export(run, tmp_path / "out")
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert found.data.library_name == "transformers" and "whole model" in found.text and "in 3 steps" in found.text
