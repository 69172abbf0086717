"""--align_layers through the model: what is built, what is read, where gradients go, and what a run remembers of it.

The losses of chosen layers are held against eager attention in test_training.py.
"""

import pytest
import torch
from fitting import inputs_of, make
from starting import flags_of, start

from lavender_min.evaluation import compare, models
from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning import runs
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import per_word, word_rows


def batch_of(made, store_folder):
    model, processor = made
    rows = MappedExamples(data.load("tune", 2), MapStore(store_folder))
    return Collator(processor, model.family, model.base.config)([rows[i] for i in range(3)])


def gradients(model, batch):
    """Of the alignment loss alone, by name; what it does not reach is not there."""
    align, spoken = model.align, word_rows(batch["words"])
    sink = model.sink(spoken, model.layers)
    model.family.hidden_states(model.base, inputs_of(batch), sink)
    everything = torch.ones(len(spoken.lengths))
    align.loss(model.word_maps(align, sink), spoken.targets, everything).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_only_chosen_layers_have_parallel_projections_and_all_of_them_are_reached(vlm_folder, store_folder):
    made = make(vlm_folder, align_layers="last", parallel_rank=0)
    model, _ = made
    assert model.layers == [5] and list(model.align.parallel) == ["5"]
    reached = gradients(model, batch_of(made, store_folder))
    assert {name for name in reached if "parallel" in name} == {f"align.parallel.5.{of}.weight" for of in "qk"}


def test_a_loss_on_the_first_layers_own_attention_reaches_no_later_layer(vlm_folder, store_folder):
    made = make(vlm_folder, align_layers="first", aggregate="layer-mean")
    model, _ = made
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    assert model.layers == [1]
    adapters = [name for name in gradients(model, batch_of(made, store_folder)) if "lora" in name]
    assert {name.split(".layers.")[1].split(".lora")[0] for name in adapters} == {
        f"1.cross_attn.{of}_proj" for of in "qk"
    }


def test_maps_for_pictures_and_measures_are_those_of_the_chosen_layers(vlm_folder, store_folder):
    """With an Aligner and without, which is how untuned and plain hosts are read; the mean is taken by hand of all layers' maps."""
    made = make(vlm_folder, align_layers="1,5")
    model, _ = made
    batch = batch_of(made, store_folder)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    sink = model.sink(word_rows(batch["words"]), [1, 3, 5])
    with torch.no_grad():
        model.family.hidden_states(model.base, inputs_of(batch), sink)
    own, lengths = sink.own_maps, sink.words.lengths
    expected = per_word((own[1] + own[5]) / 2, lengths).mean(1)
    assert (per_word(own[3], lengths).mean(1) - expected).abs().max() > 0.1
    torch.testing.assert_close(model.read(**inputs)["own"], expected)

    plain, _ = make(vlm_folder, align_layers="1,5", plain=True)
    untuned = models.load(ModelFlags(vlm_folder, align_layers="1,5"), torch.float32).model
    assert plain.layers == untuned.layers == [1, 5] and untuned.align is None
    torch.testing.assert_close(untuned.read(**inputs)["own"], expected)
    torch.testing.assert_close(plain.read(**inputs)["own"], expected)

    parallel = torch.stack([sink.parallel_maps[i] for i in (1, 5)]).mean(0)
    found = model.align.aligner.predict(per_word(parallel, lengths))
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    torch.testing.assert_close(model.read(**inputs)["aligned"], (found - low) / (high - low + 1e-6))


@pytest.mark.parametrize("aggregate", ["learn", "max-max", "mean-max", "flow-mul"])
def test_a_hosts_own_maps_do_not_depend_on_what_was_aligned(vlm_folder, store_folder, aggregate):
    """So that runs can be compared. What the Aligner takes is pooled as in the forward."""
    made = make(vlm_folder, plain=True)
    batch = batch_of(made, store_folder)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model, _ = make(vlm_folder, aggregate=aggregate)
    found = model.eval().read(**inputs)
    torch.testing.assert_close(found["own"], made[0].eval().read(**inputs)["own"])
    error = (found["aligned"] - batch["words"]["targets"]).square().mean()
    torch.testing.assert_close(model(**batch)["loss_att"].detach(), error)


def test_cross_attention_hosts_align_all_layers_unless_told_otherwise(vlm_folder, store_folder):
    found = []
    for align_layers in ("", "all"):
        made = make(vlm_folder, align_layers=align_layers)
        assert made[0].layers == [1, 3, 5]
        loss = made[0](**batch_of(made, store_folder))["loss"]
        loss.backward()
        found.append((loss, [p.grad for p in made[0].parameters() if p.requires_grad]))
    (loss, grads), (loss_all, grads_all) = found
    assert torch.equal(loss, loss_all) and all(map(torch.equal, grads, grads_all))


def test_the_default_is_the_familys(vlm_folder, monkeypatch):
    from lavender_min.hosts.mllama import Mllama

    monkeypatch.setattr(Mllama, "align_layers", "every-2")
    assert make(vlm_folder)[0].layers == [3, 5]
    assert make(vlm_folder, align_layers="all")[0].layers == [1, 3, 5]


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_remembers_its_layers_and_a_comparison_wants_them_alike(tmp_path, plain):
    flags = ModelFlags("somewhere", align_layers="mid", plain=plain)
    runs.remember(flags, tmp_path / "a")
    assert runs.recall(tmp_path / "a") == flags
    other = ModelFlags("somewhere", align_layers="last", plain=plain)
    with pytest.raises(ValueError, match=r"holds a run with other flags \(--align_layers mid ─► last\)"):
        runs.remember(other, tmp_path / "a")

    runs.remember(other, tmp_path / "b")
    for folder in "ab":
        (tmp_path / folder / "trainer_state.json").write_text('{"log_history": []}')
    name = compare.PLAIN if plain else compare.LAVENDER
    finished = [compare.recall(name, str(tmp_path / folder)) for folder in "ab"]
    with pytest.raises(ValueError, match="b has --align_layers 'last', .*a has 'mid': compared models must be read in"):
        compare.base_of(finished)
    assert compare.base_of(finished[:1]).align_layers == "mid"


@pytest.mark.parametrize(
    ("value", "message"),
    [("third", "--align_layers is all, first, mid, last"), ("1,2", "no layer 2 sees the picture; these do: 1, 3, 5")],
)
def test_a_layer_that_cannot_be_aligned_ends_the_command_in_one_line(
    vlm_folder, store_folder, tmp_path, capsys, value, message
):
    assert start(flags_of(vlm_folder, store_folder, tmp_path / "out", "--align_layers", value)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("train.py: --align_layers") and message in said
