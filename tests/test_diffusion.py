"""Stage 1's teacher on a tiny Stable Diffusion with random weights, against slow and explicit computations."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from einops import einsum, rearrange
from PIL import Image
from tiny_sd import LENGTH, build_tiny_sd, explicit_maps

from lavender_min import diffusion, hub, recipes, stable_diffusion
from lavender_min.recording import Recorder, RecordingProcessor, recording
from lavender_min.words import find_words, join_fields, windows


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    return diffusion.load(str(build_tiny_sd(tmp_path_factory.mktemp("sd"))))


@pytest.fixture
def pixels():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


TEXTS = [
    {"question": "", "answer": "A red dog runs on the grass"},
    {"question": "Is the turquoise cat with the dog?", "answer": "turquoise, yes"},  # longer than one window
    {"question": "", "answer": "cat"},
]
IDS = ["one", "two", "three"]
NOISE = {"timesteps": [40, 500], "draws": 2}
SHORT = {"inversion_steps": 2, "denoising_steps": 2}


def some_pass(sd, rows=2):
    draw = torch.Generator().manual_seed(3)
    latents = torch.randn(rows, 4, 8, 8, generator=draw)
    ids = torch.randint(0, 200, (rows, LENGTH), generator=draw)
    return latents, torch.tensor(500), sd.text_encoder(ids)[0], torch.rand(rows, LENGTH, 4, generator=draw)


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
        recorded = recipes.ask(tiny_sd, latents, t, text)
    assert (recorded - plain).abs().max() <= 1e-6 * plain.abs().max()
    assert {name: id(processor) for name, processor in tiny_sd.unet.attn_processors.items()} == before
    assert torch.equal(recipes.ask(tiny_sd, latents, t, text), plain)
    expected = torch.einsum("rlyx,rlw->rwyx", layers.mean(0), weights)
    torch.testing.assert_close(mean_over_layers(recorder), expected, atol=1e-6, rtol=1e-5)
    assert expected.std() > 1e-3  # the maps are not flat, so this says something


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
    sides = [8, 4, 4, 4, 4, 8, 8]  # down, down, middle, up (two layers each), as they are called
    assert len(first) == len(sides) and tiny_sd.map_sides == [8, 4]
    for resolutions in (None, {8: 1.0}, {4: 1.0, 8: 0.0}, {8: 1.0, 4: 0.25}):
        recorder = Recorder(weights, [side for side, weight in (resolutions or {8: 1, 4: 1}).items() if weight])
        with recording(tiny_sd.unet, recorder):
            out = recipes.ask(tiny_sd, latents, t, text)
        with recording(tiny_sd.unet, recorder):
            recipes.ask(tiny_sd, latents + 1, t, text)
        layer_weight = torch.tensor([(resolutions or {8: 1.0, 4: 1.0}).get(side, 0.0) for side in sides])
        layer_weight = layer_weight / layer_weight.sum()
        layers = torch.einsum("n,nrlyx->rlyx", layer_weight, (first + second) / 2)
        expected = torch.einsum("rlyx,rlw->rwyx", layers, weights)
        means, counts = recorder.means(), recorder.layers
        side_weight = {side: counts[side] * (resolutions or {8: 1, 4: 1})[side] for side in means}
        found = sum(weight / sum(side_weight.values()) * means[side] for side, weight in side_weight.items())
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert (out - recipes.ask(tiny_sd, latents, t, text)).abs().max() <= 1e-6 * out.abs().max()


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
    assert sorted(i for window in cut for i in window.words) == list(range(len(words)))  # each word whole, and once


def test_a_word_longer_than_a_window_and_no_text_at_all(tiny_sd):
    long = "z" * 50
    cut = windows(tiny_sd.tokenizer, long, [(0, 50)])
    assert len(cut) == 3 and sum(len(window.words[0]) for window in cut) == 50
    (empty,) = windows(tiny_sd.tokenizer, "", [])
    assert empty.ids[:2] == [tiny_sd.tokenizer.bos_token_id, tiny_sd.tokenizer.eos_token_id] and empty.words == {}


def test_join_fields_drops_empty_parts():
    words = find_words({"question": "", "answer": "two dogs"})
    assert join_fields({"question": "", "answer": "two dogs"}, words) == ("two dogs", [(0, 3), (4, 8)])


# ---- recipes --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_word_maps_are_the_mean_of_the_words_tokens(tiny_sd, pixels):
    """One noised pass by hand: noise, UNet, softmax; each word the mean over its tokens, layers and passes."""
    settings = {"timesteps": [300], "draws": 1, "seed": 4}
    (found,) = diffusion.word_maps(tiny_sd, pixels[:1], TEXTS[:1], ["x"], "noise", settings)
    tokenizer = tiny_sd.tokenizer
    ids = tokenizer(TEXTS[0]["answer"], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    latents = tiny_sd.vae.encode(pixels[:1]).latent_dist.mode() * 0.18215
    eps = recipes.seeded_noise("4 x", (1, 4, 8, 8))
    kept = DDIMScheduler.from_config(tiny_sd.noise_schedule).alphas_cumprod[300]
    layers, _ = explicit_maps(
        tiny_sd.unet, kept.sqrt() * latents + (1 - kept).sqrt() * eps, torch.tensor(300), tiny_sd.text_encoder(ids)[0]
    )
    tokens = layers.mean(0)[0]  # [l, g, g]
    assert [word.text for word in found.words] == TEXTS[0]["answer"].split()
    torch.testing.assert_close(found.maps, tokens[1:8], atol=1e-6, rtol=1e-5)  # every word of this text is one token
    assert found.sos == pytest.approx(tokens[0].mean().item(), rel=1e-5)
    (split,) = diffusion.word_maps(tiny_sd, pixels[:1], [{"answer": "red zebra"}], ["x"], "noise", settings)
    ids = tokenizer("red zebra", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    layers, _ = explicit_maps(
        tiny_sd.unet, kept.sqrt() * latents + (1 - kept).sqrt() * eps, torch.tensor(300), tiny_sd.text_encoder(ids)[0]
    )
    torch.testing.assert_close(split.maps[1], layers.mean(0)[0, 2:7].mean(0), atol=1e-6, rtol=1e-5)  # z e b r a


@pytest.mark.parametrize(
    "recipe, settings", [("paper", {}), ("invert", {}), ("noise", NOISE), ("null-text", {"steps": 3, "inner_steps": 2})]
)
def test_a_row_does_not_depend_on_its_batch(tiny_sd, pixels, recipe, settings):
    together = diffusion.word_maps(tiny_sd, pixels, TEXTS, IDS, recipe, settings)
    for i in range(3):
        (alone,) = diffusion.word_maps(tiny_sd, pixels[i : i + 1], TEXTS[i : i + 1], IDS[i : i + 1], recipe, settings)
        assert alone.words == together[i].words == find_words(TEXTS[i])
        # Rounding differs with the batch and grows through the passes; a leak between rows would be a thousandfold.
        torch.testing.assert_close(alone.maps, together[i].maps, atol=2e-5, rtol=1e-3)
        assert alone.sos == pytest.approx(together[i].sos, rel=1e-3)
        assert alone.maps.shape == (len(alone.words), 32, 32) and alone.maps.dtype == torch.float32
        assert (alone.maps > 0).all() and 0 < alone.sos < 1


def test_folded_noise_equals_one_pass_after_another(tiny_sd, pixels):
    folded = diffusion.word_maps(tiny_sd, pixels[:2], TEXTS[:2], IDS[:2], "noise", {"timesteps": [40, 500], "draws": 1})
    assert folded[0].maps.shape[0] == 7

    def at(t, place):  # the draw that this time step gets in the folded pass
        latents = tiny_sd.vae.encode(pixels[:1]).latent_dist.mode() * 0.18215
        kept = DDIMScheduler.from_config(tiny_sd.noise_schedule).alphas_cumprod[t]
        eps = recipes.seeded_noise("0 one", (2, 4, 8, 8))[place : place + 1]
        ids = tiny_sd.tokenizer(TEXTS[0]["answer"], padding="max_length", max_length=LENGTH, return_tensors="pt")
        text = tiny_sd.text_encoder(ids.input_ids)[0]
        layers, _ = explicit_maps(tiny_sd.unet, kept.sqrt() * latents + (1 - kept).sqrt() * eps, torch.tensor(t), text)
        return layers.mean(0)[0, 1:8]

    with torch.no_grad():
        torch.testing.assert_close(folded[0].maps, (at(40, 0) + at(500, 1)) / 2, atol=1e-6, rtol=1e-4)


def asked(sd, monkeypatch):
    """Notes the time step of every pass and whether it was recorded."""
    passes, plain = [], recipes.ask

    def noted(sd, latents, t, text):
        recorded = any(isinstance(p, RecordingProcessor) for p in sd.unet.attn_processors.values())
        passes.append((t.tolist(), recorded))
        return plain(sd, latents, t, text)

    monkeypatch.setattr(recipes, "ask", noted)
    return passes


def test_the_papers_schedules_meet(tiny_sd, pixels, monkeypatch):
    passes = asked(tiny_sd, monkeypatch)
    diffusion.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], "paper")
    inversion, denoising = [(t, False) for t in range(199, 1000, 200)], [(t, True) for t in range(999, 0, -100)]
    assert passes == inversion + denoising
    recipe = diffusion.RECIPES["paper"]
    assert recipe.passes(recipe.settings) == 15 == len(passes)
    passes.clear()
    diffusion.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], "invert")
    assert passes == [(t, True) for t in range(199, 1000, 200)]


def ideal_unet(sd, monkeypatch, start, kind):
    """A UNet that always finds the same noise, said as noise or as the velocity that means this noise."""
    schedule = DDIMScheduler.from_config(sd.noise_schedule)
    eps = torch.randn(start.shape, generator=torch.Generator().manual_seed(9))
    trail = []

    def answer(sd, latents, t, text):
        trail.append((int(t), latents))
        kept = schedule.alphas_cumprod[t]
        return eps if kind == "epsilon" else (eps - (1 - kept).sqrt() * latents) / kept.sqrt()

    monkeypatch.setattr(recipes, "ask", answer)
    return schedule, eps, trail


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_retraces_the_path_for_either_kind_of_prediction(tiny_sd, pixels, monkeypatch, kind):
    sd = tiny_sd._replace(noise_schedule={**tiny_sd.noise_schedule, "prediction_type": kind})
    start = sd.vae.encode(pixels[:1]).latent_dist.mode().detach() * 0.18215
    schedule, eps, trail = ideal_unet(sd, monkeypatch, start, kind)
    recipes.paper(
        sd, start, None, Recorder(torch.zeros(1, LENGTH, 1), [8]), ["x"], inversion_steps=5, denoising_steps=10
    )
    # The true path starts from latents that are clean but for the first noise level (set_alpha_to_one is False).
    clean = (start - (1 - schedule.alphas_cumprod[0]).sqrt() * eps) / schedule.alphas_cumprod[0].sqrt()
    for t, latents in trail[5:]:
        kept = schedule.alphas_cumprod[t]
        assert (latents - (kept.sqrt() * clean + (1 - kept).sqrt() * eps)).abs().max() < 1e-4, t


def test_the_prediction_type_of_the_pipeline_is_honoured(tmp_path, tiny_sd, pixels):
    velocity = diffusion.load(str(build_tiny_sd(tmp_path, "v_prediction")))
    maps = [diffusion.word_maps(sd, pixels[:1], TEXTS[:1], IDS[:1])[0].maps for sd in (tiny_sd, velocity)]
    assert velocity.noise_schedule["prediction_type"] == "v_prediction"
    assert (maps[0] - maps[1]).abs().max() > 1e-5  # same weights, other meaning


def null_text_by_hand(sd, latents, text, null, *, steps, inner_steps, guidance):
    """One picture, as the authors' notebook has it, on the time steps of ours: [l, g, g]."""
    kept = DDIMScheduler.from_config(sd.noise_schedule).alphas_cumprod
    times = [1000 * i // steps - 1 for i in range(steps, 0, -1)]

    def noise_of(x, t, text):
        out = sd.unet(x, t, text).sample
        is_velocity = sd.noise_schedule["prediction_type"] == "v_prediction"
        return kept[t] ** 0.5 * out + (1 - kept[t]) ** 0.5 * x if is_velocity else out

    def move(x, eps, start, stop):
        start, stop = (kept[max(t, 0)] for t in (start, stop))
        return stop**0.5 * (x - (1 - start) ** 0.5 * eps) / start**0.5 + (1 - stop) ** 0.5 * eps

    path, maps = [latents], []
    with torch.no_grad():
        for t in reversed(times):
            path.append(move(path[-1], noise_of(path[-1], t, text), t - 1000 // steps, t))
    now = path[-1]
    for i, t in enumerate(times):
        with torch.no_grad():
            maps.append(explicit_maps(sd.unet, now, torch.tensor(t), text)[0].mean(0)[0])
            conditional = noise_of(now, t, text)
        null = null.clone().detach().requires_grad_()
        adam = torch.optim.Adam([null], lr=1e-2 * (1.0 - i / 100.0))
        for _ in range(inner_steps):
            eps = noise_of(now, t, null)
            before = move(now, eps + guidance * (conditional - eps), t, t - 1000 // steps)
            loss = torch.nn.functional.mse_loss(before, path[steps - i - 1])
            adam.zero_grad()
            loss.backward()
            adam.step()
            assert loss.item() > 1e-4  # so these random weights see no early stop, which is tested on its own below
        with torch.no_grad():
            eps = noise_of(now, t, null)
            now = move(now, eps + guidance * (conditional - eps), t, t - 1000 // steps)
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_null_text_equals_the_authors_steps_taken_one_picture_at_a_time(tiny_sd, pixels, kind):
    settings = {"steps": 4, "inner_steps": 3, "guidance": 7.5}
    sd = tiny_sd._replace(noise_schedule={**tiny_sd.noise_schedule, "prediction_type": kind})
    texts = [TEXTS[0], TEXTS[2]]
    found = diffusion.word_maps(sd, pixels[:2], texts, IDS[:2], "null-text", settings)
    without = diffusion.word_maps(sd, pixels[:2], texts, IDS[:2], "null-text", {**settings, "inner_steps": 0})
    for i in range(2):
        said, empty = (
            sd.tokenizer(text, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
            for text in (texts[i]["answer"], "")
        )
        latents = sd.vae.encode(pixels[i : i + 1]).latent_dist.mode() * 0.18215
        maps = null_text_by_hand(sd, latents, sd.text_encoder(said)[0], sd.text_encoder(empty)[0], **settings)
        words = len(found[i].words)  # of one token each
        torch.testing.assert_close(found[i].maps, maps[1 : 1 + words], atol=2e-5, rtol=1e-3)
        assert (without[i].maps - found[i].maps).abs().max() > 1e-4  # the inner steps do something
    assert all(p.grad is None for part in (sd.unet, sd.text_encoder, sd.vae) for p in part.parameters())


def test_rows_stop_training_their_empty_text_one_by_one():
    """As the authors' loop, which trains one: the step that finds the loss small enough is still taken."""
    draw = torch.Generator().manual_seed(0)
    null = torch.randn(4, 2, 3, generator=draw)

    def step(null):
        return rearrange(1.5 * null, "r l c -> r 1 l c")

    goal = step(null) + torch.tensor([1e-4, 0.02, 0.035, 1.0])[:, None, None, None]  # Adam moves by 0.015 a step

    found, taken = recipes.trained(null, step, goal, 5, lr=0.01, enough=1e-4), []
    for i in range(4):
        alone = null[i : i + 1].clone().requires_grad_()
        adam = torch.optim.Adam([alone], lr=0.01)
        for j in range(5):  # noqa: B007 (used after the loop)
            loss = torch.nn.functional.mse_loss(step(alone), goal[i : i + 1])
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < 1e-4:
                break
        taken.append(j + 1)
        torch.testing.assert_close(found[i : i + 1], alone.detach())
    assert taken == [1, 2, 3, 5]


def test_the_announced_passes_are_the_passes_made(tiny_sd, pixels, monkeypatch):
    passes = asked(tiny_sd, monkeypatch)
    to_the_end = recipes.trained
    monkeypatch.setattr(recipes, "trained", lambda *args, lr, enough: to_the_end(*args, lr=lr, enough=0.0))
    for name, how in recipes.RECIPES.items():
        passes.clear()
        diffusion.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], name)
        backward = 9 * 5 if name == "null-text" else 0
        folded = 3 if name == "noise" else 1
        assert len(passes) * folded + backward == how.passes(how.settings), name
    assert passes == [([51, 151, 301], True)]  # of noise, the last one: all time steps in one pass


# ---- from what was recorded to maps ---------------------------------------------------------------------------------


def test_one_recording_read_in_several_ways(tiny_sd, pixels):
    """Reading some layers of what was recorded from all equals recording these layers alone."""
    recorded = diffusion.record(tiny_sd, pixels, TEXTS, IDS, "noise", NOISE)
    assert set(recorded.maps) == {8, 4} and recorded.layers[4] == 4 and recorded.layers[8] == 3
    for resolutions in (None, {8: 1.0}, {8: 1.0, 4: 0.5}):
        alone = diffusion.word_maps(tiny_sd, pixels, TEXTS, IDS, "noise", NOISE, resolutions)
        for a, b in zip(diffusion.read(recorded, resolutions), alone, strict=True):
            assert a.words == b.words and a.sos == pytest.approx(b.sos, rel=1e-5)
            torch.testing.assert_close(a.maps, b.maps, atol=1e-7, rtol=1e-5)


def test_content_norm_shares_every_pixel_among_the_tokens_of_the_words(tiny_sd, pixels):
    plain, shared = (
        diffusion.word_maps(tiny_sd, pixels, TEXTS, IDS, "noise", NOISE, content_norm=on) for on in (False, True)
    )
    tokens = [[1] * 7, [2, 1, 9, 1, 1, 1, 1, 9, 3], [1]]  # "turquoise" falls to letters
    for was, now, n in zip(plain, shared, tokens, strict=True):
        assert [word.text for word in was.words] == [word.text for word in now.words] and len(n) == len(now.words)
        there = einsum(was.maps, torch.tensor(n).float(), "w y x, w -> y x")
        torch.testing.assert_close(now.maps * there, was.maps)
        assert was.sos == now.sos
    assert (shared[2].maps == 1).all()  # a single word gets it all
    assert (shared[0].maps.sum(0) - 1).abs().max() < 1e-5


def test_no_pass_has_more_rows_than_there_are_pictures(tiny_sd, pixels, monkeypatch):
    rows, plain = [], recipes.ask
    monkeypatch.setattr(recipes, "ask", lambda sd, x, t, text: rows.append(len(x)) or plain(sd, x, t, text))
    long = {"question": "Is the turquoise cat with the turquoise dog?", "answer": "turquoise " * 4}
    (alone,) = diffusion.word_maps(tiny_sd, pixels[:1], [long], ["x"], "invert", {"inversion_steps": 2})
    assert len(rows) > 4 and set(rows) == {1}
    together = diffusion.word_maps(tiny_sd, pixels[:2], [long] * 2, ["x", "y"], "invert", {"inversion_steps": 2})
    assert set(rows) == {1, 2}
    torch.testing.assert_close(together[0].maps, alone.maps, atol=2e-5, rtol=1e-3)


def test_time_is_told_by_phase(tiny_sd, pixels):
    times = {}
    diffusion.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], "noise", NOISE, times=times)
    assert set(times) == {"text", "VAE", "UNet", "reading"} and min(times.values()) > 0


def test_unknown_resolutions_are_refused(tiny_sd, pixels):
    with pytest.raises(ValueError, match=r"attends to text at \[8, 4\]; got \[16\]"):
        diffusion.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], resolutions={16: 1.0})


