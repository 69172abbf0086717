"""A training step with every aggregation, beside `layer-mean`, in one run: time and memory, on both kinds of host.

The hosts are the toys, one that looks by cross-attention and one that has the picture among its text, wider, deeper and with random
weights; pictures, texts and collator are real. A step is forward, backward and the optimiser's, with activations checkpointed.
Time is the process's CPU time, in turns. Beside it stands what the planner says of published hosts in 4 bits.
"""

import json
import statistics
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from gpu.random_host import Blueprint
from gpu.stage2 import HALF, adapted, aligned, peak_of
from measure import extra_peak_mib, write
from test_step import MIB, Made, timed

from lavender_min import data
from lavender_min.align import AGGREGATIONS
from lavender_min.geometry import MAP_SIDE
from lavender_min.hosts.load import family_of
from lavender_min.hosts.reading import hook
from lavender_min.maps import StoredMaps
from lavender_min.toy import hosts
from lavender_min.tuning import memory
from lavender_min.tuning.collator import Collator
from lavender_min.tuning.flags import ModelFlags
from lavender_min.words import find_words

BASELINE = "layer-mean"
CASES: dict[str, dict[str, Any]] = {
    "plain": {"plain": True},
    BASELINE: {"aggregate": BASELINE},
    **{name: {"aggregate": name} for name in AGGREGATIONS if name not in (BASELINE, "learn")},
    "learn, rank 64": {"aggregate": "learn"},
    "learn, full rank": {"aggregate": "learn", "parallel_rank": 0},
}
# The toy host that is measured, and the published one of its kind that is planned.
KINDS = {"mllama": "meta-llama/Llama-3.2-11B-Vision-Instruct", "qwen2_vl": "Qwen/Qwen2.5-VL-7B-Instruct"}
# Heads stay as wide as Qwen's rotation has them.
WIDE = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 16, "num_hidden_layers": 10}


class Row(NamedTuple):
    op: str
    host: str
    case: str
    milliseconds: float
    # To layer-mean's step of the same run.
    time_ratio: float
    # Beyond what stays from step to step.
    extra_mib: float
    memory_ratio: float
    # The planned peak of a step of the published host, and how much of it is more than layer-mean's.
    planned_gib: float
    planned_more_mib: float


def wide_host(name: str, more: dict[str, int]) -> tuple[Blueprint, Any, Any]:
    """(config and family, hooked host with random weights, processor)."""
    examples = data.load("toy", split="heldout")
    model, processor, *_ = hosts.HOSTS[name]([f"{e.question} {e.answer} user assistant" for e in examples[:300]])
    config = model.config
    config.text_config.update(more)
    if name == "qwen2_vl" and more:
        # Its merger already speaks in the text's width, and each layer has an entry.
        config.vision_config.hidden_size = more["hidden_size"]
        config.text_config.layer_types = ["full_attention"] * more["num_hidden_layers"]
    torch.manual_seed(0)
    family, host = family_of(name, name), type(model)(config)
    hook(host, family)
    return Blueprint(config, family), host, processor


def batch_of(blueprint: Blueprint, processor: Any, texts: int) -> dict[str, Any]:
    """Held-out examples, every word with a map."""
    rows = []
    for example in data.load("toy", split="heldout")[:texts]:
        words = find_words(example.fields)
        maps = torch.rand(len(words), MAP_SIDE, MAP_SIDE, generator=torch.Generator().manual_seed(0))
        rows.append((example, StoredMaps(example.question, example.answer, words, maps, 0.5)))
    return Collator(processor, blueprint.family, blueprint.config, words="all")(rows)


def planned_bytes(vlm: str, case: dict[str, Any], tokens: int = 512) -> int:
    """As `train.py --plan` has it: batch 1, a quarter of the tokens answers, each a word."""
    empty = memory.build(replace(ModelFlags(vlm, mode="qlora"), **case), HALF)
    empty.gradient_checkpointing_enable()
    batch = memory.make_batch(empty.family.imagine(empty.base.config, 1, tokens), 1, tokens, tokens // 4)
    return peak_of(memory.simulate(empty, batch, tokens // 4, "paged_adamw_8bit", HALF))


def run(name: str, more: dict[str, int], texts: int, repeats: int, plans: dict[str, int]) -> list[Row]:
    blueprint, host, processor = wide_host(name, more)
    batch = batch_of(blueprint, processor, texts)
    flags = ModelFlags(KINDS[name], match="all")
    plain = adapted(host, blueprint, flags, torch.float32)
    made, peaks = {}, {}
    for case, changes in CASES.items():
        model = aligned(plain, replace(flags, **changes))
        made[case] = Made(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))
        made[case].step(batch)
        peaks[case] = extra_peak_mib(lambda case=case: made[case].step(batch))
    clock = {case: statistics.median(times) for case, times in timed(made, batch, repeats).items()}
    return [
        Row(
            "aggregations", name, case, clock[case], clock[case] / clock[BASELINE], peaks[case], peaks[case] / peaks[BASELINE],
            plans[case] / 2**30, (plans[case] - plans[BASELINE]) / MIB,
        )
        for case in CASES
    ]  # fmt: skip


def show(rows: list[Row]) -> None:
    """Markdown, as the README has it."""
    print(f"\n| | {' | '.join(f'{name}: time | memory | planned, {vlm}' for name, vlm in KINDS.items())} |")
    print("|---|" + "---:|" * 3 * len(KINDS))
    for case in CASES:
        cells = [
            f"{row.time_ratio:.2f} × | {row.memory_ratio:.2f} × | {row.planned_gib:.2f} GiB ({row.planned_more_mib:+.0f} MiB)"
            for row in rows
            if row.case == case
        ]
        print(f"| {case} | {' | '.join(cells)} |")


def test_the_benchmark_of_aggregations_runs(tmp_path):
    rows = run("qwen2_vl", {}, 2, 1, dict.fromkeys(CASES, 0))
    assert [row.case for row in rows] == list(CASES)
    assert all(row.milliseconds > 0 and row.extra_mib > 0 for row in rows)
    path = write(rows, tmp_path)
    assert len(json.loads(path.read_text())["aggregations"]["rows"]) == len(CASES)


@pytest.mark.benchmark
def test_aggregations():
    rows = []
    for name, vlm in KINDS.items():
        plans = {case: planned_bytes(vlm, changes) for case, changes in CASES.items()}
        rows += run(name, WIDE, 8, 7, plans)
    show(rows)
    write(rows)
    for name in KINDS:
        own = {row.case: row for row in rows if row.host == name}
        # Pooling heads inside the attention function must pay: less stays of each layer.
        assert own["mean-mean"].memory_ratio <= 1.02 and own["mean-mean"].planned_more_mib <= 0
        assert own["plain"].time_ratio <= 1.02
