"""A whole training step, plain and with each way to align, in one run; and what the planner says of it.

An eighth of Llama-3.2-11B-Vision's width and a quarter of its depth, in float32 on a CPU, by the process's CPU time, so that other
processes do not count. At that width the Aligner weighs hundreds of times more beside the host: its cost a word is the same, a
token's is not. The real architecture is measured on a GPU by gpu/stage2.py, from which host, batch and plan are taken.
"""

import json
import statistics
import time
from typing import Any, NamedTuple

import pytest
import torch
from gpu.random_host import Blueprint, Size, random_host, real_batch
from gpu.stage2 import CASES, adapted, aligned, changed, peak_of, planned
from measure import extra_peak_mib, write
from torch.utils._pytree import tree_leaves
from transformers import MllamaConfig

from lavender_min.hosts.mllama import Mllama
from lavender_min.tuning.flags import ModelFlags

MIB = 2**20
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
    # A step's median: forward, backward, optimiser.
    milliseconds: float
    # To the plain step of the same run.
    time_ratio: float
    # Weights, gradients, optimiser and all a step holds at its worst.
    peak_mib: float
    memory_ratio: float
    planned_mib: float
    # Kept by autograd between forward and backward, weights left out.
    saved_mib: float


class Made(NamedTuple):
    """A model that has made one step, so that gradients and the optimiser's state are there."""

    model: Any
    optimizer: Any

    def step(self, batch: dict[str, Any]) -> None:
        self.model(**batch)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def held(self, batch: dict[str, Any]) -> int:
        """Bytes that stay from step to step, and the batch."""
        model = [*self.model.parameters(), *self.model.buffers()]
        gradients = [p.grad for p in model if p.grad is not None]
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        tensors = {id(x): x.nbytes for x in (*model, *gradients, *state, *tree_leaves(batch)) if torch.is_tensor(x)}
        return sum(tensors.values())

    def saved(self, batch: dict[str, Any]) -> int:
        """Bytes that a forward keeps for its backward, weights left out."""
        weights = {x.untyped_storage().data_ptr() for x in (*self.model.parameters(), *self.model.buffers())}
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**batch)["loss"]
        del loss
        return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)


def run(shape: dict, folder: Any, size: Size, repeats: int) -> list[Row]:
    blueprint = Blueprint(MllamaConfig(**shape), Mllama())
    blueprint.config.save_pretrained(folder)
    flags = ModelFlags(str(folder), match="all")
    torch.manual_seed(0)
    host, batch = random_host(blueprint, torch.float32, quantize=False), real_batch(blueprint, size)
    plain = adapted(host, blueprint, flags, torch.float32)
    made: dict[str, Made] = {}
    peaks, plans, saved = {}, {}, {}
    for case in CASES:
        own = changed(flags, case, size.rank)
        model = aligned(plain, own)
        made[case] = Made(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))
        made[case].step(batch)
        extra = extra_peak_mib(lambda case=case: made[case].step(batch))
        peaks[case] = extra + made[case].held(batch) / MIB
        saved[case] = made[case].saved(batch) / MIB
        plans[case] = peak_of(planned(own, blueprint, size, None)) / MIB
    clock = {case: statistics.median(times) for case, times in timed(made, batch, repeats).items()}
    return [
        Row(
            "step", case, clock[case], clock[case] / clock["plain"], peaks[case], peaks[case] / peaks["plain"],
            plans[case], saved[case],
        )
        for case in CASES
    ]  # fmt: skip


def timed(made: dict[str, Made], batch: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds of every step, in turns, so that a busy moment meets all."""
    times: dict[str, list[float]] = {case: [] for case in made}
    for _ in range(repeats):
        for case, one in made.items():
            start = time.process_time()
            one.step(batch)
            times[case].append(1e3 * (time.process_time() - start))
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
    rows = run(TINY, tmp_path / "host", Size(1, 32, 8, 4), 1)
    show(rows)
    assert [row.case for row in rows] == list(CASES)
    for row in rows:
        assert row.planned_mib == pytest.approx(row.peak_mib, rel=0.05)
    path = write(rows, tmp_path)
    assert len(json.loads(path.read_text())["step"]["rows"]) == len(CASES)


@pytest.mark.benchmark
def test_step(tmp_path):
    rows = run(EIGHTH, tmp_path, Size(1, 128, 8, 8), 5)
    show(rows)
    write(rows)
    for row in rows:
        assert row.planned_mib == pytest.approx(row.peak_mib, rel=0.1)
