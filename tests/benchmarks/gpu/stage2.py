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
from dataclasses import replace
from typing import Any

import torch
from measure import DEVICE, extra_peak_mib
from torch.utils._pytree import tree_leaves
from transformers import MllamaConfig

from gpu.random_host import HALF, Blueprint, Size, held_bytes, random_host, real_batch
from gpu.record import Record
from lavender_min.align.aligner import Align
from lavender_min.hosts.load import Host
from lavender_min.hosts.mllama import LLAMA, Mllama
from lavender_min.tuning import memory, runs
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import Lavender, read_layers

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


HOSTS: dict[str, Callable[[bool], Blueprint]] = {
    "Llama-3.2-11B-Vision": lambda tiny: Blueprint(MllamaConfig(**TINY) if tiny else Mllama().config(LLAMA), Mllama()),
}


def run(record: Record) -> None:
    tokens, answer, rank, repeats = (32, 8, 4, 1) if record.tiny else (512, 32, 64, 4)
    for name, make in HOSTS.items():
        torch.manual_seed(0)
        blueprint, began = make(record.tiny), time.perf_counter()
        host = random_host(blueprint)
        record.add(f"{name}, packed", seconds=time.perf_counter() - began, gib=held_bytes(host) / 2**30)
        with tempfile.TemporaryDirectory() as folder:
            blueprint.config.save_pretrained(folder)
            flags = ModelFlags(folder, mode="qlora", match="all")
            plain = adapted(host, blueprint, flags)
            for b in (1, 2):
                size, plain_ms = Size(b, tokens, answer, rank), math.nan
                for case in CASES:
                    what = f"{name}, batch {b}, {case}"
                    with record.trying(what):
                        own = changed(flags, case, rank)
                        peak = peak_of(planned(own, blueprint, size))
                        row = measured(aligned(plain, own), real_batch(blueprint, size), peak, repeats)
                        plain_ms = row["ms"] if case == "plain" else plain_ms
                        seconds = row["ms"] / 1e3
                        speed = {"pictures_per_second": b / seconds, "tokens_per_second": b * tokens / seconds}
                        record.add(what, **row, **speed, time_to_plain=row["ms"] / plain_ms)
                    # The next case brings its own weights beside the host.
                    if DEVICE == "cuda":
                        gc.collect()
                        torch.cuda.empty_cache()


# --- all that this benchmark knows of lavender_min.tuning stands in the next functions ------------------------------------


def adapted(host: Any, blueprint: Blueprint, flags: ModelFlags, dtype: torch.dtype = HALF) -> Lavender:
    """The host with its adapters, which all cases share."""
    return runs.build(replace(flags, plain=True), dtype, loaded=Host(host, None, blueprint.family))[0]


def changed(flags: ModelFlags, case: str, rank: int) -> ModelFlags:
    return replace(flags, **{"parallel_rank": rank, **CASES[case]})


def aligned(plain: Lavender, flags: ModelFlags) -> Lavender:
    """The adapted host, and beside it what these flags ask for."""
    attentions = read_layers(plain.family, plain.base, flags.align_layers)
    heads = plain.family.heads(next(iter(attentions.values()))).query
    align = None if flags.plain else Align(attentions, heads, flags.aggregate, flags.parallel_rank).to(DEVICE)
    model = Lavender(plain.host, plain.family, align, match="all", align_layers=flags.align_layers).train()
    model.gradient_checkpointing_enable()
    return model


def planned(flags: ModelFlags, blueprint: Blueprint, size: Size, half: torch.dtype | None = HALF) -> memory.Plan:
    """What the planner says of the step."""
    optim = "paged_adamw_8bit" if half else "adamw_torch"
    empty = memory.build(flags, half or torch.float32)
    empty.gradient_checkpointing_enable()
    picture = blueprint.family.imagine(blueprint.config, size.b, size.tokens)
    batch = memory.make_batch(picture, size.b, size.tokens, size.answer)
    return memory.simulate(empty, batch, size.b * size.answer, optim, half)


def peak_of(plan: memory.Plan) -> float:
    return max(alive.total() for alive in plan.peaks.values())


def measured(model: Any, batch: dict[str, Any], expected: float, repeats: int) -> dict[str, Any]:
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
        inputs = [x for x in tree_leaves(batch) if torch.is_tensor(x)]
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
        "ms": statistics.median(times), "peak_gib": peak / 2**30, "planned_gib": expected / 2**30,
        "planner_error": expected / peak - 1, "trained": sum(p.numel() for p in trained),
    }  # fmt: skip
