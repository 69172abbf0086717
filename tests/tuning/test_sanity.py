"""The step before the first finds what would waste an hour, and leaves no trace."""

import pytest
import torch
from fitting import fit, make, state, trainer_of

from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning import sanity
from lavender_min.tuning.collator import MappedExamples


@pytest.fixture(scope="module")
def rows(store_folder):
    return MappedExamples(data.load("tune", 8), MapStore(store_folder))


def test_a_run_is_bit_equal_to_one_that_was_not_looked_at(vlm_folder, rows, tmp_path):
    flags = {"lora_dropout": 0.1, "aligner_norm": "batch"}  # random numbers, and statistics that run along

    def look_away(trainer):
        trainer.checked = True

    looked, one = fit(vlm_folder, rows, tmp_path, flags=flags, steps=2)
    away, two = fit(vlm_folder, rows, tmp_path, flags=flags, steps=2, prepare=look_away)
    for (name, a), b in zip(state(looked).items(), state(away).values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(one, two, strict=True):
        assert (a["loss"], a["loss_att"], a["grad_norm"]) == (b["loss"], b["loss_att"], b["grad_norm"])


def second_bos(batch):
    batch["input_ids"][:, 1] = batch["input_ids"][:, 0]


def no_words(batch):
    batch["words"]["rows"].fill_(-1)
    batch["words"]["tokens"].fill_(-1)


def not_a_number(model):
    next(p for name, p in model.named_parameters() if "lora_A" in name).data.fill_(float("nan"))


def a_stranger(model):
    model.base.lm_head.weight.requires_grad_(True)


def says_one_thing(model):
    model.base.lm_head.weight.data.zero_()
    model.match = "exact"


def closed_gate(model):
    model.base.model.language_model.layers[3].cross_attn_attn_gate.data.zero_()


def asked_for_gradients(model):
    model.base.enable_input_require_grads()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (second_bos, "a text begins with BOS twice"),
        (no_words, "the first 16 examples hold no word with a map"),
        (not_a_number, "loss_vlm is nan before the first step"),
        (a_stranger, r"1 parameters train that should not, \['host.*lm_head.weight'\] for one"),
        (says_one_thing, "none of [0-9]+ mapped words in 16 examples, so nothing would be aligned; take --match all"),
        (closed_gate, r"no gradient reaches host\S+layers.3.cross_attn.v_proj"),
        (asked_for_gradients, "the frozen vision tower builds a graph"),
    ],
)
def test_what_is_wrong_is_named(vlm_folder, rows, tmp_path, harm, message):
    made = make(vlm_folder, aggregate="layer-mean")
    trainer = trainer_of(made, rows, tmp_path)
    if harm in (second_bos, no_words):
        collate = trainer.data_collator.__call__

        def harmed(examples):
            batch = collate(examples)
            harm(batch)
            return batch

        harmed.family, harmed.processor = made[0].family, made[1]
        trainer.data_collator = harmed
    else:
        harm(made[0])
    with pytest.raises(ValueError, match=f"stopped before the first step: .*{message}"):
        trainer.train()
    assert all(p.grad is None for p in made[0].parameters())
    assert trainer.state.global_step == 0


def test_a_bos_that_also_begins_turns_is_no_second_one():
    """As in models whose turns begin with <|im_start|>, which is their BOS (SmolLM2)."""
    sanity.one_beginning(torch.tensor([[1, 5, 6, 1, 7], [9, 9, 1, 5, 1], [5, 6, 7, 8, 1]]), 1)
    sanity.one_beginning(torch.tensor([[1, 1, 5]]), None)
    with pytest.raises(ValueError, match="a text begins with BOS twice"):
        sanity.one_beginning(torch.tensor([[1, 5, 6, 1, 7], [9, 9, 1, 1, 5]]), 1)


@pytest.mark.parametrize("flags", [{"mode": "full"}, {"plain": True}, {"lambda_att": 0.0}, {"mode": "qlora"}])
def test_what_is_right_passes(vlm_folder, rows, tmp_path, flags):
    trainer = trainer_of(make(vlm_folder, **flags), rows, tmp_path)
    sanity.check(trainer, trainer.model)
