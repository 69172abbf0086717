"""The training step of a whole host in 4 bits, plain and with each way to align: time, memory, and what the planner said of it.

The architecture is the real one, the weights are random (see random_host.py). A step is forward, backward and the optimiser's, with
activations checkpointed, 512 tokens of which 32 answer, each a word of its own, and a picture of four tiles.

`HOSTS` holds what is measured; a second architecture is one more entry.
"""

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import DEVICE, extra_peak_mib
from transformers import MllamaConfig

from gpu.random_host import HALF, Host, Size, held_bytes, random_host, real_batch
from gpu.record import Record
from lavender_min.align.aligner import Align
from lavender_min.hosts import mllama
from lavender_min.tuning import memory, runs
from lavender_min.tuning.model import Lavender

MIB = 2**20
CASES: dict[str, dict[str, Any]] = {
    "plain": {"plain": True},
    "layer-mean": {"aggregate": "layer-mean"},
    "learn, low rank": {"aggregate": "learn"},
    "learn, full rank": {"aggregate": "learn", "parallel_rank": 0},
}
TINY = {
    "vision_config": dict(
        image_size=56, hidden_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=4, intermediate_size=64,
        intermediate_layers_indices=[1], vision_output_dim=64,
    ),
    "text_config": dict(
        vocab_size=64, hidden_size=64, num_hidden_layers=3, cross_attention_layers=[1], num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    ),
    "image_token_index": 64,
}  # fmt: skip


HOSTS: dict[str, Callable[[bool], Host]] = {
    "Llama-3.2-11B-Vision": lambda tiny: Host(
        MllamaConfig(**TINY if tiny else {"vision_config": {"image_size": 560}, "text_config": {}}), mllama
    ),
}


def run(record: Record) -> None:
    tokens, answer, rank, repeats = (32, 8, 4, 1) if record.tiny else (512, 32, 64, 4)
    for name, make in HOSTS.items():
        torch.manual_seed(0)
        host, began = make(record.tiny), time.perf_counter()
        vlm = random_host(host)
        record.add(f"{name}, packed", seconds=time.perf_counter() - began, gib=held_bytes(vlm) / 2**30)
        with tempfile.TemporaryDirectory() as folder:
            host.config.save_pretrained(folder)
            plain = adapted(host, vlm, folder)
            for b in (1, 2):
                size, plain_ms = Size(b, tokens, answer, rank), math.nan
                for case in CASES:
                    what = f"{name}, batch {b}, {case}"
                    with record.trying(what):
                        row = measured(*step_of(host, plain, folder, case, size), repeats)
                        plain_ms = row["ms"] if case == "plain" else plain_ms
                        seconds = row["ms"] / 1e3
                        speed = {"pictures_per_second": b / seconds, "tokens_per_second": b * tokens / seconds}
                        record.add(what, **row, **speed, time_to_plain=row["ms"] / plain_ms)
                    # The next case brings its own weights beside the host.
                    if DEVICE == "cuda":
                        gc.collect()
                        torch.cuda.empty_cache()


# --- the step: all that this benchmark knows of lavender_min.tuning stands in the next two functions ---------------------


def adapted(host: Host, vlm: Any, folder: str) -> Lavender:
    """The host with its adapters, which all cases share."""
    return runs.build(runs.ModelFlags(folder, mode="qlora", plain=True), HALF, loaded=(vlm, None, host.family))[0]


def step_of(host: Host, plain: Lavender, folder: str, case: str, size: Size) -> tuple[Lavender, dict[str, Any], float]:
    """The model to train, a batch for it, and the bytes that the planner expects at the step's worst moment."""
    usual = {"vlm": folder, "mode": "qlora", "match": "all", "parallel_rank": size.rank}
    flags = runs.ModelFlags(**usual | CASES[case])
    empty = memory.build(flags, HALF)
    empty.gradient_checkpointing_enable()
    batch = memory.make_batch(host.config, size.b, size.tokens, size.answer)
    plan = memory.simulate(empty, batch, size.b * size.answer, "paged_adamw_8bit", HALF)
    planned = max(alive.total() for alive in plan.peaks.values())

    attentions = host.family.layers(plain.host)
    align = None if flags.plain else Align(attentions, flags.aggregate, flags.parallel_rank).to(DEVICE)
    model = Lavender(plain.vlm, align, match="all").train()
    model.gradient_checkpointing_enable()
    return model, real_batch(host.config, size), planned


def measured(model: Any, batch: dict[str, Any], planned: float, repeats: int) -> dict[str, Any]:
    """A step's median time, and the most memory held in one, against the plan."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if DEVICE == "cuda":
        import bitsandbytes as bnb

        optimizer = bnb.optim.PagedAdamW8bit(trained, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        with torch.autocast(DEVICE, HALF):
            loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    # The first one warms up, and makes gradients and the optimiser's state.
    step()
    state = [x for values in optimizer.state.values() for x in values.values() if torch.is_tensor(x)]
    if DEVICE == "cuda":
        # paged state lies beside what PyTorch's allocator counts
        held = torch.cuda.memory_allocated() + sum(x.nbytes for x in state if getattr(x, "is_paged", False))
    else:
        inputs = [x for value in batch.values() for x in (value if isinstance(value, list) else [value])]
        held = held_bytes(model) + sum(x.nbytes for x in (*state, *inputs, *(p.grad for p in trained)))
    peak = held + extra_peak_mib(step) * MIB
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    del optimizer
    for parameter in trained:
        parameter.grad = None
    return {
        "ms": statistics.median(times), "peak_gib": peak / 2**30, "planned_gib": planned / 2**30,
        "planner_error": planned / peak - 1, "trained": sum(p.numel() for p in trained),
    }  # fmt: skip
