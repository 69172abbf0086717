"""A Flamingo is tuned, measured and exported as any other host: the family beside everything that asks it."""

import subprocess
import sys

import pytest
import tiny_flamingo
import torch
from PIL import Image
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForImageTextToText

from lavender_min.evaluation import command as evaluation_command
from lavender_min.evaluation import own_picture
from lavender_min.hosts.flamingo import IDEFICS_9B, Flamingo, Reshaped
from lavender_min.hosts.load import load
from lavender_min.hosts.reading import Sink
from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning import command, export, memory, runs
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import word_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flamingo.save(tmp_path_factory.mktemp("flamingo"))


@pytest.fixture(scope="module")
def processor(folder):
    return load(folder).processor


@pytest.fixture
def examples(store_folder):
    mapped = MappedExamples(data.load("tune", 2), MapStore(store_folder))
    return [mapped[i] for i in range(4)]


def built(flags, examples):
    """A model whose adapters are not at their start, and a batch for it."""
    torch.manual_seed(0)
    model, processor = runs.build(flags)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model.train(), Collator(processor, model.family, model.base.config)(examples)


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "words")}


def sink_of(model, batch):
    own = list(model.family.layers(model.base))
    if model.align is None:
        return Sink(model.family, word_rows(batch["words"]), own, None, lambda maps: maps)
    return model.sink(word_rows(batch["words"]), own)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("latents", ["lifted", "reshape"])
