"""A whole training step, plain and with each way to align, on one host in one run; and what the planner says of it.

On a GPU: the architecture of Llama-3.2-11B-Vision in NF4, with random weights (nothing is downloaded). On a CPU: the same at an
eighth of the width and a quarter of the depth in float32, by the process's CPU time, so that other processes do not count. There
the Aligner weighs hundreds of times more beside the host: its cost a word is the same, a token's is not.
"""

import contextlib
import json
import statistics
import time
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import init_empty_weights
from measure import DEVICE, extra_peak_mib, write
from torch import nn
from transformers import AutoModelForImageTextToText, MllamaConfig

from lavender_min.align.aligner import Align
from lavender_min.geometry import MAP_SIDE, resize_matrix
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
LLAMA = {"vision_config": {"image_size": 560}, "text_config": {}}
EIGHTH = {
    "vision_config": dict(
        image_size=280, hidden_size=160, num_hidden_layers=8, num_global_layers=2, attention_heads=4,
        intermediate_size=640, intermediate_layers_indices=[1, 3, 5, 6, 7], vision_output_dim=960,
    ),
    "text_config": dict(
        vocab_size=16032, hidden_size=512, num_hidden_layers=10, cross_attention_layers=[3, 8], num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=1792, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    ),
    "image_token_index": 16032,
}  # fmt: skip
TINY = {
    "vision_config": EIGHTH["vision_config"] | {"image_size": 56, "hidden_size": 32, "vision_output_dim": 192},
    "text_config": EIGHTH["text_config"]
    | {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "cross_attention_layers": [3],
    },
    "image_token_index": 64,
}


class Row(NamedTuple):
    op: str
    case: str
    milliseconds: float  # a step's median: forward, backward, optimiser
    time_ratio: float  # to the plain step of the same run
    peak_mib: float  # weights, gradients, optimiser and all a step holds at its worst
    memory_ratio: float
    planned_mib: float
    saved_mib: float  # kept by autograd between forward and backward, weights left out


def random_host(config: MllamaConfig, dtype: torch.dtype, quantize: bool) -> Any:
    """The hooked host with random weights on DEVICE, packed layer by layer, so that it never lies there unpacked."""
    with init_empty_weights(include_buffers=False):
        vlm = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for name, module in list(vlm.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.randn(parameter.shape, dtype=dtype, device=DEVICE) * 0.02
            value = value + 1 if "norm" in name and key == "weight" else value
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        if quantize and isinstance(module, nn.Linear) and name != "lm_head":
            import bitsandbytes as bnb

            options = {"compute_dtype": dtype, "quant_type": "nf4", "device": "meta"}
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, **options)
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(DEVICE)
            packed.bias = module.bias
            vlm.set_submodule(name, packed)
    vlm.to(DEVICE)
    vlm.is_loaded_in_4bit = quantize  # PEFT goes by this
    mllama.hook(vlm)
    return vlm


def real_batch(config: MllamaConfig, b: int, tokens: int, answer: int) -> dict[str, Any]:
    """`memory.make_batch` with numbers: the last tokens answer, the picture fills four tiles."""
    side = config.vision_config.image_size // config.vision_config.patch_size
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
        "pixel_values": torch.randn(b, 1, 4, 3, side * config.vision_config.patch_size, side * config.vision_config.patch_size),
        "aspect_ratio_ids": torch.full((b, 1), 6),  # 2 × 2
        "labels": ids.where(torch.arange(tokens) >= tokens - answer, -100),
        "word_tokens": word_tokens,
        "word_rows": word_tokens - 1,
        "targets": torch.rand(b, answer, MAP_SIDE, MAP_SIDE),
        "layout": [index.int().expand(b, -1, -1).contiguous(), matrix, matrix.clone()],
    }  # fmt: skip
    return {k: [x.to(DEVICE) for x in v] if isinstance(v, list) else v.to(DEVICE) for k, v in batch.items()}


def saved_bytes(forward, weights: set[int]) -> int:
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)


