"""The training step of a whole host in 4 bits, plain and with each way to align: time, memory, and what the planner said of it.

The architecture is the real one, the weights are random. The model is made without memory; then each layer in turn gets its numbers on the
GPU and is packed to NF4 (double quantisation) before the next one comes, so 22 GB never exist at once. A step is forward,
backward and the optimiser's, with activations checkpointed, 512 tokens of which 32 answer, each a word of its own, four tiles.

`HOSTS` holds what is measured; a second architecture is one more entry.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from gpu.record import Record
from measure import DEVICE, extra_peak_mib
from torch import nn
from transformers import AutoModelForImageTextToText, MllamaConfig

from lavender_min.align.aligner import Align
from lavender_min.geometry import MAP_SIDE, resize_matrix
from lavender_min.hosts import mllama
from lavender_min.tuning import memory, runs
from lavender_min.tuning.model import Lavender

MIB, HALF = 2**20, torch.bfloat16
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


class Size(NamedTuple):
    b: int
    tokens: int
    answer: int  # tokens of the answer
    rank: int  # of the low-rank parallel projections


class Host(NamedTuple):
    config: Any
    family: Any


HOSTS: dict[str, Callable[[bool], Host]] = {
    "Llama-3.2-11B-Vision": lambda tiny: Host(
        MllamaConfig(**TINY if tiny else {"vision_config": {"image_size": 560}, "text_config": {}}), mllama
    ),
}


def run(record: Record) -> None:
    tokens, answer, rank, repeats = (32, 8, 4, 1) if record.tiny else (512, 32, 64, 5)
    for name, make in HOSTS.items():
        torch.manual_seed(0)
        host, began = make(record.tiny), time.perf_counter()
        vlm = random_host(host)
        record.add(f"{name}, packed", seconds=time.perf_counter() - began, gib=held_bytes(vlm) / 2**30)
        with tempfile.TemporaryDirectory() as folder:
            host.config.save_pretrained(folder)
            plain = adapted(host, vlm, folder)
            for b in (1, 2):
                size, plain_ms = Size(b, tokens, answer, rank), 0.0
                for case in CASES:
                    what = f"{name}, batch {b}, {case}"
                    with record.trying(what):
                        row = measured(*step_of(host, plain, folder, case, size), repeats)
                        plain_ms = row["ms"] if case == "plain" else plain_ms
                        seconds = row["ms"] / 1e3
                        speed = {"pictures_per_second": b / seconds, "tokens_per_second": b * tokens / seconds}
                        record.add(what, **row, **speed, time_to_plain=row["ms"] / plain_ms if plain_ms else None)
                    if DEVICE == "cuda":  # the next case's weights beside the host are its own
                        gc.collect()
                        torch.cuda.empty_cache()


# --- the host ---------------------------------------------------------------------------------------------------------


def random_host(host: Host, dtype: torch.dtype = HALF) -> Any:
    """The hooked host with random weights on DEVICE, all linear layers but lm_head in NF4, packed one by one."""
    with init_empty_weights(include_buffers=False):
        vlm = AutoModelForImageTextToText.from_config(host.config, dtype=dtype)
    for name, module in list(vlm.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.randn(parameter.shape, dtype=dtype, device=DEVICE).mul_(0.02)
            value += 1 if "norm" in name and key == "weight" else 0
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        if isinstance(module, nn.Linear) and name != "lm_head":
            vlm.set_submodule(name, packed(module, dtype))
    vlm.to(DEVICE)
    vlm.is_loaded_in_4bit = True  # PEFT goes by this
    host.family.hook(vlm)
    return vlm


def packed(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """In NF4, the scales of 64 numbers once more in 8 bits."""
    import bitsandbytes as bnb

    layer: Any = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        compute_dtype=dtype, quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(DEVICE)
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = False  # on a CPU: no repacking, which takes widths of 64 only
    return layer


def real_batch(config: Any, size: Size) -> dict[str, Any]:
    """`memory.make_batch` with numbers: the last tokens answer, the picture fills four tiles."""
    b, tokens, answer, _ = size
    pixels = config.vision_config.image_size
    side = pixels // config.vision_config.patch_size
    ids = torch.randint(3, config.text_config.vocab_size, (b, tokens))
    word_tokens = torch.arange(tokens - answer, tokens, dtype=torch.int32).expand(b, -1)[..., None].contiguous()
    y, x = torch.arange(2 * side)[:, None], torch.arange(2 * side)[None]
    index = (y // side * 2 + x // side) * (side * side + 1) + 1 + y % side * side + x % side
    matrix = resize_matrix(2 * side).expand(b, -1, -1).contiguous()
    batch = {
        name: torch.ones(value.shape, dtype=value.dtype)
        for name, value in memory.make_batch(config, b, tokens, answer).items()
        if name != "layout"
    } | {
        "input_ids": ids,
        "pixel_values": torch.randn(b, 1, 4, 3, pixels, pixels),
        "aspect_ratio_ids": torch.full((b, 1), 6),  # two by two
        "labels": ids.where(torch.arange(tokens) >= tokens - answer, -100),
        "word_tokens": word_tokens,
        "word_rows": word_tokens - 1,
        "targets": torch.rand(b, answer, MAP_SIDE, MAP_SIDE),
        "layout": [index.int().expand(b, -1, -1).contiguous(), matrix, matrix.clone()],
    }
    return {k: [x.to(DEVICE) for x in v] if isinstance(v, list) else v.to(DEVICE) for k, v in batch.items()}


# --- the step: all that this benchmark knows of lavender_min.tuning stands in the next two functions ---------------------


def adapted(host: Host, vlm: Any, folder: str) -> Lavender:
    """The host with its adapters, which all cases share."""
    return runs.build(runs.ModelFlags(folder, mode="qlora", plain=True), HALF, loaded=(vlm, None, host.family))[0]


def step_of(
    host: Host, plain: Lavender, folder: str, case: str, size: Size
) -> tuple[Lavender, dict[str, Any], float]:
    """The model to train, a batch for it, and the bytes that the planner expects at the step's worst moment."""
    flags = runs.ModelFlags(**{"vlm": folder, "mode": "qlora", "match": "all", "parallel_rank": size.rank} | CASES[case])
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

    step()  # warms up, and makes gradients and the optimiser's state
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


def held_bytes(module: nn.Module) -> int:
    """Weights, and what 4-bit ones need beside their codes."""
    tensors: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        tensors[id(tensor)] = tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            tensors |= {id(part): part for part in parts}
    return sum(tensor.nbytes for tensor in tensors.values())