def test_parallel_attention_starts_as_the_hosts_own(folder, examples, rank, latents):
    model, batch = built(ModelFlags(folder, parallel_rank=rank, latents=latents, match="all"), examples)
    sink = sink_of(model, batch)
    inputs = inputs_of(batch)
    with torch.no_grad(), model.host.disable_adapter():
        model.family.hidden_states(model.eval().base, inputs, sink)
    assert list(sink.own_maps) == list(sink.parallel_maps) == [0, 1]
    for layer, own in sink.own_maps.items():
        torch.testing.assert_close(sink.parallel_maps[layer], own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aggregate", ["learn", "layer-mean"])
@pytest.mark.parametrize("targets", ["cross", "language"])
def test_both_losses_in_4_bits_with_adapters_and_checkpointing(folder, examples, aggregate, targets):
    """Every trainable part is reached, and checkpointing changes no gradient."""
    gradients = []
    flags = {"aggregate": aggregate, "lora_targets": targets, "lora_dropout": 0.0, "match": "all"}
    for checkpointed in (False, True):
        model, batch = built(ModelFlags(folder, mode="qlora", **flags), examples)
        assert type(model.base.model.perceiver_resampler.blocks[0][0].q_proj).__name__ == "Linear4bit"
        assert not any("vision_model" in name for name, p in model.named_parameters() if p.requires_grad)
        if checkpointed:
            model.gradient_checkpointing_enable()
        out = model(**batch)
        assert out["loss_vlm"] > 0 and out["loss_att"] > 0 and out["words"] == len(batch["words"]["lengths"])
        out["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    # Of a low-rank correction the first factor waits for the second, which starts at 0. The normalisation undoes the bias.
    waiting = [name for name, gradient in gradients[0].items() if not gradient.any()]
    assert all(name.endswith(("q.0.weight", "k.0.weight", "aligner.bias")) for name in waiting)


def test_alignment_reaches_the_resampler_through_its_keys_and_not_through_what_latents_read(folder, examples):
    """With --full: what a latent has read is a constant of the loss, but it is the resampler that makes the keys."""
    model, batch = built(ModelFlags(folder, mode="full", aggregate="layer-mean", match="all"), examples)
    sink = sink_of(model, batch)
    inputs = inputs_of(batch)
    model.family.hidden_states(model.base, inputs, sink)
    assert not sink.latents.requires_grad
    sum((maps**2).sum() for maps in sink.own_maps.values()).backward()
    resampler = model.base.model.perceiver_resampler
    assert resampler.latents.grad.any() and resampler.blocks[0][0].q_proj.weight.grad.any()


def test_cached_picture_states_give_the_same_hidden_states_and_maps(folder, processor, examples):
    model, batch = built(ModelFlags(folder, plain=True), examples)
    family, host = model.family, model.eval().base
    inputs = inputs_of(batch)
    pixels = family.pixels(processor, [example.image() for example, _ in examples])
    assert torch.equal(pixels["pixel_values"], batch["pixel_values"])
    with torch.no_grad():
        cached = family.cached_inputs(family.picture_states(host, pixels))
        rest = {name: value for name, value in inputs.items() if name not in family.picture_inputs}
        sinks = [sink_of(model, batch) for _ in range(2)]
        expected = family.hidden_states(host, inputs, sinks[0])
        assert torch.equal(family.hidden_states(host, rest | cached, sinks[1]), expected)
    assert torch.equal(sinks[0].latents, sinks[1].latents)


def test_padding_changes_nothing(folder, processor, examples):
    """The shortest text of a batch, and that text alone: the same losses and maps."""
    model, batch = built(ModelFlags(folder, plain=True), examples)
    lengths = batch["attention_mask"].sum(1)
    short = int(lengths.argmin())
    assert lengths[short] < lengths.max()
    alone = Collator(processor, model.family, model.base.config)([examples[short]])
    model.eval()
    found = [model.read(**{k: v for k, v in of.items() if k != "labels"})["own"] for of in (batch, alone)]
    texts = batch["words"]["texts"][batch["words"]["lengths"].cumsum(0) - 1]
    torch.testing.assert_close(found[0][texts == short], found[1], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- planning


def test_the_planner_knows_the_published_model_and_imagines_what_the_collator_makes(folder, examples):
    with torch.device("meta"):
        published = AutoModelForImageTextToText.from_config(Flamingo().config(IDEFICS_9B + "-instruct"))
    # Idefics-9b.
    assert 8.9e9 < sum(p.numel() for p in published.parameters()) < 9.0e9
    model, batch = built(ModelFlags(folder, plain=True), examples)
    b, t = batch["input_ids"].shape
    imagined = model.family.imagine(model.base.config, b, t)
    for name, value in imagined.inputs.items():
        assert batch[name].shape == value.shape and batch[name].dtype == value.dtype
    for made, imagined_part in zip(batch["words"]["views"][0], imagined.views[0], strict=True):
        assert made.shape == imagined_part.shape and made.dtype == imagined_part.dtype


def test_a_planned_step_saves_what_a_real_one_saves(folder, examples):
    flags = ModelFlags(folder, match="all", lora_dropout=0.0)
    model, batch = built(flags, examples[:1])
    # One text without padding, and a row that speaks for none: the planner takes every condition to hold.
    assert batch.pop("attention_mask").all()
    batch["words"]["rows"][-1] = -1
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # Of the layout it takes some cells to be empty, of which it saves a mask of some bytes.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)["loss"]
    real = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in weights)
    planned = memory.build(flags, torch.float32)
    rows = int((torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100).sum())
    meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), batch)
    plan = memory.simulate(planned, meta, rows, "adamw_torch", None)
    assert plan.saved == pytest.approx(real, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- command lines

ELSEWHERE = """
import sys
sys.modules["lavender_min"] = None  # importing it is an error now
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
vlm, processor = AutoModelForImageTextToText.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])
given = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(vlm.eval()(**given).logits, sys.argv[3])
assert "image" in processor.tokenizer.chat_template
"""


@pytest.fixture
def tuned(folder, store_folder, tmp_path, capsys, monkeypatch):
    """Two steps of train.py with the vision cache, and evaluate.py on one's own picture: the run's folder."""
    # An untrained host finds no end, and every word is drawn.
    monkeypatch.setattr(own_picture, "LONGEST", 16)

    def make(*more):
        run, picture = tmp_path / "run", tmp_path / "one.png"
        argv = [
            "--data", "toy", "--vlm", folder, "--maps", store_folder, "--limit", "8", "--match", "all", "--max_steps", "2",
            "--output_dir", str(run), "--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--cache_vision",
            "--gradient_checkpointing", "true", "--learning_rate", "0.05", *more,
        ]  # fmt: skip
        assert command.main(argv) == 0, capsys.readouterr().err
        Image.effect_noise((90, 60), 80).convert("RGB").save(picture)
        look = ["--image", str(picture), "--adapter", str(run), "--out", str(tmp_path / "look")]
        assert evaluation_command.main([*look, "--question", "what color is the star?"]) == 0, capsys.readouterr().err
        assert "shows where it looked for each word" in capsys.readouterr().out
        return run

    return make


def test_tuned_in_4_bits_with_the_papers_reading_of_latents(tuned):
    run = tuned("--qlora", "--latents", "reshape")
    flags = runs.recall(run)
    assert flags.latents == "reshape" and type(runs.build(flags, trained=run)[0].family) is Reshaped


def test_tuned_and_exported(tuned, examples, tmp_path):
    """The export needs nothing of this package, and says the same."""
    run, out = tuned("--lora"), tmp_path / "out"
    model, processor = runs.build(runs.recall(run), trained=run)
    batch = Collator(processor, model.family, model.base.config)(examples)
    inputs = inputs_of(batch)
    with torch.no_grad():
        expected = model.eval().host(**inputs).logits
        with model.host.disable_adapter():
            assert (model.host(**inputs).logits - expected).abs().max() > 0.1
    export.export(run, out)
    torch.save(inputs, tmp_path / "given.pt")
    words = [sys.executable, "-c", ELSEWHERE, out, tmp_path / "given.pt", tmp_path / "logits.pt"]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)