def run(shape: dict, folder: Any, b: int, tokens: int, answer: int, rank: int, repeats: int) -> list[Row]:
    gpu = DEVICE == "cuda"
    half, mode = (torch.bfloat16, "qlora") if gpu else (None, "lora")
    dtype, optim = half or torch.float32, "adamw_8bit" if gpu else "adamw_torch"
    config = MllamaConfig(**shape)
    config.save_pretrained(folder)
    flags = runs.ModelFlags(str(folder), mode=mode, match="all", parallel_rank=rank)
    torch.manual_seed(0)
    vlm, batch = random_host(config, dtype, gpu), real_batch(config, b, tokens, answer)
    plain = runs.build(runs.ModelFlags(**vars(flags) | {"plain": True}), dtype, loaded=(vlm, None, mllama))[0]
    attentions = mllama.layers(plain.host)

    def step(model, optimizer):
        with torch.autocast(DEVICE, half) if half else contextlib.nullcontext():
            loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    rows, times = [], {case: [] for case in CASES}
    made = {}
    for case, changes in CASES.items():
        asked = runs.ModelFlags(**vars(flags) | changes)
        align = None if asked.plain else Align(attentions, asked.aggregate, asked.parallel_rank).to(DEVICE)
        model = Lavender(plain.vlm, align, match="all").train()
        model.gradient_checkpointing_enable()
        trained = [p for p in model.parameters() if p.requires_grad]
        if gpu:
            import bitsandbytes as bnb

            optimizer = bnb.optim.AdamW8bit(trained, lr=1e-4)
        else:
            optimizer = torch.optim.AdamW(trained, lr=1e-4)
        made[case] = model, optimizer
        step(model, optimizer)  # warms up, and makes gradients and state
        before = torch.cuda.memory_allocated() if gpu else 0
        extra = extra_peak_mib(lambda made=made[case]: step(*made)) * MIB
        held = {id(x): x.nbytes for x in (*model.parameters(), *model.buffers(), *(p.grad for p in trained))}
        state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x))
        inputs = sum(x.nbytes for v in batch.values() for x in (v if isinstance(v, list) else [v]))
        peak = extra + (before if gpu else sum(held.values()) + state + inputs)
        weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        saved = saved_bytes(lambda model=model: model(**batch)["loss"], weights) if not gpu else 0
        empty = memory.build(asked, dtype)
        empty.gradient_checkpointing_enable()
        planned = memory.simulate(empty, memory.make_batch(config, b, tokens, answer), b * answer, optim, half)
        rows.append((case, peak, max(alive.total() for alive in planned.peaks.values()), saved or planned.saved))
        if gpu:  # the next case's weights beside the host are its own
            del made[case]
            times[case] = timed(step, {case: (model, optimizer)}, repeats)[case]
    if not gpu:  # in turns, so that a busy moment meets all
        times = timed(step, made, repeats)
    clock, most = ({case: statistics.median(x) for case, x in times.items()}, rows[0][1])
    return [
        Row(
            "step",
            case,
            clock[case],
            clock[case] / clock["plain"],
            *(peak / MIB, peak / most, planned / MIB, saved / MIB),
        )
        for case, peak, planned, saved in rows
    ]


def timed(step, made: dict[str, tuple], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every step: on a GPU by its clock, on a CPU those this process had."""
    times: dict[str, list[float]] = {case: [] for case in made}
    for _ in range(repeats):
        for case, (model, optimizer) in made.items():
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if DEVICE == "cuda" else time.process_time
            start = clock()
            step(model, optimizer)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[case].append(1e3 * (clock() - start))
    return times


def show(rows: list[Row]) -> None:
    print(f"\n{'':18}{'step':>12}{'':>8}{'peak':>14}{'':>8}{'planned':>14}{'':>8}{'saved':>12}")
    for row in rows:
        error = f"{100 * (row.planned_mib / row.peak_mib - 1):+.1f} %"
        print(
            f"{row.case:18}{row.milliseconds:9.1f} ms{row.time_ratio:8.3f}{row.peak_mib:10.1f} MiB{row.memory_ratio:8.3f}"
            f"{row.planned_mib:10.1f} MiB{error:>8}{row.saved_mib:8.1f} MiB"
        )


def test_the_step_benchmark_runs(tmp_path):
    rows = run(TINY, tmp_path / "host", 1, 32, 8, 4, 1)
    show(rows)
    assert [row.case for row in rows] == list(CASES)
    for row in rows:
        assert row.planned_mib == pytest.approx(row.peak_mib, rel=0.05)
    path = write(rows, tmp_path)
    assert len(json.loads(path.read_text())["step"]["rows"]) == len(CASES)


@pytest.mark.benchmark
def test_step(tmp_path):
    gpu = DEVICE == "cuda"
    rows = run(LLAMA, tmp_path, 1, 512, 32, 64, 10) if gpu else run(EIGHTH, tmp_path, 1, 128, 8, 8, 5)
    show(rows)
    write(rows)
    for row in rows:
        assert row.planned_mib == pytest.approx(row.peak_mib, rel=0.1)
