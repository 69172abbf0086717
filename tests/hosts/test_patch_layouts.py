"""Where image tokens lie on a picture: a cell is painted, and the token that changes most must be the one that the layout names.

The processors are the real ones. The towers' attention is off, so that a patch tells of nothing but its own ground.
"""

import random

import numpy as np
import pytest
import torch
import transformers as hf
import zoo
from PIL import Image
from torch import nn

from lavender_min.geometry import MAP_SIDE
from lavender_min.hosts.decoder import KINDS
from lavender_min.hosts.load import family_of
from lavender_min.tuning.collator import frame_box

SHAPES = [(200, 120), (120, 310), (400, 400), (500, 90), (56, 56), (30, 40), (97, 331), (640, 480)]
# What ends an attention layer, in the towers of all kinds.
LAST = ("out_proj", "proj", "projection_layer")


class Seeing:
    """A host whose tower looks at each patch alone."""

    def __init__(self, name):
        self.family, (self.model, self.processor) = family_of(name, name), zoo.built(name)
        said = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
        chat = [{"role": "user", "content": said}]
        self.text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        ended = [
            module
            for path, module in self.model.named_modules()
            if ("vision" in path or "visual" in path) and path.split(".")[-1] in LAST and isinstance(module, nn.Linear)
        ]
        assert len(ended) == 2
        for module in ended:
            nn.init.zeros_(module.weight)

    def encode(self, pictures):
        return self.family.encode(self.processor, [self.text] * len(pictures), pictures)

    @torch.no_grad()
    def states(self, pictures):
        """[pictures, image tokens, c]"""
        inputs = self.encode([Image.fromarray(picture) for picture in pictures]).inputs
        return torch.stack([of["states"] for of in self.family.picture_states(self.model, inputs)])

    def looks(self, size):
        return KINDS[self.family.name].looks(size, self.processor, self.model.config)


@pytest.fixture(scope="module", params=KINDS)
def seeing(request):
    return Seeing(request.param)


def grey(size):
    return np.full((size[1], size[0], 3), 120, np.uint8)


