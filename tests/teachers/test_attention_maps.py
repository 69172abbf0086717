"""Stage 1's teacher on a tiny Stable Diffusion with random weights, against slow and explicit computations."""

import copy
import time

import jaxtyping
import numpy as np
import pytest
import torch
from einops import einsum
from PIL import Image
from tiny_sd import IDS, LENGTH, NOISE, TEXTS, build_tiny_sd, explicit_maps

from lavender_min import hub
from lavender_min.teachers import DTYPES, RECIPES, attention_maps, find_recipe, recipes, stable_diffusion
from lavender_min.teachers.recording import Recorder, recording
from lavender_min.words import find_words, join_fields, windows


def some_pass(sd, windows=2):
    draw = torch.Generator().manual_seed(3)
    latents = torch.randn(windows, 4, 8, 8, generator=draw)
    ids = torch.randint(0, 200, (windows, LENGTH), generator=draw)
    return latents, torch.tensor(500), sd.text_encoder(ids)[0], torch.rand(windows, LENGTH, 4, generator=draw)


def mean_over_layers(recorder):
    means = recorder.means()
    return sum(recorder.layers[side] * means[side] for side in means) / recorder.layers.total()


# ---- recording ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_recording_changes_nothing_and_equals_an_explicit_softmax(tiny_sd):
    latents, t, text, weights = some_pass(tiny_sd)
    layers, plain = explicit_maps(tiny_sd.unet, latents, t, text)
    before = {name: id(processor) for name, processor in tiny_sd.unet.attn_processors.items()}
    recorder = Recorder(weights, [8, 4])
    with recording(tiny_sd.unet, recorder):
        recorded = recipes.predict(tiny_sd, latents, t, text)
    assert (recorded - plain).abs().max() <= 1e-6 * plain.abs().max()
    assert {name: id(processor) for name, processor in tiny_sd.unet.attn_processors.items()} == before
    assert torch.equal(recipes.predict(tiny_sd, latents, t, text), plain)
    expected = torch.einsum("rtyx,rtw->rwyx", layers.mean(0), weights)
    torch.testing.assert_close(mean_over_layers(recorder), expected, atol=1e-6, rtol=1e-5)
    # The maps are not flat, so this says something.
    assert expected.std() > 1e-3


@torch.no_grad()
def test_in_double_precision_the_output_agrees_to_rounding(tiny_sd):
    unet = copy.deepcopy(tiny_sd.unet).double()
    latents, t, text, weights = (x.double() if x.is_floating_point() else x for x in some_pass(tiny_sd))
    plain = unet(latents, t, encoder_hidden_states=text).sample
    with recording(unet, Recorder(weights, [8, 4])):
        recorded = unet(latents, t, encoder_hidden_states=text).sample
    assert (recorded - plain).abs().max() <= 1e-12


@torch.no_grad()
def test_resolution_weights_and_several_passes(tiny_sd):
    latents, t, text, weights = some_pass(tiny_sd)
    first, _ = explicit_maps(tiny_sd.unet, latents, t, text)
    second, _ = explicit_maps(tiny_sd.unet, latents + 1, t, text)
    # Down, down, middle, up (two layers each), as they are called.
    sides = [8, 4, 4, 4, 4, 8, 8]
    assert len(first) == len(sides) and tiny_sd.map_sides == [8, 4]
    for resolutions in (None, {8: 1.0}, {4: 1.0, 8: 0.0}, {8: 1.0, 4: 0.25}):
        recorder = Recorder(weights, [side for side, weight in (resolutions or {8: 1, 4: 1}).items() if weight])
        with recording(tiny_sd.unet, recorder):
            out = recipes.predict(tiny_sd, latents, t, text)
        with recording(tiny_sd.unet, recorder):
            recipes.predict(tiny_sd, latents + 1, t, text)
        layer_weight = torch.tensor([(resolutions or {8: 1.0, 4: 1.0}).get(side, 0.0) for side in sides])
        layer_weight = layer_weight / layer_weight.sum()
        layers = torch.einsum("n,nrtyx->rtyx", layer_weight, (first + second) / 2)
        expected = torch.einsum("rtyx,rtw->rwyx", layers, weights)
        means, counts = recorder.means(), recorder.layers
        side_weight = {side: counts[side] * (resolutions or {8: 1, 4: 1})[side] for side in means}
        found = sum(weight / sum(side_weight.values()) * means[side] for side, weight in side_weight.items())
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert (out - recipes.predict(tiny_sd, latents, t, text)).abs().max() <= 1e-6 * out.abs().max()


def test_recording_restores_after_an_error_and_refuses_to_nest(tiny_sd):
    weights = torch.zeros(1, LENGTH, 1)
    before = tiny_sd.unet.attn_processors
    with pytest.raises(RuntimeError, match="already being recorded"):
        with recording(tiny_sd.unet, Recorder(weights, [8])), recording(tiny_sd.unet, Recorder(weights, [8])):
            pass
    assert tiny_sd.unet.attn_processors == before
    with pytest.raises(RuntimeError, match="inside `with recording"):
        Recorder(weights, [8]).means()


