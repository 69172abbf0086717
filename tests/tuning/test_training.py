"""Both losses, batch arithmetic and schedules of the tuning, on a small host with random weights."""

import pytest
import torch
from fitting import fit, host_state, inputs_of, make, state, trainer_of, words_of
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lavender_min.data import Example
from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import ATTEND


@pytest.fixture
def rows(store_folder):
    return MappedExamples(data.load("tune", 8), MapStore(store_folder))


# ------------------------------------------------------------------------------------------------------- the collator


@pytest.fixture
def batch(vlm_folder, rows):
    model, processor = make(vlm_folder)
    return model, processor, Collator(processor, model.family, model.base.config)([rows[i] for i in range(4)])


def test_words_are_found_in_the_chat(batch, rows):
    _, processor, made = batch
    spoken = [[word for word in rows[i][1].words if word.field == "answer"] for i in range(4)]
    found = words_of(made)
    assert [text for text, *_ in found] == [i for i in range(4) for _ in spoken[i]]
    for (text, tokens, _), word in zip(found, (word for words in spoken for word in words), strict=True):
        assert processor.tokenizer.decode(made["input_ids"][text, tokens]).strip(" ,.?") == word.text
    targets = made["words"]["targets"]
    assert len(targets) == len(found)
    assert (targets.amin((1, 2)) == 0).all() and targets.amax((1, 2)).sub(1).abs().max() < 1e-3


def test_rows_follow_the_tokens_there_are(vlm_folder, store_folder):
    """One long word adds its own tokens and no more: neither to the other words of its text nor to other texts."""
    model, processor = make(vlm_folder)
    example, stored = MappedExamples(data.load("tune", 1), MapStore(store_folder))[0]
    slug = "x" * 70
    long = example._replace(answer=example.answer + " " + slug)
    word = stored.words[-1]._replace(text=slug, field="answer", start=len(example.answer) + 1, end=len(long.answer))
    longer = stored._replace(words=[*stored.words, word], maps=torch.cat([stored.maps, stored.maps[:1]]))
    collate = Collator(processor, model.family, model.base.config)
    short, both = collate([(example, stored)] * 2), collate([(example, stored), (long, longer)])
    tokens = len(words_of(both)[-1][1])
    assert tokens >= 35
    assert len(both["words"]["rows"]) == len(short["words"]["rows"]) + tokens
    assert both["words"]["counts"] == [len(short["words"]["rows"]) // 2, len(short["words"]["rows"]) // 2 + tokens]


def test_only_the_answer_and_its_end_are_labelled(batch, rows):
    _, processor, made = batch
    for i in range(4):
        labelled = made["input_ids"][i][made["labels"][i] != -100]
        assert processor.tokenizer.decode(labelled) == rows[i][0].answer + "<|eot_id|>"
    assert (made["input_ids"] == processor.tokenizer.bos_token_id).sum(1).tolist() == [1] * 4


def test_reading_rows_come_one_later_than_predicting_rows(vlm_folder, rows):
    model, processor = make(vlm_folder)
    made = {
        attend: Collator(processor, model.family, model.base.config, attend=attend, words="all")([rows[1]])
        for attend in ATTEND
    }
    predicting, reading = (made[attend]["words"]["rows"] for attend in ("predicting", "reading"))
    assert torch.equal(predicting + 1, reading)
    # Question and answer.
    assert len(made["reading"]["words"]["lengths"]) == len(rows[1][1].words)


def test_maps_of_other_text_are_refused(store_folder):
    example = data.load("tune", 1)[0]
    rows = MappedExamples([example._replace(answer="something else")], MapStore(store_folder))
    with pytest.raises(ValueError, match="the data now says 'something else'; extract again"):
        rows[0]


def test_a_store_of_other_data_is_refused(store_folder):
    with pytest.raises(ValueError, match="none of the 1 examples has maps"):
        MappedExamples([Example("elsewhere", lambda: None, "", "a")], MapStore(store_folder))


# --------------------------------------------------------------------------------------------------------- the losses


def test_the_language_loss_is_that_of_transformers(batch):
    model, _, made = batch
    ours = model(**made)["loss_vlm"]
    torch.testing.assert_close(ours, model.host(**inputs_of(made), labels=made["labels"]).loss)


def test_exact_match_keeps_the_words_whose_every_token_is_predicted(batch):
    model, _, made = batch
    guess = model.host(**inputs_of(made)).logits.argmax(-1)
    # Make two words right: put the model's own guesses where they stand, and look again.
    for text, tokens, _ in (words_of(made)[1], words_of(made)[-1]):
        for t in tokens:
            made["input_ids"][text, t] = guess[text, t - 1]
    guess = model.host(**inputs_of(made)).logits.argmax(-1)
    right = sum(
        all(guess[text, t - 1] == made["input_ids"][text, t] for t in tokens) for text, tokens, _ in words_of(made)
    )
    model.match = "exact"
    assert model(**made)["words"] == right > 0


def test_no_matched_word_costs_nothing_and_gives_zero_gradients(batch):
    model, _, made = batch
    made["words"]["rows"].fill_(-1)
    made["words"]["tokens"].fill_(-1)
    out = model(**made)
    assert out["loss_att"] == 0 and out["words"] == 0
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.align.aligner.parameters())


