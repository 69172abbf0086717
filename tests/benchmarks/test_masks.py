"""What the bidirectional mask changes: a tiny SigLIP and Qwen2 through the four stages, from random weights, under both masks.

Everything else is equal: parts, seeds, data, order. Run from the repository, some minutes a seed on one thread:

    OMP_NUM_THREADS=1 python -m pytest -m benchmark tests/benchmarks/test_masks.py -s

It prints, for each mask and seed, the loss of the last steps, the share of right answers to held-out questions by kind, and what a
step keeps for its backward pass. What came out stands in experiments/LOG.md.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import tiny_parts
import torch
from conftest import ROOT

from lavender_min.evaluation.models import answer
from lavender_min.hosts import assemble
from lavender_min.toy import data
from lavender_min.tuning import runs, stages
from lavender_min.tuning.collator import Collator
from lavender_min.tuning.flags import ModelFlags

SEEDS = (0, 1)
SCENES = 60
SCHEDULE = ROOT / "configs" / "four_stages_toy.yaml"


def host(folder: Path, mask: str, seed: int) -> Path:
    """64 patches of 16 pixels; widths and depths as the toy Mllama's."""
    torch.manual_seed(seed)
    vision = tiny_parts.siglip(
        folder / "siglip", 128, 16, hidden_size=96, num_hidden_layers=3, intermediate_size=192, initializer_range=0.08
    )
    llm = tiny_parts.qwen2(
        folder / "qwen2", hidden_size=128, num_hidden_layers=4, intermediate_size=256, initializer_range=0.08
    )
    words = ["--vision", vision, "--llm", llm, "--mask", mask, "--seed", seed, folder / "host"]
    assert assemble.main(list(map(str, words))) == 0
    return folder / "host"


def kept_bytes(folder: Path) -> int:
    """What autograd keeps of one step with 16 texts, without weights; one storage counts once."""
    model, processor = runs.build(ModelFlags(str(folder), mode="full", plain=True))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The storage is held, so that no other takes its address.
            kept[storage.data_ptr()] = storage
        return tensor

    batch = Collator(processor, model.family, model.base.config)([(e, None) for e in data.load("tune", 8)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def right_answers(folder: Path) -> dict[str, float]:
    """In percent, by kind of question."""
    model, processor = runs.build(runs.recall(folder), trained=folder)
    asked = [e for e in data.load("heldout", SCENES) if e.question]
    found = defaultdict(list)
    for example, said in zip(asked, answer(model, processor, asked, 32), strict=True):
        found[example.kind].append(said.strip() == example.answer)
        found["all"].append(found[example.kind][-1])
    return {kind: 100 * sum(right) / len(right) for kind, right in found.items()}


@pytest.mark.benchmark
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mask", assemble.MASKS)
def test_both_masks(mask, seed, tmp_path, capsys):
    start = host(tmp_path, mask, seed)
    out = tmp_path / "out"
    assert stages.main([str(SCHEDULE), "--vlm", str(start), "--output_dir", str(out)]) == 0
    *_, last = sorted(out.iterdir())
    state = json.loads((last / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    with capsys.disabled():
        print(
            f"\n{mask}, seed {seed}: loss {sum(losses[-3:]) / 3:.4f}; a step keeps {kept_bytes(start) / 2**20:.2f} MiB; right: "
            + ", ".join(f"{kind} {share:.1f}" for kind, share in right_answers(last).items())
        )
    assert losses[-1] < losses[0]
