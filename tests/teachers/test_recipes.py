"""How Stable Diffusion is run, on a tiny one with random weights, against slow and explicit computations."""

import pytest
import torch
from diffusers import DDIMScheduler
from einops import rearrange
from tiny_sd import IDS, LENGTH, NOISE, TEXTS, build_tiny_sd, explicit_maps

from lavender_min.teachers import RECIPES, attention_maps, find_recipe, recipes, stable_diffusion
from lavender_min.teachers.recording import Recorder, RecordingProcessor
from lavender_min.words import find_words


@torch.no_grad()
def test_word_maps_are_the_mean_of_the_words_tokens(tiny_sd, pixels):
    """One noised pass by hand: noise, UNet, softmax; each word the mean over its tokens, layers and passes."""
    recipe = find_recipe("noise", timesteps=[300], draws=1, seed=4)
    (found,) = attention_maps.word_maps(tiny_sd, pixels[:1], TEXTS[:1], ["x"], recipe)
    tokenizer = tiny_sd.tokenizer
    ids = tokenizer(TEXTS[0]["answer"], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    latents = tiny_sd.vae.encode(pixels[:1]).latent_dist.mode() * 0.18215
    eps = recipes.seeded_noise("4 x", (1, 4, 8, 8))
    kept = DDIMScheduler.from_config(tiny_sd.noise_schedule).alphas_cumprod[300]
    layers, _ = explicit_maps(
        tiny_sd.unet, kept.sqrt() * latents + (1 - kept).sqrt() * eps, torch.tensor(300), tiny_sd.text_encoder(ids)[0]
    )
    tokens = layers.mean(0)[0]  # [t, g, g]
    assert [word.text for word in found.words] == TEXTS[0]["answer"].split()
    # Every word of this text is one token.
    torch.testing.assert_close(found.maps, tokens[1:8], atol=1e-6, rtol=1e-5)
    assert found.sos == pytest.approx(tokens[0].mean().item(), rel=1e-5)
    (split,) = attention_maps.word_maps(tiny_sd, pixels[:1], [{"answer": "red zebra"}], ["x"], recipe)
    ids = tokenizer("red zebra", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    layers, _ = explicit_maps(
        tiny_sd.unet, kept.sqrt() * latents + (1 - kept).sqrt() * eps, torch.tensor(300), tiny_sd.text_encoder(ids)[0]
    )
    # Its tokens are z, e, b, r and a.
    torch.testing.assert_close(split.maps[1], layers.mean(0)[0, 2:7].mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [RECIPES["paper"], RECIPES["invert"], NOISE, find_recipe("null-text", steps=3, inner_steps=2)],
    ids=lambda recipe: recipe.name,
)
def test_a_picture_does_not_depend_on_its_batch(tiny_sd, pixels, recipe):
    together = attention_maps.word_maps(tiny_sd, pixels, TEXTS, IDS, recipe)
    for i in range(3):
        (alone,) = attention_maps.word_maps(tiny_sd, pixels[i : i + 1], TEXTS[i : i + 1], IDS[i : i + 1], recipe)
        assert alone.words == together[i].words == find_words(TEXTS[i])
        # Rounding differs with the batch and grows through the passes; a leak between pictures would be a thousandfold.
        torch.testing.assert_close(alone.maps, together[i].maps, atol=2e-5, rtol=1e-3)
        assert alone.sos == pytest.approx(together[i].sos, rel=1e-3)
        assert alone.maps.shape == (len(alone.words), 32, 32) and alone.maps.dtype == torch.float32
        assert (alone.maps > 0).all() and 0 < alone.sos < 1


def test_folded_noise_equals_one_pass_after_another(tiny_sd, pixels):
    recipe = find_recipe("noise", timesteps=[40, 500], draws=1)
    folded = attention_maps.word_maps(tiny_sd, pixels[:2], TEXTS[:2], IDS[:2], recipe)
    assert folded[0].maps.shape[0] == 7

    # The draw that this time step gets in the folded pass.
    def at(t, place):
        latents = tiny_sd.vae.encode(pixels[:1]).latent_dist.mode() * 0.18215
        kept = DDIMScheduler.from_config(tiny_sd.noise_schedule).alphas_cumprod[t]
        eps = recipes.seeded_noise("0 one", (2, 4, 8, 8))[place : place + 1]
        ids = tiny_sd.tokenizer(TEXTS[0]["answer"], padding="max_length", max_length=LENGTH, return_tensors="pt")
        text = tiny_sd.text_encoder(ids.input_ids)[0]
        layers, _ = explicit_maps(tiny_sd.unet, kept.sqrt() * latents + (1 - kept).sqrt() * eps, torch.tensor(t), text)
        return layers.mean(0)[0, 1:8]

    with torch.no_grad():
        torch.testing.assert_close(folded[0].maps, (at(40, 0) + at(500, 1)) / 2, atol=1e-6, rtol=1e-4)


def noted_passes(monkeypatch):
    """Notes the time step of every pass and whether it was recorded."""
    passes, plain = [], recipes.predict

    def noted(sd, latents, t, text):
        recorded = any(isinstance(p, RecordingProcessor) for p in sd.unet.attn_processors.values())
        passes.append((t.tolist(), recorded))
        return plain(sd, latents, t, text)

    monkeypatch.setattr(recipes, "predict", noted)
    return passes


def test_the_papers_schedules_meet(tiny_sd, pixels, monkeypatch):
    passes = noted_passes(monkeypatch)
    attention_maps.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], RECIPES["paper"])
    inversion, denoising = [(t, False) for t in range(199, 1000, 200)], [(t, True) for t in range(999, 0, -100)]
    assert passes == inversion + denoising
    recipe = RECIPES["paper"]
    assert recipe.passes(recipe.settings) == 15 == len(passes)
    passes.clear()
    attention_maps.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], RECIPES["invert"])
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

    monkeypatch.setattr(recipes, "predict", answer)
    return schedule, eps, trail


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_retraces_the_path_for_either_kind_of_prediction(tiny_sd, pixels, monkeypatch, kind):
    sd = tiny_sd._replace(noise_schedule={**tiny_sd.noise_schedule, "prediction_type": kind})
    start = sd.vae.encode(pixels[:1]).latent_dist.mode().detach() * 0.18215
    schedule, eps, trail = ideal_unet(sd, monkeypatch, start, kind)
    inputs = recipes.Inputs(start, torch.zeros(1, LENGTH, 16), ["x"])
    recipes.run(RECIPES["paper"], sd, inputs, Recorder(torch.zeros(1, LENGTH, 1), [8]))
    # The true path starts from latents that are clean but for the first noise level (set_alpha_to_one is False).
    clean = (start - (1 - schedule.alphas_cumprod[0]).sqrt() * eps) / schedule.alphas_cumprod[0].sqrt()
    for t, latents in trail[5:]:
        kept = schedule.alphas_cumprod[t]
        assert (latents - (kept.sqrt() * clean + (1 - kept).sqrt() * eps)).abs().max() < 1e-4, t