# ---- words ----------------------------------------------------------------------------------------------------------


def test_windows_lose_no_word_and_cut_between_words(tiny_sd):
    words = find_words(TEXTS[1])
    prompt, spans = join_fields(TEXTS[1], words)
    assert prompt == "Is the turquoise cat with the dog? turquoise, yes"
    assert [prompt[a:b] for a, b in spans] == [word.text for word in words]
    cut = windows(tiny_sd.tokenizer, prompt, spans)
    assert len(cut) == 2
    for window in cut:
        assert len(window.ids) == LENGTH
        assert window.ids[0] == tiny_sd.tokenizer.bos_token_id and tiny_sd.tokenizer.eos_token_id in window.ids
        for index, positions in window.words.items():
            text = tiny_sd.tokenizer.decode([window.ids[p] for p in positions]).replace(" ", "")
            assert text == words[index].text.lower()
    # Each word whole, and once.
    assert sorted(i for window in cut for i in window.words) == list(range(len(words)))


def test_a_word_longer_than_a_window_and_no_text_at_all(tiny_sd):
    long = "z" * 50
    cut = windows(tiny_sd.tokenizer, long, [(0, 50)])
    assert len(cut) == 3 and sum(len(window.words[0]) for window in cut) == 50
    (empty,) = windows(tiny_sd.tokenizer, "", [])
    assert empty.ids[:2] == [tiny_sd.tokenizer.bos_token_id, tiny_sd.tokenizer.eos_token_id] and empty.words == {}


def test_join_fields_drops_empty_parts():
    words = find_words({"question": "", "answer": "two dogs"})
    assert join_fields({"question": "", "answer": "two dogs"}, words) == ("two dogs", [(0, 3), (4, 8)])


# ---- from what was recorded to maps ---------------------------------------------------------------------------------


def test_one_recording_combined_in_several_ways(tiny_sd, pixels):
    """Combining some layers of what was recorded from all equals recording these layers alone."""
    recorded = attention_maps.record(tiny_sd, pixels, TEXTS, IDS, NOISE)
    assert set(recorded.maps) == {8, 4} and recorded.layers[4] == 4 and recorded.layers[8] == 3
    for resolutions in (None, {8: 1.0}, {8: 1.0, 4: 0.5}):
        recipe = NOISE._replace(resolutions=resolutions)
        alone = attention_maps.word_maps(tiny_sd, pixels, TEXTS, IDS, recipe)
        for a, b in zip(attention_maps.combine(recorded, recipe), alone, strict=True):
            assert a.words == b.words and a.sos == pytest.approx(b.sos, rel=1e-5)
            torch.testing.assert_close(a.maps, b.maps, atol=1e-7, rtol=1e-5)


def test_content_norm_shares_every_pixel_among_the_tokens_of_the_words(tiny_sd, pixels):
    plain, shared = (
        attention_maps.word_maps(tiny_sd, pixels, TEXTS, IDS, NOISE._replace(content_norm=on)) for on in (False, True)
    )
    # "turquoise" falls to letters.
    tokens = [[1] * 7, [2, 1, 9, 1, 1, 1, 1, 9, 3], [1]]
    for was, now, n in zip(plain, shared, tokens, strict=True):
        assert [word.text for word in was.words] == [word.text for word in now.words] and len(n) == len(now.words)
        there = einsum(was.maps, torch.tensor(n).float(), "w y x, w -> y x")
        torch.testing.assert_close(now.maps * there, was.maps)
        assert was.sos == now.sos
    # A single word gets it all.
    assert (shared[2].maps == 1).all()
    assert (shared[0].maps.sum(0) - 1).abs().max() < 1e-5


def test_no_pass_has_more_windows_than_there_are_pictures(tiny_sd, pixels, monkeypatch):
    sizes, plain = [], recipes.predict
    monkeypatch.setattr(recipes, "predict", lambda sd, x, t, text: sizes.append(len(x)) or plain(sd, x, t, text))
    encoder = tiny_sd.text_encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    long = {"question": "Is the turquoise cat with the turquoise dog?", "answer": "turquoise " * 4}
    recipe = find_recipe("invert", inversion_steps=2)
    (alone,) = attention_maps.word_maps(tiny_sd, pixels[:1], [long], ["x"], recipe)
    assert len(sizes) > 4 and set(sizes) == {1}
    together = attention_maps.word_maps(tiny_sd, pixels[:2], [long] * 2, ["x", "y"], recipe)
    assert set(sizes) == {1, 2}
    encoder.remove()
    torch.testing.assert_close(together[0].maps, alone.maps, atol=2e-5, rtol=1e-3)


