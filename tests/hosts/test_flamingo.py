"""Flamingo: attention to latents is followed to the patches that they read, and everything else of the family contract."""

import shutil

import pytest
import tiny_flamingo
import torch
from PIL import Image
from tiny_flamingo import LATENTS, SIDE
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from lavender_min.geometry import MAP_SIDE
from lavender_min.hosts import flamingo
from lavender_min.hosts.base import WordRows, collate_views
from lavender_min.hosts.load import load
from lavender_min.hosts.mllama import Mllama
from lavender_min.hosts.reading import Sink
from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.model import word_rows

PATCHES = SIDE**2
LAYERS = [0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flamingo.save(tmp_path_factory.mktemp("flamingo"))


@pytest.fixture(scope="module")
def host(folder):
    host = load(folder)
    host.model.eval()
    return host


@pytest.fixture
def examples(store_folder):
    """Two pictures that are not square, and a caption and a question about each."""
    mapped = MappedExamples(data.load("tune", 2), MapStore(store_folder))
    return [
        (e._replace(image=lambda e=e: e.image().resize((150, 90))), stored)
        for e, stored in map(mapped.__getitem__, range(4))
    ]


def test_a_host_without_a_resampler_is_one_line(host, monkeypatch):
    monkeypatch.setattr(host.model.config, "use_resampler", False)
    with pytest.raises(ValueError, match="^its text looks at patches, .*; take one with a resampler, such as Hugging"):
        host.family.layers(host.model)


def batch_of(host, examples, **options):
    return Collator(host.processor, host.family, host.model.config, **options)(examples)


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "words")}


def last_rows(host, size, ids):
    """A word in each text, for which its last row speaks."""
    n, last = len(ids), torch.full((len(ids),), ids.shape[1] - 1)
    view = host.family.views(size, host.processor, host.model.config, ids[0], (0.0, 1.0, 0.0, 1.0))
    targets = torch.zeros(n, MAP_SIDE, MAP_SIDE)
    return WordRows(
        last, [1] * n, torch.arange(n), last, torch.ones(n).long(), targets, collate_views([view] * n), torch.ones(n)
    )


def sink_of(family, words, parallel=None):
    return Sink(family, words, LAYERS, parallel, lambda maps: maps)


@torch.no_grad()
def read(host, inputs, words, family=None):
    """The sink after a forward, and the hidden states."""
    family = family or host.family
    sink = sink_of(family, words)
    return sink, family.hidden_states(host.model, inputs, sink)


class Reference:
    """Attention of the eager host in float64, as its modules make it; and the rollout as powers of one large matrix."""

    def __init__(self, folder, inputs):
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
        self.cross: list[torch.Tensor] = []  # of each layer: [b, h, t, latents]
        self.blocks: list[torch.Tensor] = []  # of each block of the resampler: [b, h, latents, 1 + patches + latents]
        for layer in model.model.gated_cross_attn_layers:
            layer.cross_attn.register_forward_hook(lambda module, args, out: self.cross.append(out[1]))
        with torch.no_grad(), softmaxes(self.blocks, 1 + PATCHES + LATENTS):
            self.logits = model.eval()(**inputs).logits
        total = torch.eye(1 + PATCHES + LATENTS, dtype=torch.float64)
        for block in self.blocks:
            # The tower's states stay what they are.
            step = torch.eye(1 + PATCHES + LATENTS, dtype=torch.float64).repeat(len(block), 1, 1)
            step[:, -LATENTS:] = (step[:, -LATENTS:] + block.mean(1)) / 2
            total = step @ total
        shares = total[:, -LATENTS:, :-LATENTS]
        self.read = shares / shares.sum(-1, keepdim=True)


class softmaxes:
    """A context manager that keeps what `Tensor.softmax` returns, where that has so many columns."""

    def __init__(self, kept, columns):
        self.kept, self.columns, self.own = kept, columns, torch.Tensor.softmax

    def __enter__(self):
        def spy(x, *args, **kwargs):
            out = self.own(x, *args, **kwargs)
            if out.shape[-1] == self.columns:
                self.kept.append(out)
            return out

        torch.Tensor.softmax = spy

    def __exit__(self, *_):
        torch.Tensor.softmax = self.own