# ---- numbers, memory, speed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, settings", [("noise", NOISE), ("null-text", {"steps": 3, "inner_steps": 2})])
def test_half_precision_keeps_the_maps(tmp_path, tiny_sd, pixels, recipe, settings):
    folder = build_tiny_sd(tmp_path)
    exact = diffusion.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], recipe, settings)[0].maps
    for dtype, error in (("bf16", 0.1), ("fp32", 1e-6)):
        sd = diffusion.load(str(folder), dtype=dtype)
        assert {part.dtype for part in (sd.unet, sd.vae, sd.text_encoder)} == {stable_diffusion.DTYPES[dtype]}
        maps = diffusion.word_maps(sd, pixels[:1], TEXTS[:1], IDS[:1], recipe, settings)[0].maps
        assert maps.dtype == torch.float32 and (maps - exact).abs().max() <= error * exact.max()


@pytest.mark.slow
def test_a_compiled_unet_is_one_graph_and_gives_the_same_maps(tmp_path, tiny_sd, pixels):
    """The graph is taken as it would be for a GPU, and run as it is ("eager": no code is generated)."""
    sd = diffusion.load(str(build_tiny_sd(tmp_path)))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sd.unet.compile(backend="eager")
    for ids in (["one"], ["another"]):  # another noise
        (found,) = diffusion.word_maps(sd, pixels[:1], TEXTS[:1], ids, "noise", NOISE)
        (expected,) = diffusion.word_maps(tiny_sd, pixels[:1], TEXTS[:1], ids, "noise", NOISE)
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
    wide[:, 10:20] = 255  # the middle third is white
    image = Image.fromarray(wide)
    whole = diffusion.frame_image(image, 30)
    assert whole.shape == (3, 30, 30) and whole.dtype == torch.float32
    assert whole[:, :, 12:18].min() == 1 and whole[:, :, :8].max() == -1
    assert diffusion.frame_image(image, 16, "crop").min() == 1  # only the white square is left
    assert diffusion.frame_image(image.convert("L"), 8).shape == (3, 8, 8)