def test_lambda_zero_is_bit_equal_to_plain_tuning(vlm_folder, rows, tmp_path):
    dropout = {"lora_dropout": 0.1}
    plain, _ = fit(vlm_folder, rows, tmp_path, flags={"plain": True, **dropout})
    zero, logged = fit(vlm_folder, rows, tmp_path, flags={"lambda_att": 0.0, **dropout})
    before, after = host_state(plain), host_state(zero)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(entry["loss_att"] > 0 for entry in logged)
    moved, _ = fit(vlm_folder, rows, tmp_path, flags=dropout)
    assert any(not torch.equal(before[name], p) for name, p in host_state(moved).items())


@pytest.mark.parametrize("aggregate", ["learn", "layer-mean"])
def test_batch_8_equals_4_accumulated_twice(vlm_folder, rows, tmp_path, aggregate):
    """Cross entropy is a mean over the labels of the whole batch, alignment a mean over words: equal counts a half."""
    pairs = [rows[i] for i in range(4)]
    rows = pairs + pairs  # both halves hold the same number of words
    # plain gradient descent: Adam would blow rounding up to the size of a step
    options = dict(shuffle=False, flags={"aggregate": aggregate}, optim="sgd", max_grad_norm=0.0)
    whole, one = fit(vlm_folder, rows, tmp_path, batch=8, **options)
    halves, two = fit(vlm_folder, rows, tmp_path, batch=4, gradient_accumulation_steps=2, **options)
    for name, p in host_state(whole).items():
        torch.testing.assert_close(host_state(halves)[name], p, atol=1e-6, rtol=1e-4)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["loss_vlm"] == pytest.approx(b["loss_vlm"], rel=1e-3)
        assert a["loss_att"] == pytest.approx(b["loss_att"], rel=1e-3)
        assert a["words_per_sample"] == b["words_per_sample"]


@pytest.mark.parametrize("aggregate", ["learn", "layer-mean"])
def test_checkpointing_gives_the_same_gradients(vlm_folder, rows, aggregate):
    gradients = []
    for checkpointed in (False, True):
        model, processor = make(vlm_folder, aggregate=aggregate)
        made = Collator(processor, model.family, model.base.config)([rows[i] for i in range(2)])
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(**made)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    assert sum(g.abs().sum() for n, g in gradients[0].items() if "align" in n) > 0


@pytest.mark.parametrize(("align_layers", "layers"), [("", [1, 3, 5]), ("1,5", [1, 5])])
def test_alignment_gradients_equal_an_eager_implementations(vlm_folder, rows, align_layers, layers):
    """Layer-mean, against output_attentions of the eager host with the maps gathered and resampled by hand."""
    model, processor = make(vlm_folder, aggregate="layer-mean", align_layers=align_layers)
    made = Collator(processor, model.family, model.base.config)([rows[i] for i in range(2)])
    for parameter in model.host.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)  # LoRA's second factor starts at 0, which would hide the first's gradient
    out = model(**made)
    ((out["loss"] - 0) * 1).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    model.base.set_attn_implementation({"text_config": "eager"})
    out = model.base(**inputs_of(made), labels=made["labels"], output_attentions=True)
    tiles = (
        torch.stack([out.attentions[i] for i in layers])
        .mean(0)
        .unflatten(-1, (2, 2, 65))[..., 1:]
        .unflatten(-1, (8, 8))
    )
    canvas = tiles.permute(0, 1, 2, 3, 5, 4, 6).flatten(3, 4).flatten(4, 5) * 256  # uniform attention is 1
    maps = F.interpolate(canvas.flatten(0, 1), size=(32, 32), mode="bilinear").unflatten(0, canvas.shape[:2])
    words = [torch.stack([maps[text, :, row] for row in rows]).mean(0) for text, _, rows in words_of(made)]
    made_maps = model.align.aligner.predict(torch.stack(words))
    low, high = made_maps.amin((1, 2), keepdim=True), made_maps.amax((1, 2), keepdim=True)
    error = F.mse_loss((made_maps - low) / (high - low + 1e-6), made["words"]["targets"])
    (out.loss + 10 * error).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


# ------------------------------------------------------------------------------------------------ schedules and modes


def test_the_host_stays_bit_equal_while_the_aligner_is_pretrained(vlm_folder, rows, tmp_path):
    model = make(vlm_folder)
    before, aligner = host_state(model[0]), [p.detach().clone() for p in model[0].align.parameters()]
    fit(vlm_folder, rows, tmp_path, model=model, steps=2, pretrain=2, weight_decay=0.1)
    assert all(torch.equal(p, before[name]) for name, p in host_state(model[0]).items())
    assert any(not torch.equal(p, q) for p, q in zip(model[0].align.parameters(), aligner, strict=True))
    model = make(vlm_folder)
    fit(vlm_folder, rows, tmp_path, model=model, steps=3, pretrain=2, weight_decay=0.1)
    assert any(not torch.equal(p, before[name]) for name, p in host_state(model[0]).items())


