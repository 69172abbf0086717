"""Trains the toy models from nothing: `python -m lavender_min.toy.pretrain [--out DIR] [--only vae|sd|mllama|…]`.

On the pretraining split only:

    vae   pictures to 4 × 16 × 16 latents and back, on random crops (it is convolutional)
    sd    text encoder and UNet together, v-prediction, on the latents; needs the vae
    the hosts, each by its name (see pretrain_hosts.py)

Each saves itself every hundred steps and goes on from there when it is started again. What a step sees is a function of
its number alone, so a resumed run sees the same data. On a CPU vae and sd take three hours, each host one to two; hosts
do not need the others, and can run beside them.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from lavender_min.toy import data, hosts, models, pretrain_hosts, world
from lavender_min.toy.fitting import DEVICE, corpus, fit, pictures
from lavender_min.toy.tokenizers import TEXT_LENGTH

# Standard deviation of the scaled latents. Below 1 more of the picture is lost to noise, so the UNet needs the text.
LATENT_SPREAD = 0.7


def train_vae(pipe, images: np.ndarray, out: Path, steps: int = 1500, crop: int = 64, batch: int = 16) -> None:
    """Absolute and squared error on random crops; the KL term is kept very small, so that pictures stay sharp."""

    def loss_of(rng: np.random.Generator) -> Tensor:
        y, x = rng.integers(0, data.SIDE - crop + 1, 2)
        picked = np.sort(rng.choice(len(images), batch, replace=False))
        pixels = as_pixels(images[picked][:, y : y + crop, x : x + crop])
        posterior = pipe.vae.encode(pixels).latent_dist
        made = pipe.vae.decode(posterior.sample()).sample.float()
        return (made - pixels).abs().mean() + (made - pixels).square().mean() + 1e-5 * posterior.kl().mean()

    fit("vae", pipe.vae, loss_of, steps, 2e-3, out)


def train_sd(pipe, images: np.ndarray, out: Path, steps=(3000, 2500, 3600), batch: int = 32) -> None:
    """v-prediction; a fifth of the time steps below 250, the rest above, where only the text tells what is there.

    There are three phases, each with its own warm-up and cosine. The first has short captions. The second has more full
    listings and questions, so that every word of a long text finds its place. The third has captions that always name
    the colour, at time steps below 850, because above nobody can tell where a thing is.
    """
    scheduler = pipe.scheduler
    with torch.no_grad():
        latents = torch.cat(
            [
                pipe.vae.encode(as_pixels(images[i : i + 50])).latent_dist.mode().float()
                for i in tqdm(range(0, len(images), 50), desc="encoding", mininterval=5)
            ]
        )
    pipe.vae.register_to_config(scaling_factor=LATENT_SPREAD / latents.std().item())
    latents = latents * pipe.vae.config.scaling_factor

    def loss_of(rng, prompt, last=1000):
        picked = rng.integers(0, len(latents), batch)
        tokens = pipe.tokenizer(
            [prompt(data.scene_of(int(i)), rng) for i in picked],
            padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt",
        ).input_ids.to(DEVICE)  # fmt: skip
        clean = latents[picked]
        t = np.where(rng.random(batch) < 0.2, rng.integers(0, 250, batch), rng.integers(250, last, batch))
        t, noise = torch.from_numpy(t).to(DEVICE), torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, t).to(memory_format=torch.channels_last)
        made = pipe.unet(noisy, t, pipe.text_encoder(tokens).last_hidden_state).sample
        return nn.functional.mse_loss(made.float(), scheduler.get_velocity(clean, noise, t))

    both = nn.ModuleList([pipe.unet, pipe.text_encoder])
    fit("sd", both, partial(loss_of, prompt=short_prompt), steps[0], 1e-3, out)
    fit("sd_long", both, partial(loss_of, prompt=long_prompt), steps[1], 1e-3, out)
    fit("sd_named", both, partial(loss_of, prompt=named_prompt, last=850), steps[2], 1e-3, out)


def short_prompt(scene: world.Scene, rng: np.random.Generator) -> str:
    """Any sentence the world has: captions of both kinds, or a question with its answer; now and then nothing at all."""
    kind = rng.random()
    if kind < 0.08:
        return ""
    if kind < 0.7:
        return without_some_colors((world.caption if kind < 0.35 else world.relation)(scene, rng).text, rng)
    return question(scene, rng)


def long_prompt(scene: world.Scene, rng: np.random.Generator) -> str:
    """As before, but captions of one kind name everything."""
    kind = rng.random()
    if kind < 0.05:
        return ""
    if kind < 0.75:
        return (
            world.listing(scene, rng).text if kind < 0.5 else without_some_colors(world.relation(scene, rng).text, rng)
        )
    return question(scene, rng)


def named_prompt(scene: world.Scene, rng: np.random.Generator) -> str:
    """Captions of all three kinds, with every colour, and questions."""
    kind = rng.random()
    if kind < 0.05:
        return ""
    if kind < 0.8:
        return (world.listing if kind < 0.25 else world.caption if kind < 0.4 else world.relation)(scene, rng).text
    return question(scene, rng)


def without_some_colors(text: str, rng: np.random.Generator) -> str:
    return " ".join(word for word in text.split() if word not in world.COLORS or rng.random() < 0.8)


def question(scene: world.Scene, rng: np.random.Generator) -> str:
    question_of = world.QUESTIONS[str(rng.choice(list(world.QUESTIONS)))]
    return " ".join(line.text for line in question_of(scene, rng))


def as_pixels(images: np.ndarray) -> Tensor:
    """uint8 [b, y, x, 3] to floats in [-1, 1], [b, 3, y, x]."""
    pixels = rearrange(torch.from_numpy(np.ascontiguousarray(images)).to(DEVICE), "b y x c -> b c y x").float()
    return (pixels / 127.5 - 1).to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/toy_pretrain"), help="checkpoints and the finished models"
    )
    parser.add_argument("--only", choices=["vae", "sd", *hosts.HOSTS], help="one training instead of all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images = pictures(args.out)
    if args.only in (None, "vae", "sd"):
        torch.manual_seed(0)
        pipe = models.stable_diffusion(corpus(), args.out / "sd")
        for part in (pipe.vae, pipe.unet):
            part.to(memory_format=torch.channels_last)
        train_vae(pipe, images, args.out)
        if args.only != "vae":
            train_sd(pipe, images, args.out)
            pipe.to(torch.float16).save_pretrained(args.out / "sd")
    for name in hosts.HOSTS:
        if args.only in (None, name):
            pretrain_hosts.train(name, images, args.out)
    print(f"done: {args.out}")


if __name__ == "__main__":
    main()