def test_the_prediction_type_of_the_pipeline_is_honoured(tmp_path, tiny_sd, pixels):
    velocity = stable_diffusion.load(str(build_tiny_sd(tmp_path, "v_prediction")))
    maps = [attention_maps.word_maps(sd, pixels[:1], TEXTS[:1], IDS[:1])[0].maps for sd in (tiny_sd, velocity)]
    assert velocity.noise_schedule["prediction_type"] == "v_prediction"
    # Same weights, other meaning.
    assert (maps[0] - maps[1]).abs().max() > 1e-5


def null_text_by_hand(sd, latents, text, null, *, steps, inner_steps, guidance):
    """One picture, as the authors' notebook has it, on the time steps of ours: [t, g, g]."""
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
            # So these random weights see no early stop, which is tested on its own below.
            assert loss.item() > 1e-4
        with torch.no_grad():
            eps = noise_of(now, t, null)
            now = move(now, eps + guidance * (conditional - eps), t, t - 1000 // steps)
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_null_text_equals_the_authors_steps_taken_one_picture_at_a_time(tiny_sd, pixels, kind):
    settings = {"steps": 4, "inner_steps": 3, "guidance": 7.5}
    sd = tiny_sd._replace(noise_schedule={**tiny_sd.noise_schedule, "prediction_type": kind})
    texts = [TEXTS[0], TEXTS[2]]
    found, without = (
        attention_maps.word_maps(sd, pixels[:2], texts, IDS[:2], find_recipe("null-text", **{**settings, **more}))
        for more in ({}, {"inner_steps": 0})
    )
    for i in range(2):
        said, empty = (
            sd.tokenizer(text, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
            for text in (texts[i]["answer"], "")
        )
        latents = sd.vae.encode(pixels[i : i + 1]).latent_dist.mode() * 0.18215
        maps = null_text_by_hand(sd, latents, sd.text_encoder(said)[0], sd.text_encoder(empty)[0], **settings)
        # Of one token each.
        words = len(found[i].words)
        torch.testing.assert_close(found[i].maps, maps[1 : 1 + words], atol=2e-5, rtol=1e-3)
        # The inner steps do something.
        assert (without[i].maps - found[i].maps).abs().max() > 1e-4
    assert all(p.grad is None for part in (sd.unet, sd.text_encoder, sd.vae) for p in part.parameters())


def test_windows_stop_training_their_empty_text_one_by_one():
    """As the authors' loop, which trains one: the step that finds the loss small enough is still taken."""
    draw = torch.Generator().manual_seed(0)
    null = torch.randn(4, 2, 3, generator=draw)

    def step(null):
        return rearrange(1.5 * null, "r t e -> r 1 t e")

    # Adam moves by 0.015 a step.
    goal = step(null) + torch.tensor([1e-4, 0.02, 0.035, 1.0])[:, None, None, None]

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
    passes = noted_passes(monkeypatch)
    to_the_end = recipes.trained
    monkeypatch.setattr(recipes, "trained", lambda *args, lr, enough: to_the_end(*args, lr=lr, enough=0.0))
    for name, recipe in RECIPES.items():
        passes.clear()
        attention_maps.word_maps(tiny_sd, pixels[:1], TEXTS[:1], IDS[:1], recipe)
        backward = 9 * 5 if name == "null-text" else 0
        folded = 3 if name == "noise" else 1
        assert len(passes) * folded + backward == recipe.passes(recipe.settings), name
    # Of noise, the last one: all time steps in one pass.
    assert passes == [([51, 151, 301], True)]