def test_qlora_really_holds_4_bits(vlm_folder):
    import bitsandbytes as bnb

    model, *_ = make(vlm_folder, mode="qlora", lora_targets="language")
    packed = [m for m in model.base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    linear = [
        m for n, m in model.base.named_modules()
        if isinstance(m, torch.nn.Linear) and not isinstance(m, bnb.nn.Linear4bit) and "lora" not in n
    ]  # fmt: skip
    assert linear == [model.base.lm_head]
    assert any(m in packed for m in model.base.model.vision_model.modules())
    for layer in packed:
        assert layer.weight.dtype == torch.uint8 and layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested  # double quantisation
        assert layer.weight.nbytes == layer.in_features * layer.out_features / 2


def test_full_tuning_moves_every_part(vlm_folder, rows, tmp_path):
    model = make(vlm_folder, mode="full")
    before = {name: p.detach().clone() for name, p in model[0].host.named_parameters()}
    fit(vlm_folder, rows, tmp_path, model=model, steps=1)
    moved = {name for name, p in model[0].host.named_parameters() if not torch.equal(p, before[name])}
    for part in ("vision_model", "multi_modal_projector", "self_attn", "cross_attn", "lm_head"):
        assert any(part in name for name in moved), part


def test_full_tuning_goes_on_from_a_checkpoint_with_every_weight(vlm_folder, rows, tmp_path):
    """Files of this family name weights otherwise than the model does."""
    options = {"flags": {"mode": "full"}, "steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole, _ = fit(vlm_folder, rows, tmp_path, **options)
    trainer = trainer_of(make(vlm_folder, mode="full"), rows, tmp_path, steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, a), b in zip(state(whole).items(), state(trainer.lavender).values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpointing_through_the_trainer_changes_no_step(vlm_folder, rows, tmp_path):
    dropout = {"lora_dropout": 0.1}  # drawn again, alike, when a layer is run again
    kept, _ = fit(vlm_folder, rows, tmp_path, flags=dropout, steps=2)
    again, _ = fit(vlm_folder, rows, tmp_path, flags=dropout, steps=2, gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in again.base.modules())
    for name, p in host_state(kept).items():
        torch.testing.assert_close(host_state(again)[name], p, atol=1e-5, rtol=1e-4)


def test_bf16_follows_the_trainers_flag(vlm_folder, rows, tmp_path):
    """Host in bfloat16, adapters, Aligner and optimiser in float32, autocast between them."""
    _, full = fit(vlm_folder, rows, tmp_path, steps=2)
    half, logged = fit(vlm_folder, rows, tmp_path, model=make(vlm_folder, torch.bfloat16), steps=2, bf16=True)
    assert half.base.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    for a, b in zip(full, logged, strict=True):
        assert b["loss_vlm"] != a["loss_vlm"] and b["loss_vlm"] == pytest.approx(a["loss_vlm"], rel=0.05)
        assert b["loss_att"] == pytest.approx(a["loss_att"], rel=0.2)


def test_a_model_turned_to_bf16_whole_still_trains(batch):
    """DeepSpeed does that to weights and batches alike, without autocast."""
    model, _, made = batch
    expected = model(**made)

    def half(tensor):
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    made = tree_map_only(torch.Tensor, half, made)
    out = model.bfloat16()(**made)
    for name in ("loss_vlm", "loss_att"):
        torch.testing.assert_close(out[name].float(), expected[name], rtol=0.05, atol=0)
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_8_bit_optimiser_tunes_a_4_bit_host_on_the_cpu_too(vlm_folder, rows, tmp_path):
    """bitsandbytes keeps it in plain memory there."""
    flags = {"mode": "qlora", "lora_r": 32}  # states of fewer than 4,096 numbers would stay in 32 bits
    trainers = []
    model, logged = fit(
        vlm_folder, rows, tmp_path, flags=flags, optim="paged_adamw_8bit", steps=2, prepare=trainers.append
    )
    assert logged[1]["loss"] != logged[0]["loss"]
    held = {state["state1"].dtype for state in trainers[0].optimizer.state.values()}
    assert torch.uint8 in held


def test_words_without_trust_are_neither_aligned_nor_counted(batch):
    """Trust in one word alone gives the loss of a batch that holds this word alone."""
    model, _, made = batch
    model.match = "all"
    made["words"]["trust"] = torch.zeros(len(made["words"]["lengths"]))
    out = model(**made)
    assert out["words"] == 0 and out["loss_att"] == 0
    losses = []
    for weight in (0.5, 2.0):
        made["words"]["trust"][1] = weight
        out = model(**made)
        losses.append(out["loss_att"])
        assert out["words"] == 1
    torch.testing.assert_close(*losses)