def in_pixels(view, size, y, x):
    """Where a point of the view's cells lies on the picture."""
    return (y - view.top) / view.high * size[1], (x - view.left) / view.wide * size[0]


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_a_painted_cell_changes_its_token(seeing, size):
    rng, looks = random.Random(0), seeing.looks(size)
    painted, expected = [grey(size)], []
    for view in looks.views:
        hc, wc = view.order.shape
        for y, x in [(rng.randrange(hc), rng.randrange(wc)) for _ in range(6)] + [(0, 0), (hc - 1, wc - 1)]:
            (top, left), (bottom, right) = (in_pixels(view, size, y + d, x + d) for d in (0.3, 0.7))
            if top < 0 or left < 0 or bottom > size[1] or right > size[0]:
                # A cell of padding.
                continue
            picture = grey(size)
            picture[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = (250, 20, 200)
            painted.append(picture)
            expected.append((view, y, x))
    assert len(expected) > 5
    plain, *states = seeing.states(painted)
    assert len(plain) == looks.tokens
    for (view, y, x), of in zip(expected, states, strict=True):
        changed = (of - plain).norm(dim=-1)[view.order]
        assert divmod(int(changed.argmax()), view.order.shape[1]) == (y, x), view.order.shape


@pytest.mark.parametrize("size", SHAPES[:2], ids=str)
def test_the_edges_of_cells_are_where_the_layout_says(seeing, size, monkeypatch):
    """All is painted up to a quarter of a cell before an edge, then behind it: the cell behind the edge changes but then."""
    if seeing.family.name == "llava_onevision":
        # A canvas that is shrunk mixes its cells.
        for knows in (seeing.processor, seeing.model.config):
            monkeypatch.setattr(knows, "vision_aspect_ratio", "anyres_max_9")
    for view in seeing.looks(size).views:
        for axis in (0, 1):
            n = view.order.shape[axis]
            edges = [edge for edge in {1, n // 2, n - 1} if edge]
            painted = [grey(size)]
            for edge in edges:
                for off in (-0.25, 0.25):
                    place = in_pixels(view, size, edge + off, edge + off)[axis]
                    picture = grey(size)
                    # The pixel that the edge runs through is painted in part.
                    whole, part = divmod(min(max(place, 0), size[1 - axis] - 1), 1)
                    lines = picture if axis == 0 else picture.swapaxes(0, 1)
                    lines[: int(whole)] = (250, 20, 200)
                    lines[int(whole)] = 120 + part * (np.array((250, 20, 200)) - 120)
                    painted.append(picture)
            plain, *states = seeing.states(painted)
            for edge, before, behind in zip(edges, states[::2], states[1::2], strict=True):
                order = view.order.select(axis, edge)
                small, large = ((of - plain).norm(dim=-1)[order].mean() for of in (before, behind))
                assert small < large / 4, (view.order.shape, axis, edge, small, large)


@pytest.mark.parametrize("size", [(500, 90), (97, 331)], ids=str)
@pytest.mark.parametrize("frame", ["whole", "crop"])
def test_a_map_covers_the_ground_of_the_teachers(seeing, size, frame):
    """Attention on one cell is found in the map at the cell's own place in the frame, and nowhere else."""
    ids = seeing.encode([Image.fromarray(grey(size))]).inputs["input_ids"][0]
    box = frame_box(*size, frame)
    found = seeing.family.views(size, seeing.processor, seeing.model.config, ids, box)
    for view, layout in zip(seeing.looks(size).views, found, strict=True):
        hc, wc = view.order.shape
        for y, x in [(hc // 2, wc // 2), (0, 0), (hc - 1, wc - 1)]:
            slot = (ids == seeing.model.config.image_token_id).nonzero()[view.order[y, x], 0]
            canvas = (layout.index[0] == slot).float()
            map = layout.resize_y[0] @ canvas @ layout.resize_x[0].T
            place = [
                (cell + 0.5 - start) / length
                for cell, start, length in ((y, view.top, view.high), (x, view.left, view.wide))
            ]
            cells = [
                (p - low) / (high - low) * MAP_SIDE for p, low, high in zip(place, box[::2], box[1::2], strict=True)
            ]
            if not all(1 < cell < MAP_SIDE - 1 for cell in cells):
                continue
            peak = (map == map.max()).nonzero().float().mean(0) + 0.5
            # Half a cell of the map, and what the end of the canvas does to a triangle.
            slack = [
                0.5 + MAP_SIDE / length / (high - low) / 2
                for length, low, high in zip((view.high, view.wide), box[::2], box[1::2], strict=True)
            ]
            assert all(abs(p - c) <= s for p, c, s in zip(peak.tolist(), cells, slack, strict=True))


def test_ground_that_was_cropped_off_is_nothing():
    """Of a picture twice as wide as high LLaVA 1.5 sees the middle half: flat attention is flat there, and 0 beside it."""
    seeing = Seeing("llava")
    size = (400, 200)
    ids = seeing.encode([Image.fromarray(grey(size))]).inputs["input_ids"][0]
    [layout] = seeing.family.views(size, seeing.processor, seeing.model.config, ids, (0.0, 1.0, 0.0, 1.0))
    map = layout.resize_y[0] @ (layout.index[0] >= 0).float() @ layout.resize_x[0].T
    expected = torch.zeros(MAP_SIDE, MAP_SIDE)
    expected[:, MAP_SIDE // 4 : -MAP_SIDE // 4] = 1
    torch.testing.assert_close(map, expected)


def test_a_picture_with_more_tokens_than_are_known_is_one_line():
    seeing = Seeing("gemma3")
    ids = seeing.encode([Image.fromarray(grey((60, 60)))]).inputs["input_ids"][0]
    with pytest.raises(
        ValueError, match="^the processor gave a picture of 60 × 60 pixels 8 tokens, where gemma3 .* 4; "
    ) as error:
        seeing.family.views((60, 60), seeing.processor, seeing.model.config, ids.repeat(2), (0.0, 1.0, 0.0, 1.0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_published_sizes(kind):
    """As many tokens as the processors announce, with the published tiles: 336 px of 24 cells; 384 of 27, which leave a rest."""
    name = "LlavaNext" if kind == "llava_next" else "LlavaOnevision"
    options = {"num_image_tokens": 729, "vision_feature_select_strategy": "full"} if kind != "llava_next" else zoo.LLAVA
    config, tokenizer = getattr(hf, f"{name}Config")(), zoo.tokenizer_of(zoo.KINDS[kind])
    images = zoo.KINDS[kind].process(tokenizer).image_processor
    images.image_grid_pinpoints = config.image_grid_pinpoints
    images.size = images.crop_size = {
        "height": config.vision_config.image_size,
        "width": config.vision_config.image_size,
    }
    processor = zoo.without_video(getattr(hf, f"{name}Processor"), tokenizer, images, **options)
    for size in [*SHAPES, (1920, 1080), (3000, 500), (2304, 2304), (8000, 60), (60, 8000)]:
        announced = processor._get_num_multimodal_tokens([size[::-1]]).num_image_tokens
        assert [KINDS[kind].looks(size, processor, config).tokens] == announced, size