def test_missing_models_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="--sd .*is not there; it must hold tokenizer, text_encoder, vae, unet"):
        diffusion.load(str(tmp_path / "nothing"))
    (tmp_path / "unet").mkdir()
    with pytest.raises(OSError, match="lacks tokenizer, text_encoder, vae, scheduler"):
        diffusion.load(str(tmp_path))
    with pytest.raises(OSError, match=r"cannot load Stable Diffusion nobody/no-such-model: .*--data toy") as error:
        diffusion.load("nobody/no-such-model")
    assert "offline mode" in str(error.value)  # and why
    assert "\n" not in str(error.value)


def test_no_network_is_found_out_at_once(monkeypatch):
    def unreachable(self, name):
        raise RuntimeError("[Errno -2] Name or service not known")  # as the HTTP library: no OSError

    monkeypatch.setattr(hub.HfApi, "auth_check", unreachable)
    with pytest.raises(
        OSError, match=r"no-such-model: huggingface.co says: \[Errno -2\] Name or service not known. To"
    ):
        diffusion.load("nobody/no-such-model")


def test_a_folder_with_a_part_of_nothing_in_it(tmp_path):
    build_tiny_sd(tmp_path)
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(OSError, match="cannot load Stable Diffusion .*: the tokenizer's files are missing"):
        diffusion.load(str(tmp_path))
    build_tiny_sd(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="cannot load Stable Diffusion .*diffusion_pytorch_model"):
        diffusion.load(str(tmp_path))
