"""Reading a host must not change it, and a map must mean the same ground as the picture it was read from."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, MllamaConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from lavender_min.geometry import MAP_SIDE, PatchLayout
from lavender_min.hosts import load
from lavender_min.hosts.base import WordRows, collate_layouts, patch_count
from lavender_min.hosts.mllama import Mllama, tiling
from lavender_min.hosts.reading import Sink
from lavender_min.toy import data
from lavender_min.tuning.collator import Collator, MappedExamples, frame_box
from lavender_min.tuning.model import word_rows

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
)


@pytest.fixture(scope="module")
def loaded(vlm_folder):
    return load.load(vlm_folder)


@pytest.fixture(scope="module")
def batch(loaded, store_folder):
    from lavender_min.maps import MapStore

    host, processor = loaded, loaded.processor
    rows = MappedExamples(data.load("tune", 3), MapStore(store_folder))
    return Collator(processor, host.family, host.model.config)([rows[i] for i in range(6)])


def inputs_of(batch):
    return {name: batch[name] for name in MODEL_INPUTS}


def sink_of(loaded, batch):
    return Sink(loaded.family, word_rows(batch["words"]), [1, 3, 5], None, lambda maps: maps)


def test_logits_are_bit_equal_with_and_without_hooks(loaded, batch, vlm_folder):
    plain = AutoModelForImageTextToText.from_pretrained(vlm_folder, attn_implementation="sdpa").eval()
    hooked = loaded.model.eval()
    with torch.no_grad():
        expected = plain(**inputs_of(batch)).logits
        assert torch.equal(hooked(**inputs_of(batch)).logits, expected)
        hidden = hooked.model(**inputs_of(batch), sink=sink_of(loaded, batch)).last_hidden_state
        assert torch.equal(hooked.lm_head(hidden), expected)


def test_maps_equal_those_of_eager_attention(loaded, batch, vlm_folder):
    """The whole tensor from `output_attentions`, patches picked by hand, resampled by F.interpolate."""
    eager = AutoModelForImageTextToText.from_pretrained(vlm_folder, attn_implementation="eager").eval()
    sink = sink_of(loaded, batch)
    with torch.no_grad():
        loaded.model.model(**inputs_of(batch), sink=sink)
        attentions = eager(**inputs_of(batch), output_attentions=True).attentions
    layers = eager.config.text_config.cross_attention_layers
    assert list(sink.own_maps) == layers
    for layer in layers:
        maps = attentions[layer]  # [b, h, t, 4 tiles · 65]
        tiles = maps.unflatten(-1, (2, 2, 65))[..., 1:].unflatten(-1, (8, 8))  # [b, h, t, tile row, tile column, y, x]
        canvas = tiles.permute(0, 1, 2, 3, 5, 4, 6).flatten(3, 4).flatten(4, 5)  # [b, h, t, 16, 16]
        resized = F.interpolate(canvas.flatten(0, 1), size=(MAP_SIDE, MAP_SIDE), mode="bilinear", antialias=True)
        resized = resized.unflatten(0, canvas.shape[:2])
        words = batch["words"]
        for maps, text, row in zip(sink.own_maps[layer], words["texts"], words["rows"], strict=True):
            # 256 patches: uniform attention is 1.
            torch.testing.assert_close(maps, resized[text, :, row] * 256, atol=2.56e-4, rtol=1e-4)


def test_uniform_attention_is_one_everywhere():
    """A query of zeros attends to every key alike: to each with 1 / keys, which times the patches of the picture is the unit."""
    view, keys, one = layout(300, 900, (0, 1, 0, 1)), 4 * 1601, torch.tensor([0])
    words = WordRows(one, [1], one, one, one + 1, torch.zeros(1, MAP_SIDE, MAP_SIDE), [view], torch.ones(1))
    sink = Sink(Mllama(), words, [1], None, lambda maps: maps)
    query, key = torch.zeros(1, 2, 1, 4), torch.randn(1, 1, keys, 4)
    maps = sink.maps(query=query, key=key, rows=one, attn_mask=None, is_causal=False, scale=None)
    torch.testing.assert_close(maps, torch.full_like(maps, patch_count(view).item() / keys))


# ------------------------------------------------------------------------------------- geometry of the real processor

REAL = MllamaConfig()  # Llama 3.2: tiles of 560 px, patches of 14, up to 4 tiles
REAL.vision_config.image_size, REAL.vision_config.patch_size = 560, 14


class FakeProcessor:
    image_processor = MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)


def layout(width, height, box):
    [view] = Mllama().views((width, height), FakeProcessor, REAL, torch.zeros(0, dtype=torch.long), box)
    return view


def marked_keys(image: Image.Image) -> torch.Tensor:
    """Synthetic attention over the keys: how much of the marker (white on black) each patch of the processed tiles holds."""
    out = FakeProcessor.image_processor(images=[image], return_tensors="np", do_normalize=False)
    tiles = torch.from_numpy(np.asarray(out["pixel_values"]))[0, 0].mean(1)  # [4, 560, 560]
    patches = F.avg_pool2d(tiles[:, None], 14)[:, 0].flatten(1)  # [4, 1600]
    return F.pad(patches, (1, 0)).flatten()  # a class token first in every tile


def seen_map(attention: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    index = layout.index[0].long()
    canvas = torch.where(index >= 0, attention[index.clamp(min=0)], 0.0)
    return layout.resize_y[0] @ canvas @ layout.resize_x[0].T


RATIOS = {(1, 1): (500, 520), (1, 2): (1000, 500), (1, 3): (1500, 480), (1, 4): (2100, 500), (2, 1): (500, 1000),
          (2, 2): (1000, 1000), (3, 1): (480, 1500), (4, 1): (500, 2100)}  # fmt: skip


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("frame", ["whole", "crop"])
@settings(max_examples=5, deadline=None)
@given(share=st.tuples(*[st.floats(0.1, 0.9)] * 2), shrink=st.floats(0.85, 1.0))
def test_a_marker_is_found_where_it_was_painted(ratio, frame, share, shrink):
    width, height = (round(n * shrink) for n in RATIOS[ratio])
    top, bottom, left, right = frame_box(width, height, frame)
    x, y = (left + share[0] * (right - left)) * width, (top + share[1] * (bottom - top)) * height
    half = max(8, min(width, height) // 32)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[max(0, round(y) - half) : round(y) + half, max(0, round(x) - half) : round(x) + half] = 255
    view = layout(width, height, (top, bottom, left, right))
    tiles = tiling.get_optimal_tiled_canvas(height, width, 4, 560)
    if shrink == 1:
        assert tuple(n // 560 for n in tiles) == ratio
    found = seen_map(marked_keys(Image.fromarray(pixels)), view)
    found = found / found.sum()
    cells = torch.arange(MAP_SIDE) + 0.5
    # the marker's centre of mass, in cells; a patch of 14 px is up to a few cells of a small picture
    slack = (
        0.5
        + 14 / min(*(n * s for n, s in zip((bottom - top, right - left), (height, width), strict=True))) * MAP_SIDE / 2
    )
    assert abs((found.sum(1) * cells).sum() - share[1] * MAP_SIDE) < slack
    assert abs((found.sum(0) * cells).sum() - share[0] * MAP_SIDE) < slack


def test_the_released_codes_formula_shears_a_vertical_line():
    """There the class token stays in, 1601 keys are stretched to 41², so a column drifts by one cell a row."""
    height = width = 560
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, 140:154] = 255  # one column of patches
    attention = marked_keys(Image.fromarray(pixels))
    ours = seen_map(attention, layout(width, height, (0, 1, 0, 1)))
    theirs = F.interpolate(attention[None, None, :1601], 41 * 41, mode="linear")[0, 0].reshape(41, 41)
    assert ours.argmax(1).unique().numel() == 1  # a straight line
    drift = theirs.argmax(1)[5:35].float().diff()
    assert (drift != 0).float().mean() > 0.3  # a slanted one


def test_collated_layouts_keep_their_pictures():
    shapes = [(500, 2000), (2000, 500), (560, 560)]
    layouts = [layout(w, h, (0, 1, 0, 1)) for w, h in shapes]
    together = collate_layouts(layouts)
    assert together.index.shape == (3, 160, 160)
    attention = torch.rand(6404)
    for i, view in enumerate(layouts):
        one = PatchLayout(*(part[i : i + 1] for part in together))
        torch.testing.assert_close(seen_map(attention, one), seen_map(attention, view))


def test_a_family_without_a_host_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a llama; this package tunes mllama, llava"):
        load.load(str(tmp_path))


def test_a_host_that_cannot_be_had_says_what_to_do():
    with pytest.raises(OSError, match="accept the licence.*--data toy"):
        load.load("meta-llama/Llama-3.2-11B-Vision-Instruct")


def test_a_host_whose_files_do_not_go_together_is_named(vlm_folder, tmp_path):
    """Without its config the tokenizer knows no first token, and the processor asks for it at the first text only."""
    shutil.copytree(vlm_folder, tmp_path / "vlm")
    (tmp_path / "vlm" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=f"^--vlm {tmp_path / 'vlm'}: TypeError: "):
        load.load(str(tmp_path / "vlm"))


def test_the_processor_loads_by_name(vlm_folder):
    assert AutoProcessor.from_pretrained(vlm_folder).image_processor.max_image_tiles == 4
