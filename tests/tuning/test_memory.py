"""The planner against real steps: weights, optimiser and saved tensors to the byte, the peak against the allocator's events."""

import types

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from lavender_min.hosts.mllama import LLAMA
from lavender_min.maps import MapStore
from lavender_min.toy import data as toy
from lavender_min.tuning import memory, pretending, runs
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import ModelFlags


def flags(folder, **changes):
    return ModelFlags(folder, **{"mode": "lora", "match": "all", "lora_dropout": 0.0} | changes)


def real_batch(model, processor, store, rows):
    """Pictures that leave a part of their tiles empty, texts of one length (so no padding, as the planner has it)."""
    examples = MappedExamples(toy.load("tune", 8), MapStore(store))
    chosen = [examples[i] for i in rows]
    wide = [(e._replace(image=lambda e=e: e.image().resize((150, 90))), stored) for e, stored in chosen]
    batch = Collator(processor, model.family, model.base.config)(wide)
    assert batch.pop("attention_mask").all()
    # The planner takes every condition to hold: here, that some row is empty.
    batch["words"]["rows"][-1] = -1
    return batch


def to_meta(batch):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), batch)


def nbytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# ------------------------------------------------------------------------------------------------------- to the byte


@pytest.mark.parametrize("mode", ["qlora", "lora", "full"])
def test_weights(vlm_folder, mode):
    model, *_ = runs.build(flags(vlm_folder, mode=mode))
    planned, empty = memory.Ledger(), memory.build(flags(vlm_folder, mode=mode), torch.float32)
    for label, tensor in memory.held(empty):
        planned.add(tensor, label)
    expected = nbytes([*model.parameters(), *model.buffers()])
    packed = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert bool(packed) == (mode == "qlora")
    for p in packed:
        scales = -(
            -p.quant_state.shape.numel() // 64
        )  # 8 bits each; float32 for 256 of them; codes of 16 and 256, a mean
        expected += scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)
    assert planned.live.total() == expected


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit"])
def test_optimizer_state(vlm_folder, name):
    import bitsandbytes as bnb

    model, *_ = runs.build(flags(vlm_folder))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.numel() >= 4096 for p in trained) and any(p.numel() < 4096 for p in trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    if name == "adamw_torch":
        optimizer = torch.optim.AdamW(trained)
        optimizer.step()
    else:
        optimizer = bnb.optim.AdamW8bit(trained)
        for i, p in enumerate(trained):  # what its first step does before it needs a GPU
            optimizer.init_state(optimizer.param_groups[0], p, 0, i)
    state = [x for s in optimizer.state.values() for k, x in s.items() if torch.is_tensor(x) and "qmap" not in k]
    assert sum(memory.optimizer_bytes(p, name) for p in trained) == nbytes(state)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, (0,)),
        ({"parallel_rank": 0, "lora_targets": "language"}, (1, 1)),
        ({"aggregate": "layer-mean", "aligner": "deep", "aligner_norm": "none"}, (1, 1)),
        ({"plain": True}, (0,)),
        ({"mode": "full"}, (0,)),
        ({"mode": "qlora"}, (0,)),
    ],
)
def test_saved_tensors_and_peak(vlm_folder, store_folder, changes, rows, checkpoint):
    """A real step in float32 on a CPU beside its plan."""
    asked = flags(vlm_folder, **changes)
    model, processor = runs.build(asked)
    empty = memory.build(asked, torch.float32)
    model.train()
    if checkpoint:
        for each in (model, empty):
            each.gradient_checkpointing_enable()
    batch = real_batch(model, processor, store_folder, rows)
    labelled = int((batch["labels"] != -100).sum())
    found = memory.simulate(empty, to_meta(batch), labelled, "adamw_torch", None)

    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch)["loss"]
    assert found.saved == sum(t.untyped_storage().nbytes() for t in saved.values())
    del loss
    saved.clear()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(**batch)["loss"].backward()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    base = sum(p.nbytes * (1 + p.requires_grad) for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    base += nbytes(x for x in tree_leaves(batch) if torch.is_tensor(x))
    peak = max(alive.total() for alive in found.peaks.values()) - found.kept["optimiser state"] - base
    assert peak == pytest.approx(most, rel=0.03)


# --------------------------------------------------------------------------------------------------------- the real one


def test_the_command_the_project_promises_fits_a_small_card(capsys):
    """Llama-3.2-11B-Vision in 4 bits, one text of 512 tokens, four tiles: at most 10 GiB (FACTS of the model beside it)."""
    asked = flags(LLAMA + "-Instruct", mode="qlora", lora_dropout=0.05)
    args = types.SimpleNamespace(per_device_train_batch_size=1, gradient_checkpointing=True, optim="paged_adamw_8bit")
    lines = memory.describe(asked, args).splitlines()
    size = {line[:42].strip(): float(line[42:].split()[0]) for line in lines if line[50:].startswith(" GiB")}
    peak = size.pop("peak, in the backward")
    assert peak == pytest.approx(sum(size.values()), abs=0.01) and 7 < peak < 10
    # 8.72 B text and 0.864 B vision weights of linear layers in NF4 (4 bits, 8 for 64 weights, 32 for 256 of those), the rest bf16
    nf4 = 0.5 + 1 / 64 + 4 / (64 * 256)
    assert size["weights: text layers"] * 2**30 == pytest.approx(8.72e9 * nf4, rel=0.01)
    assert size["weights: lm_head"] * 2**30 == pytest.approx(128256 * 4096 * 2, rel=1e-3)
    assert size["adapters"] * 2**30 == pytest.approx(8 * 8 * (6 * 4096 + 2 * 1024) * 4, rel=0.1)
    assert [line.split("fits")[0].strip() for line in lines if "fits" in line] == list(memory.CARDS)


def test_llama_has_as_many_parameters_as_it_should():
    host = memory.empty_host(flags(LLAMA), torch.bfloat16).model
    assert sum(p.numel() for p in host.parameters()) == pytest.approx(10.67e9, rel=1e-3)
    assert host.config.vision_config.image_size // host.config.vision_config.patch_size == 40


def test_a_hub_id_whose_config_is_not_known_is_one_line():
    with pytest.raises(
        ValueError, match="a folder with a config.json, or a model that it knows; got --vlm some/model"
    ) as error:
        memory.empty_host(flags("some/model"), torch.bfloat16)
    assert "\n" not in str(error.value)


def test_pretending_leaves_torch_as_it_was():
    """A tensor whose `__getitem__` was patched would count as a sequence from then on, and this call would fail."""
    with pretending.pretend(torch.Size([1, 2]), 1, None):
        assert torch.ones(3)[torch.tensor([True, False, True])].shape == (2,)
    assert torch.tensor([torch.tensor(3), torch.tensor(4)]).tolist() == [3, 4]
