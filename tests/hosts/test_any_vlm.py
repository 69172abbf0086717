"""The way of a user, for every kind of host: a folder of pictures is extracted, tuned on, looked at and exported by the commands.

Hosts are tiny and random. The commands run in this process; the exported folders are loaded in another, which does not know this
package.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import zoo

from lavender_min import data
from lavender_min.evaluation import command as evaluation
from lavender_min.evaluation import own_picture
from lavender_min.hosts import processors
from lavender_min.maps import MapStore
from lavender_min.teachers import command as extraction
from lavender_min.tuning import command as tuning
from lavender_min.tuning import export, runs
from lavender_min.tuning.collator import Collator, MappedExamples

# One of each make: native resolution, tiles beside a thumbnail, an answer that is read apart from the question.
FAST = ["qwen2_5_vl", "smolvlm", "paligemma"]
REST = [kind for kind in zoo.KINDS if kind not in FAST]

ELSEWHERE = """
import sys
sys.modules["lavender_min"] = None  # importing it is an error now
import torch
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    with torch.no_grad():
        logits = AutoModelForImageTextToText.from_pretrained(folder).eval()(**torch.load(folder + "/../inputs.pt")).logits
    torch.save(logits, folder + "/../logits.pt")
"""


class Tuned(NamedTuple):
    """What the commands left of one host."""

    host: str
    run: Path
    drawing: Path
    exported: Path
    # Of three texts about two pictures.
    inputs: dict[str, Any]
    logits: torch.Tensor  # of the run
    untuned: torch.Tensor


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with two pictures, one wide and one high, a question about each and a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = data.load("toy", split="heldout")[:2]
    for name, size, scene in zip(("wide.jpg", "high.png"), ((150, 90), (84, 140)), scenes, strict=True):
        scene.image().resize(size).save(folder / name)
    lines = [
        {"image": "wide.jpg", "question": scenes[0].question, "answer": scenes[0].answer},
        {"image": "wide.jpg", "text": "a big red circle and a small blue star"},
        {"image": "high.png", "question": "what is above the green square?", "answer": "a yellow triangle"},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def maps(pictures):
    argv = ["--data", "folder", "--data_root", pictures, "--maps", pictures / "maps", "--sd", data.SOURCES["toy"].sd]
    assert extraction.main([*map(str, argv), "--recipe", "noise", "--timesteps", "151"]) == 0
    return pictures / "maps"


@pytest.fixture(scope="module")
def tuned(pictures, maps, tmp_path_factory):
    @cache
    def make(kind):
        where = tmp_path_factory.mktemp(kind)
        host, run, out = zoo.save(kind, where / "host"), where / "run", where / "exported"
        # An untaught model may end its answer before it has begun, or say one token only.
        said = where / "host" / "generation_config.json"
        said.write_text(json.dumps(json.loads(said.read_text()) | {"min_new_tokens": 12, "no_repeat_ngram_size": 1}))
        argv = ["--data", "folder", "--data_root", pictures, "--maps", maps, "--vlm", host, "--output_dir", run]
        argv += ["--match", "all", "--max_steps", 2, "--per_device_train_batch_size", 3, "--learning_rate", 0.01]
        argv += ["--logging_steps", 1, "--disable_tqdm", "true", "--report_to", "none"]
        assert tuning.main([*map(str, argv)]) == 0
        argv = ["--image", pictures / "wide.jpg", "--adapter", run, "--question", "what is it?", "--out", where]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(own_picture, "LONGEST", 16)
            assert evaluation.main([*map(str, argv)]) == 0
        assert export.main([str(run), str(out)]) == 0

        model, processor = runs.build(runs.recall(run), trained=run)
        rows = MappedExamples(data.load("folder", str(pictures)), MapStore(maps))
        batch = Collator(processor, model.family, model.base.config)([rows[i] for i in range(3)])
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "words")}
        with torch.no_grad():
            logits = model.eval().host(**inputs).logits
            with model.host.disable_adapter():
                untuned = model.host(**inputs).logits
        torch.save(inputs, where / "inputs.pt")
        return Tuned(host, run, where / "wide.png", out, inputs, logits, untuned)

    return make


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)])
def test_every_command_does_its_part(tuned, pictures, kind):
    made = tuned(kind)
    steps = [
        entry for entry in json.loads((made.run / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    assert len(steps) == 2 and all(entry["loss_att"] > 0 and entry["words_per_sample"] > 2 for entry in steps)
    assert data.open_image(made.drawing).width > 100
    assert runs.recall(made.run).vlm == made.host
    assert not list(made.exported.glob("*adapter*"))

    picture = data.open_image(pictures / "high.png")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    found = []
    for folder in (made.host, made.exported):
        processor = processors.load(str(folder))
        text = processor.apply_chat_template(said, add_generation_prompt=True)
        found.append((text, processor(text=[text], images=[[picture]], return_tensors="pt")))
    (text, before), (text_after, after) = found
    assert text == text_after and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kinds", [FAST, pytest.param(REST, marks=pytest.mark.slow)], ids=["fast", "rest"])
def test_exported_folders_answer_alike_where_the_package_is_unknown(tuned, tmp_path, kinds):
    made = [tuned(kind) for kind in kinds]
    argv = [sys.executable, "-c", ELSEWHERE, *(str(one.exported) for one in made)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for one in made:
        found = torch.load(one.exported.parent / "logits.pt")
        torch.testing.assert_close(found, one.logits, rtol=1e-4, atol=1e-4, msg=one.host)
        assert (one.untuned - one.logits).abs().max() > 0.01