def test_time_is_told_by_phase(tiny_sd, pixels):
    seconds = attention_maps.record(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], NOISE).seconds
    assert set(seconds) == {"text", "VAE", "UNet"} and min(seconds.values()) > 0
    watch = attention_maps.Stopwatch()
    for _ in range(2):
        with watch("VAE"):
            time.sleep(0.01)
    watch.add(seconds)
    assert set(watch.seconds) == set(seconds) and watch.seconds["VAE"] >= 0.02 + seconds["VAE"]


def test_unknown_resolutions_are_refused(tiny_sd, pixels):
    with pytest.raises(ValueError, match=r"attends to text at \[8, 4\]; got \[16\]"):
        attention_maps.word_maps(
            tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], RECIPES["paper"]._replace(resolutions={16: 1.0})
        )


# ---- numbers, memory, speed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [NOISE, find_recipe("null-text", steps=3, inner_steps=2)], ids=["noise", "null-text"]
)
def test_half_precision_keeps_the_maps(tmp_path, tiny_sd, pixels, recipe):
    folder = build_tiny_sd(tmp_path)
    exact = attention_maps.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], recipe)[0].maps
    for dtype, error in (("bf16", 0.1), ("fp32", 1e-6)):
        sd = stable_diffusion.load(str(folder), dtype=dtype)
        assert {part.dtype for part in (sd.unet, sd.vae, sd.text_encoder)} == {getattr(torch, DTYPES[dtype])}
        maps = attention_maps.word_maps(sd, pixels[:1], TEXTS[:1], IDS[:1], recipe)[0].maps
        assert maps.dtype == torch.float32 and (maps - exact).abs().max() <= error * exact.max()


@pytest.mark.slow
def test_a_compiled_unet_is_one_graph_and_gives_the_same_maps(tmp_path, tiny_sd, pixels, monkeypatch):
    """The graph is taken as it would be for a GPU, and run as it is ("eager": no code is generated)."""
    # What checks the annotations while the tests run cannot be compiled.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    sd = stable_diffusion.load(str(build_tiny_sd(tmp_path)))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sd.unet.compile(backend="eager")
    # The second id has another noise.
    for ids in (["one"], ["another"]):
        (found,) = attention_maps.word_maps(sd, pixels[:1], TEXTS[:1], ids, NOISE)
        (expected,) = attention_maps.word_maps(tiny_sd, pixels[:1], TEXTS[:1], ids, NOISE)
        torch.testing.assert_close(found.maps, expected.maps, atol=2e-5, rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_the_batch_that_fits():
    tried = []

    def trial(pictures):
        tried.append(pictures)
        if pictures > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert (
        stable_diffusion.fitting_batch(trial) == int(0.9 * tried[-1]) >= 15 and tried[0] == 64 and 18 <= tried[-1] <= 20
    )


# ---- loading and framing --------------------------------------------------------------------------------------------


def test_frames():
    wide = np.zeros((10, 30, 3), np.uint8)
    # The middle third is white.
    wide[:, 10:20] = 255
    image = Image.fromarray(wide)
    whole = attention_maps.frame_image(image, 30)
    assert whole.shape == (3, 30, 30) and whole.dtype == torch.float32
    assert whole[:, :, 12:18].min() == 1 and whole[:, :, :8].max() == -1
    # Only the white square is left.
    assert attention_maps.frame_image(image, 16, "crop").min() == 1
    assert attention_maps.frame_image(image.convert("L"), 8).shape == (3, 8, 8)


def test_missing_models_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="--sd .*is not there; it must hold tokenizer, text_encoder, vae, unet"):
        stable_diffusion.load(str(tmp_path / "nothing"))
    (tmp_path / "unet").mkdir()
    with pytest.raises(OSError, match="lacks tokenizer, text_encoder, vae, scheduler"):
        stable_diffusion.load(str(tmp_path))
    with pytest.raises(OSError, match=r"cannot load Stable Diffusion nobody/no-such-model: .*--data toy") as error:
        stable_diffusion.load("nobody/no-such-model")
    # It says why, too.
    assert "offline mode" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_network_is_found_out_at_once(monkeypatch):
    def unreachable(self, name):
        # As the HTTP library: no OSError.
        raise RuntimeError("[Errno -2] Name or service not known")

    monkeypatch.setattr(hub.HfApi, "auth_check", unreachable)
    with pytest.raises(
        OSError, match=r"no-such-model: huggingface.co says: \[Errno -2\] Name or service not known. To"
    ):
        stable_diffusion.load("nobody/no-such-model")


def test_a_folder_with_a_part_of_nothing_in_it(tmp_path):
    build_tiny_sd(tmp_path)
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(OSError, match="cannot load Stable Diffusion .*: the tokenizer's files are missing"):
        stable_diffusion.load(str(tmp_path))
    build_tiny_sd(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="cannot load Stable Diffusion .*diffusion_pytorch_model"):
        stable_diffusion.load(str(tmp_path))
