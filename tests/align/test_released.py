"""The released code's formulas beside ours, where the two differ: docs/released.md names these tests, row by row."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import MllamaConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from lavender_min import ops
from lavender_min.align.aligner import Align
from lavender_min.geometry import MAP_SIDE, PatchLayout, minmax
from lavender_min.hosts.mllama import Mllama
from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning import runs
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import ModelFlags


class FakeProcessor:
    image_processor = MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)


@pytest.mark.parametrize(("size", "columns"), [((2100, 500), 4), ((500, 1000), 1), ((1000, 1000), 2)])
def test_tiles_lie_as_the_picture_was_cut(size, columns):
    """There tile k always lies at row k // 2, column k % 2: right for 2 × 2 tiles only."""
    config = MllamaConfig(vision_config={"image_size": 560, "patch_size": 14})
    [view] = Mllama().views(size, FakeProcessor, config, torch.zeros(0).long(), (0.0, 1.0, 0.0, 1.0))
    tile_of = view.index[0] // 1601
    theirs = {k: (k // 2, k % 2) for k in range(4)}
    ours = {
        int(tile_of[y, x]): (y // 40, x // 40)
        for y in range(0, len(tile_of), 40)
        for x in range(0, tile_of.shape[1], 40)
        if view.index[0, y, x] >= 0
    }
    assert ours == {k: divmod(k, columns) for k in ours}
    assert (ours == {k: theirs[k] for k in ours}) is (columns == 2)


def test_empty_tiles_take_no_attention():
    """There parallel attention has no mask, so a picture of one tile shares the softmax with three empty ones."""
    torch.manual_seed(0)
    query, key, rows = torch.zeros(1, 1, 1, 8), torch.randn(1, 1, 4 * 17, 8), torch.tensor([0])
    cells = torch.arange(16).view(1, 4, 4).int() + 1
    view = PatchLayout(cells, torch.eye(4)[None], torch.eye(4)[None])
    real = (torch.arange(4 * 17) < 17)[None, None, None]
    seen = {
        name: ops.word_attention(query, key, rows, [1], view, attn_mask=mask).sum().item()
        for name, mask in (("ours", real), ("theirs", None))
    }
    assert seen["ours"] == pytest.approx(16 / 17) and seen["theirs"] == pytest.approx(16 / 68)


def test_no_matched_word_costs_nothing():
    """There a batch in which no word matches adds a constant 10, which moves the reported loss and no weight."""
    align = Align({}, 4, "layer-mean")
    maps = torch.rand(3, 4, 9, 9, requires_grad=True)
    loss = align.loss(maps, torch.rand(3, 9, 9), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0 and not maps.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in align.parameters())


def test_the_loss_is_theirs_where_words_match():
    """There: squared errors' mean over cells, added up over words, divided by their number. The same as ours."""
    torch.manual_seed(0)
    align = Align({}, 4, "layer-mean")
    maps, target = torch.rand(5, 4, 32, 32), torch.rand(5, 32, 32)
    predicted = minmax(align.aligner.predict(maps))
    theirs = sum(F.mse_loss(a, b) for a, b in zip(predicted, target, strict=True)) / 5
    torch.testing.assert_close(align.loss(maps, target, torch.ones(5)), theirs)


def test_words_of_several_tokens_are_aligned_and_the_prompt_is_not(vlm_folder, store_folder):
    """There a row belongs to a word if the one token it predicts is that word, anywhere in the text, prompt and padding too."""
    model, processor = runs.build(ModelFlags(vlm_folder))
    examples = MappedExamples(data.load("tune", 8), MapStore(store_folder))
    batch = Collator(processor, model.family, model.base.config)([examples[i] for i in range(16)])
    spoken = [(i, word) for i in range(16) for word in examples[i][1].words if word.field == "answer"]
    tokens_of = batch["words"]["tokens"].long().split(batch["words"]["lengths"].tolist())
    long = prompted = 0
    for (i, word), tokens in zip(spoken, tokens_of, strict=True):
        # As a model would predict that has learnt the text by heart.
        said = [processor.tokenizer.decode([token]).strip() for token in batch["input_ids"][i]]
        theirs = {t for t, token in enumerate(said) if token == word.text}
        labels = batch["labels"][i]
        assert (labels[tokens] != -100).all()
        prompted += any(labels[t] == -100 for t in theirs)
        if len(tokens) > 1:
            long += 1
            assert not set(tokens.tolist()) & theirs
    assert long > 0 and prompted > 0


def test_a_tiny_loss_freezes_nothing():
    """There the Aligner is pretrained with the cross entropy times 1e-7. Adam divides by the gradient's own size, so the host
    moves nearly as fast as ever. Ours sets the host's learning rate to 0 for those steps (test_training.py holds it bit-equal).
    """
    moved = []
    for scale in (1.0, 1e-7):
        weight = nn.Parameter(torch.ones(1000))
        optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
        gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        for _ in range(10):
            weight.grad = gradient * scale
            optimizer.step()
        moved.append((weight - 1).abs().mean().item())
    assert moved[1] > 0.75 * moved[0] > 0


def test_adapters_stay_out_of_the_vision_tower(vlm_folder):
    """There they are placed by the names q_proj and v_proj, which the vision tower's projections have too."""
    model, _ = runs.build(ModelFlags(vlm_folder, lora_targets="released", plain=True))
    ours = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    theirs = {
        name for name, _ in model.base.named_modules() if name.endswith(("q_proj.base_layer", "v_proj.base_layer"))
    }
    tower = [name for name, _ in model.base.named_modules() if "vision" in name and name.endswith(("q_proj", "v_proj"))]
    assert ours and not any("vision" in name for name in ours)
    assert len(theirs) == len(ours) and len(tower) == 2 * 4


def test_stored_maps_keep_what_eight_bits_lose():
    """There a target is an 8-bit JPEG. Ours is stored in float16: the error is a hundredth of theirs."""
    torch.manual_seed(0)
    raw = torch.rand(MAP_SIDE, MAP_SIDE).pow(4)
    target = minmax(raw)
    held = io.BytesIO()
    Image.fromarray((target * 255).round().to(torch.uint8).numpy()).save(held, "JPEG")
    theirs = torch.from_numpy(np.asarray(Image.open(held), np.float32) / 255)
    ours = minmax(raw.half().float())
    assert (ours - target).abs().mean() < 0.01 * (theirs - target).abs().mean()


def test_parallel_attention_has_no_map_to_begin_with_if_it_starts_from_noise(vlm_folder):
    """There W_Q and W_K start from N(0, 0.02). Such a map says nothing of what the host has learnt; ours starts as the host's."""
    model, _ = runs.build(ModelFlags(vlm_folder, parallel_rank=0))
    attention = model.family.layers(model.base)[3]
    hidden = torch.randn(1, 5, 128)
    own = attention.q_proj(hidden)
    torch.testing.assert_close(model.align.parallel["3"].query_of(attention, hidden), own)
    noise = nn.init.normal_(torch.empty(attention.q_proj.weight.shape), std=0.02)
    assert F.cosine_similarity(hidden @ noise.T, own, dim=-1).abs().max() < 0.5
