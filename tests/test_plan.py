"""The planner against real steps: weights, optimiser and saved tensors to the byte, the peak against the allocator's events."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lavender_min import plan, runs
from lavender_min.maps import MapStore
from lavender_min.toy import data as toy
from lavender_min.training import Collator, MappedExamples


def flags(folder, **changes):
    return runs.ModelFlags(folder, **{"mode": "lora", "match": "all", "lora_dropout": 0.0} | changes)


def real_batch(model, processor, host, store, rows):
    """Pictures that leave a part of their tiles empty, texts of one length (so no padding, as the planner has it)."""
    examples = MappedExamples(toy.load("tune", 8), MapStore(store))
    chosen = [examples[i] for i in rows]
    wide = [(e._replace(image=lambda e=e: e.image().resize((150, 90))), stored) for e, stored in chosen]
    batch = Collator(processor, model.host.config, host)(wide)
    assert batch.pop("attention_mask").all()
    return batch


def to_meta(batch):
    return {k: [x.to("meta") for x in v] if isinstance(v, list) else v.to("meta") for k, v in batch.items()}


def nbytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# ------------------------------------------------------------------------------------------------------- to the byte


@pytest.mark.parametrize("mode", ["qlora", "lora", "full"])
def test_weights(vlm_folder, mode):
    model, *_ = runs.build(flags(vlm_folder, mode=mode))
    planned, empty = plan.Ledger(), plan.build(flags(vlm_folder, mode=mode), torch.float32)
    for label, tensor in plan.held(empty):
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
    assert sum(plan.optimizer_bytes(p, name) for p in trained) == nbytes(state)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, (0,)),
        ({"parallel_rank": 0, "lora_targets": "language"}, (1, 1)),
        ({"aggregate": "layer-mean", "aligner": "deep", "aligner_norm": "none"}, (1, 1)),
        ({"plain": True}, (0,)),
        ({"mode": "full"}, (0,)),
    ],
)
def test_saved_tensors_and_peak(vlm_folder, store_folder, changes, rows, checkpoint):
    """A real step in float32 on a CPU beside its plan."""
    asked = flags(vlm_folder, **changes)
    model, processor, host = runs.build(asked)
    empty = plan.build(asked, torch.float32)
    model.train()
    if checkpoint:
        for each in (model, empty):
            each.gradient_checkpointing_enable()
    batch = real_batch(model, processor, host, store_folder, rows)
    labelled = int((batch["labels"] != -100).sum())
    found = plan.simulate(empty, to_meta(batch), labelled, "adamw_torch", None)

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
    base += nbytes(x for v in batch.values() for x in (v if isinstance(v, list) else [v]))
    peak = max(alive.total() for alive in found.peaks.values()) - found.kept["optimiser state"] - base
    assert peak == pytest.approx(most, rel=0.03)