# -------------------------------------------------------------------------------------------------------------- text

PICTURE = Image.effect_noise((130, 70), 80).convert("RGB")
BEFORE, AFTER = "User:", "Is a crescent there?<end_of_utterance>\nAssistant: yes<end_of_utterance>"


@pytest.mark.parametrize("spelled", ["<image>", "<fake_token_around_image><image><fake_token_around_image>"])
@pytest.mark.parametrize("begin", ["", "<s>"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_encoded_as_the_processor_would(host, spelled, begin, side):
    text, short = f"{begin}{BEFORE}{spelled}{AFTER}", f"{begin}{spelled}b"
    encoded = host.family.encode(host.processor, [text, short], [PICTURE, PICTURE], padding_side=side)
    own = host.processor(text=[[BEFORE, PICTURE, AFTER], [PICTURE, "b"]], padding_side=side, return_tensors="pt")
    ids, mask = encoded.inputs["input_ids"], encoded.inputs["attention_mask"]
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(encoded.inputs[name], own[name])
    tokenizer = host.processor.tokenizer
    assert ((ids == tokenizer.bos_token_id).sum(1) == 1).all() and (mask.sum(1)[0] > mask.sum(1)[1])
    for given, row, kept, offsets in zip([text, short], ids, mask.bool(), encoded.offsets, strict=True):
        assert len(offsets) == kept.sum()
        for token, (start, end) in zip(row[kept].tolist(), offsets, strict=True):
            pictured = token in tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>", "<s>"])
            assert given[start:end] == tokenizer.decode([token]) or (pictured and (start, end) == (0, 0))
        # From the picture on all rows see it. The processor itself hides it from what follows an EOS, here the answer.
        sees = encoded.inputs["image_attention_mask"][ids.eq(row).all(1)][0, :, 0]
        image = (row == tokenizer.convert_tokens_to_ids("<image>")).nonzero()[0, 0]
        assert sees.tolist() == [int(t >= image) for t in range(len(row))]
    assert own["image_attention_mask"][0].sum() < encoded.inputs["image_attention_mask"][0].sum()


def test_a_template_without_a_picture_is_refused(host):
    with pytest.raises(ValueError, match="the chat template writes no <image>"):
        host.family.encode(host.processor, ["what"], [PICTURE])


def test_a_host_without_a_template_speaks_as_idefics_instruct_does(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "host")
    (tmp_path / "host" / "chat_template.jinja").unlink()
    for where, expected in (
        (
            folder,
            "<s>user:<fake_token_around_image><image><fake_token_around_image> what<end_of_utterance>\nassistant:",
        ),
        (tmp_path / "host", "User:<image>what<end_of_utterance>\nAssistant:"),
    ):
        said = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}
        assert load(str(where)).processor.apply_chat_template([said], add_generation_prompt=True) == expected


def test_words_are_found_behind_the_picture(host, examples):
    batch, start = batch_of(host, examples, words="all"), 0
    tokenizer = host.processor.tokenizer
    assert batch["attention_mask"].sum(1).unique().numel() > 1
    words = batch["words"]
    for word, length in zip([w for _, stored in examples for w in stored.words], words["lengths"], strict=True):
        tokens, text = words["tokens"][start : start + length], words["texts"][start]
        assert tokenizer.decode(batch["input_ids"][text, tokens.long()]).strip(" ,.?") == word.text
        assert batch["image_attention_mask"][text, words["rows"][start : start + length].long()].all()
        start += length
    for ids, labels, (example, _) in zip(batch["input_ids"], batch["labels"], examples, strict=True):
        assert tokenizer.decode(ids[labels != -100]).strip() == example.answer + "<end_of_utterance>"


def test_answers_do_not_depend_on_their_batch(host, examples):
    """Generated with a cache, from prompts padded on the left, as evaluate.py does; and without either."""
    prompts = ["User:<image>what<end_of_utterance>\nAssistant:", "User:<image>what color is the star?\nAssistant:"]
    encode = host.family.encode
    together = encode(host.processor, prompts, [PICTURE, PICTURE.rotate(90)], padding_side="left").inputs
    alone = encode(host.processor, prompts[:1], [PICTURE]).inputs
    more = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    both, one, slow = (
        host.model.generate(**inputs, use_cache=cached, **more)[0, -12:]
        for inputs, cached in ((together, True), (alone, True), (alone, False))
    )
    assert both.tolist() == one.tolist() == slow.tolist() and both.unique().numel() > 2


# -------------------------------------------------------------------------------------------------------------- maps


def test_hidden_states_are_bit_equal_with_and_without_reading(host, examples, folder):
    plain = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
    batch = batch_of(host, examples)
    _, hidden = read(host, inputs_of(batch), word_rows(batch["words"]))
    with torch.no_grad():
        expected = plain(**inputs_of(batch)).logits
        assert expected.shape[-1] == len(host.processor.tokenizer)
        assert torch.equal(host.family.logits(host.model, hidden), expected)
        assert torch.equal(host.model(**inputs_of(batch)).logits, expected)
    assert not host.model.model.perceiver_resampler._forward_hooks


def test_the_resamplers_attention_is_recomputed_to_the_bit(host, examples, monkeypatch):
    theirs, ours = [], []
    recompute = flamingo.block_attention

    def kept(*args):
        with softmaxes([], 0):
            ours.append(recompute(*args))
        return ours[-1]

    monkeypatch.setattr(flamingo, "block_attention", kept)
    batch = batch_of(host, examples)
    with softmaxes(theirs, 1 + PATCHES + LATENTS):
        read(host, inputs_of(batch), word_rows(batch["words"]))
    assert len(ours) == 2 and len(theirs) == 4
    # Each block's attention is first computed by the hook, then by the block.
    for found, expected in zip(ours, theirs[1::2], strict=True):
        assert torch.equal(found, expected.mean(1))


@pytest.mark.parametrize("together", [True, False])
def test_maps_equal_those_of_eager_attention(host, examples, folder, together):
    for some in [examples] if together else [examples[:1], examples[1:2]]:
        batch = batch_of(host, some)
        words = word_rows(batch["words"])
        sink, _ = read(host, inputs_of(batch), words)
        reference = Reference(folder, inputs_of(batch))
        assert list(sink.own_maps) == LAYERS and len(reference.cross) == 2
        for layer, maps in sink.own_maps.items():
            for found, text, row in zip(maps, words.texts, words.rows, strict=True):
                lifted = reference.cross[layer][text, :, row] @ reference.read[text, :, 1:]
                resized = F.interpolate(lifted.unflatten(-1, (SIDE, SIDE))[None], size=(MAP_SIDE,) * 2, mode="bilinear")
                torch.testing.assert_close(found.double() / PATCHES, resized[0], atol=1e-6, rtol=0)


def test_what_latents_read_is_the_rollout_of_the_resamplers_attention(host, examples, folder):
    """Against a product of whole matrices in float64; and even attention of the words shows the mean of the latents."""
    batch = batch_of(host, examples)
    words = word_rows(batch["words"])
    sink, _ = read(host, inputs_of(batch), words)
    reference = Reference(folder, inputs_of(batch))
    read_by = flamingo.rollout([block.float().mean(1) for block in reference.blocks])
    torch.testing.assert_close(read_by, reference.read.float(), atol=1e-6, rtol=0)
    assert reference.read.std(1).max() > 0.02
    b, n = len(sink.latents), len(words.rows)
    even = sink.maps(
        query=torch.zeros(b, 3, words.rows.max() + 1, 4), key=torch.randn(b, 3, LATENTS, 4), rows=words.rows,
        attn_mask=None, is_causal=False, scale=None,
    )  # fmt: skip
    torch.testing.assert_close(even, sink.latents.mean(1)[words.texts][:, None].expand(n, 3, -1, -1))


def test_the_unit_is_a_latent_that_reads_all_patches_alike():
    """And what is read of the class token, here a third, is missing."""
    [view] = flamingo.Flamingo().views((9, 9), None, CONFIG, torch.zeros(0).long(), (0.0, 1.0, 0.0, 1.0))
    attention = torch.full((1, LATENTS, 1 + PATCHES + LATENTS), 2 / 3 / PATCHES / 2)
    attention[..., 0], attention[..., -LATENTS:] = 1 / 6, 0.5 / LATENTS
    read_by = flamingo.rollout([attention] * 3)
    maps = flamingo.latent_maps(read_by, view)
    torch.testing.assert_close(maps, torch.full((1, LATENTS, MAP_SIDE, MAP_SIDE), 2 / 3))


CONFIG = tiny_flamingo.config(tiny_flamingo.tokenizer())
SHAPES = [(56, 56), (200, 120), (120, 310), (400, 400), (500, 90), (64, 57), (90, 640), (33, 41)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_painted_cell_is_where_latents_read_otherwise(folder, shape):
    """With the tower's attention off, a patch's state is its own. The middle of each cell is painted in turn."""
    host = load(folder)
    with torch.no_grad():
        for layer in host.model.model.vision_model.encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
            layer.self_attn.out_proj.bias.zero_()
    width, height = shape
    cells = [(y, x) for y in range(SIDE) for x in range(SIDE)]
    pictures = [Image.new("RGB", shape, (120, 120, 120)) for _ in range(1 + PATCHES)]
    for picture, (y, x) in zip(pictures[1:], cells, strict=True):
        left, right, top, bottom = ((k + part) * n // SIDE for k, n in ((x, width), (y, height)) for part in (0.2, 0.8))
        picture.paste((250, 20, 200), tuple(map(int, (left, top, right, bottom))))
    inputs = host.family.encode(host.processor, ["User:<image>star"] * len(pictures), pictures).inputs
    words = last_rows(host, shape, inputs["input_ids"])
    shown = read(host, inputs, words)[0].latents
    change = F.avg_pool2d((shown[1:] - shown[:1]).abs().sum(1, keepdim=True), MAP_SIDE // SIDE).flatten(1)
    assert [cells[i] for i in change.argmax(1)] == cells


def test_a_frame_covers_its_part_of_the_picture(host):
    """A picture twice as wide as high, of which the teacher saw the middle: the middle half of the columns."""
    box = (0.0, 1.0, 0.25, 0.75)
    [view] = host.family.views((80, 40), host.processor, host.model.config, torch.zeros(0).long(), box)
    cells = 1 + torch.arange(PATCHES).view(SIDE, SIDE)
    assert torch.equal(view.index[0, :, 1:3], cells[:, 1:3].int()) and (view.index[0, :, [0, 3]] == -1).all()
    columns = view.resize_x[0] @ torch.arange(SIDE).float()
    assert columns.min() == 1 and columns.max() == 2 and columns.diff().min() >= 0


def test_reshaped_latents_depend_on_their_numbers_and_lifted_ones_do_not(folder, examples):
    """The paper's reading takes latent 3·y + x for cell (y, x). Renumbered, the host says the same; that map changes."""
    found = {}
    for name, order in {"before": torch.arange(LATENTS), "after": torch.randperm(LATENTS)}.items():
        host = load(folder)
        with torch.no_grad():
            host.model.model.perceiver_resampler.latents.copy_(host.model.model.perceiver_resampler.latents[order])
        for how in ("lifted", "reshape"):
            family = host.family.with_latents(how)
            reading = host._replace(family=family)
            batch = batch_of(reading, examples)
            sink, hidden = read(host, inputs_of(batch), word_rows(batch["words"]), family)
            found[how, name] = torch.stack(list(sink.own_maps.values()))
            found["hidden", name] = hidden
    for what in ("hidden", "lifted"):
        torch.testing.assert_close(found[what, "after"], found[what, "before"], atol=2e-4, rtol=1e-4)
    before, after = found["reshape", "before"], found["reshape", "after"]
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] < 0.5
    torch.testing.assert_close(before.mean(), torch.tensor(1.0), atol=0.2, rtol=0)


def test_reshaping_wants_latents_and_a_square_of_them(host):
    with pytest.raises(
        ValueError, match="--latents reshape is for hosts that look at a resampler's latents; a mllama has"
    ):
        Mllama().with_latents("reshape")
    config = tiny_flamingo.config(host.processor.tokenizer)
    config.perceiver_config.resampler_n_latents = 10
    with pytest.raises(ValueError, match="--latents reshape wants a square number of latents; this host has 10"):
        host.family.with_latents("reshape").grid(config)
