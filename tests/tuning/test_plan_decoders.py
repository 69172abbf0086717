"""The planner on decoders: the tensors that a real step saves, to the byte; and the published models, from their configs alone."""

import sys
import types

import pytest
import torch
from conftest import ROOT
from torch.utils._pytree import tree_map_only

from lavender_min.hosts import published
from lavender_min.hosts.decoder import KINDS
from lavender_min.hosts.load import Host, family_of
from lavender_min.hosts.reading import hook
from lavender_min.maps import MapStore
from lavender_min.toy import data as toy
from lavender_min.tuning import memory, runs
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import ModelFlags

sys.path.insert(0, str(ROOT / "tests" / "hosts"))
import zoo  # noqa: E402

# Of the published safetensors, by the hub's pages.
PARAMETERS = {
    "Qwen/Qwen2-VL-7B": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen/Qwen3-VL-8B": 8_767_123_696,
    "HuggingFaceTB/SmolVLM2-2.2B": 2_246_784_880,
    "llava-hf/llava-1.5-7b": 7_063_427_072,
    "llava-hf/llava-v1.6-mistral-7b": 7_566_747_648,
    "llava-hf/llava-onevision-qwen2-7b": 8_030_348_832,
    "google/gemma-3-4b": 4_300_079_472,
    "google/paligemma-3b-mix-224": 2_923_466_480,
    "OpenGVLab/InternVL3-8B": 7_944_373_760,
}


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm", "paligemma"])
def test_saved_tensors(name, tmp_path, store_folder):
    """A real step in float32 on a CPU, and its plan."""
    folder = zoo.save(name, tmp_path)
    flags = ModelFlags(folder, match="all", lora_dropout=0.0)
    model, processor = zoo.built(name)
    host = Host(model, processor, family_of(name, name))
    hook(host.model, host.family)
    real, _ = runs.build(flags, loaded=host)
    empty = memory.build(flags, torch.float32)
    for each in (real.train(), empty):
        each.gradient_checkpointing_enable()
    batch = Collator(processor, host.family, real.base.config)(
        [MappedExamples(toy.load("tune", 8), MapStore(store_folder))[1]]
    )
    assert batch.pop("attention_mask").all()
    if "image_grid_thw" in batch:
        # As the planner imagines them; the model would compute them from numbers.
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(3, 1, -1)
    # The planner takes every condition to hold: here, that some row is empty.
    batch["words"]["rows"][-1] = -1
    planned = {key: value for key, value in batch.items() if key not in ("labels", "words")}
    planned |= tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), {k: batch[k] for k in ("labels", "words")})
    labelled = int((batch["labels"] != -100).sum())
    found = memory.simulate(empty, planned, labelled, "adamw_torch", None)

    weights = {t.untyped_storage().data_ptr() for t in (*real.parameters(), *real.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real(**batch)
    assert found.saved == pytest.approx(sum(t.untyped_storage().nbytes() for t in saved.values()), rel=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_the_largest_picture_is_planned(name, tmp_path):
    """The whole command on a folder that has a config only."""
    zoo.built(name)[0].config.save_pretrained(tmp_path)
    args = types.SimpleNamespace(per_device_train_batch_size=2, gradient_checkpointing=True, optim="paged_adamw_8bit")
    text = memory.describe(ModelFlags(str(tmp_path), mode="qlora"), args, 64)
    assert "tokens of a picture" in text and "T4 16 GB    fits" in text


def test_published_models_have_as_many_parameters_as_their_weights():
    from transformers import AutoModelForImageTextToText

    assert list(PARAMETERS) == list(published.MODELS)
    for name, parameters in PARAMETERS.items():
        with torch.device("meta"):
            host = AutoModelForImageTextToText.from_config(published.config(f"{name}-hf"))
        assert sum(p.numel() for p in host.parameters()) == parameters, name
    assert published.config("some/model") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_are_planned(name):
    args = types.SimpleNamespace(per_device_train_batch_size=1, gradient_checkpointing=True, optim="paged_adamw_8bit")
    text = memory.describe(ModelFlags(name, mode="qlora"), args)
    print(text)
    assert "A100 40 GB  fits" in text
