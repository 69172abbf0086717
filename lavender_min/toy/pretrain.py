"""Trains the two toy models from nothing: `python -m lavender_min.toy.pretrain [--out DIR] [--only vae|sd|vlm]`.

There are three trainings, on the pretraining split only:

    vae   pictures to 4 × 16 × 16 latents and back, on random crops (it is convolutional)
    sd    text encoder and UNet together, v-prediction, on the latents
    vlm   Mllama's vision tower on what each patch shows, then the whole Mllama on lists of what is there and two kinds of
          question, without relations or places

Each saves itself every hundred steps and goes on from there when it is started again. What a step sees is a function of
its number alone, so a resumed run sees the same data. On a CPU all three take three or four hours; `vlm` does not need
the others and can run beside them.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

from lavender_min.data import CAPTION_PROMPT, Example
from lavender_min.toy import data, models, world

# Of the pretraining split.
SCENES = 20_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The kinds of examples that Mllama is trained on.
VLM_KINDS = ("caption", "color", "exists")
# What a patch may show, in the order of a Thing's fields.
KINDS_OF_PATCH = (world.SHAPES, tuple(world.COLORS), tuple(world.SIZES))
# Standard deviation of the scaled latents. Below 1 more of the picture is lost to noise, so the UNet needs the text.
LATENT_SPREAD = 0.7

LossOf = Callable[[np.random.Generator], Tensor]


def fit(name: str, module: nn.Module, loss_of: LossOf, steps: int, lr: float, out: Path) -> None:
    """AdamW, linear warm-up over 200 steps, cosine to zero; saved to `out/name.pt` every hundred steps.

    bf16 on a GPU only: a CPU is slower with it in the backward of convolutions (0.84 against 0.68 s a step of the UNet).
    """
    module.to(DEVICE).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * min(1, i / steps)))
    )
    parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "schedule": schedule}
    saved, start, seconds = out / f"{name}.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, map_location=DEVICE, weights_only=True)
        start, seconds = state["step"], state["seconds"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
    began, recent = time.time() - seconds, []
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5):
        rng = np.random.default_rng([step, 7])
        torch.manual_seed(step)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = loss_of(rng)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            tqdm.write(f"{name} step {step + 1}/{steps} loss {np.mean(recent):.4f} after {time.time() - began:.0f} s")
            recent = []
            state = {key: part.state_dict() for key, part in parts.items()}
            aside = saved.with_suffix(".tmp")
            torch.save(state | {"step": step + 1, "seconds": time.time() - began}, aside)
            aside.rename(saved)
    module.eval()


def pictures(out: Path) -> np.ndarray:
    """uint8 [scenes, side, side, 3], drawn once."""
    path = out / "pictures.npy"
    if not path.exists():
        side = data.SIDE
        store = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", np.uint8, (SCENES, side, side, 3))
        for i in tqdm(range(SCENES), desc="drawing", mininterval=5):
            store[i] = np.asarray(world.render(data.scene_of(i), side))
        store.flush()
        path.with_suffix(".tmp").rename(path)
    return np.load(path, mmap_mode="r")


def corpus() -> list[str]:
    """What the tokenizers are trained on: a few thousand lines of every kind of sentence."""
    texts = []
    for i in range(2000):
        scene, rng = data.scene_of(i), np.random.default_rng([i, 3])
        texts += [world.caption(scene, rng).text, world.relation(scene, rng).text]
        texts += [line.text for question_of in world.QUESTIONS.values() for line in question_of(scene, rng)]
    return texts


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
            padding="max_length", max_length=models.TEXT_LENGTH, truncation=True, return_tensors="pt",
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


# Tiles along a side of the toy pictures.
TILES = data.SIDE // models.TILE
See = Callable[[np.random.Generator], tuple[np.ndarray, Tensor]]


def sight_of(model, processor, images: np.ndarray, scenes: int) -> See:
    """A function that picks some scenes and runs the vision tower on them.

    It returns their numbers and the states of their patches, [scenes, tiles, CLS + patches + padding, d].
    """
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    # All toy pictures are of one size, so what the processor says of one holds for all.
    canvas = processor.image_processor(images=[data.example("pretrain-00000-caption").image()], return_tensors="pt")

    def see(rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        picked = np.sort(rng.choice(len(images), scenes, replace=False))
        tiles = rearrange(torch.from_numpy(images[picked]), "b (r y) (c x) k -> b 1 (r c) k y x", r=TILES, c=TILES)
        states = model.model.vision_model(
            pixel_values=((tiles.float() / 255 - mean) / std).to(DEVICE),
            aspect_ratio_ids=canvas["aspect_ratio_ids"].expand(scenes, -1).to(DEVICE),
            aspect_ratio_mask=canvas["aspect_ratio_mask"].expand(scenes, -1, -1).to(DEVICE),
        ).last_hidden_state
        return picked, states[:, 0]

    return see


def train_tower(model, see: See, out: Path, steps: int) -> None:
    """The vision tower alone: it learns what each patch shows (shape, colour and size, or background).

    It does so through three heads that are thrown away. Llama's vision tower came trained as well, on pictures with
    texts. Without this most steps of the training that follows go into finding out that pictures hold things.
    """
    width, side = model.config.vision_config.vision_output_dim, models.TILE // models.PATCH
    heads = nn.ModuleList(nn.Linear(width, 1 + len(kinds)) for kinds in KINDS_OF_PATCH)

    def loss_of(rng: np.random.Generator) -> Tensor:
        picked, states = see(rng)
        kinds = torch.from_numpy(np.stack([patch_kinds(data.scene_of(int(i)), TILES * side) for i in picked]))
        kinds = rearrange(kinds, "b k (r y) (c x) -> k (b r c y x)", r=TILES, c=TILES).to(DEVICE)
        patches = states[:, :, 1 : 1 + side * side].flatten(0, 2)
        losses = [
            nn.functional.cross_entropy(head(patches).float(), kind) for head, kind in zip(heads, kinds, strict=True)
        ]
        return torch.stack(losses).sum()

    fit("vlm_tower", nn.ModuleList([model.model.vision_model, heads]), loss_of, steps, 2e-3, out)


def train_vlm(
    model, processor, images: np.ndarray, out: Path, steps: tuple[int, int] = (1000, 3000), scenes: int = 32, texts=2
) -> None:
    """The vision tower first, alone, then everything, with `texts` sentences a picture, so that the tower runs once for all."""
    see = sight_of(model, processor, images, scenes)
    encoded = [
        encode(processor, [data.example(f"pretrain-{i:05d}-{kind}") for kind in VLM_KINDS])
        for i in tqdm(range(len(images)), desc="encoding texts", mininterval=5)
    ]

    def loss_of(rng: np.random.Generator) -> Tensor:
        picked, states = see(rng)
        states = model.model.multi_modal_projector(states).reshape(scenes, -1, model.config.text_config.hidden_size)
        lines = [encoded[i][k] for i in picked for k in rng.integers(0, len(VLM_KINDS), texts)]
        longest = max(len(ids) for ids, _ in lines)
        pad = processor.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in lines], device=DEVICE)
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in lines], device=DEVICE)
        logits = model(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            cross_attention_states=repeat(states, "b p c -> (b k) p c", k=texts),
            cross_attention_mask=torch.ones(len(lines), longest, 1, models.MAX_TILES, dtype=torch.long, device=DEVICE),
        ).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    train_tower(model, see, out, steps[0])
    # The gates start at tanh(0) = 0, and then no gradient reaches what comes from the picture.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
                parameter.fill_(0.5)
    fit("vlm", model, loss_of, steps[1], 1.5e-3, out)


def patch_kinds(scene: world.Scene, side: int) -> np.ndarray:
    """int64 [shape | colour | size, side, side]: which one the centre of each cell shows, 0 for the background."""
    masks = world.visible_masks(scene, side)
    return np.stack(
        [
            sum(mask * (1 + kinds.index(thing[k])) for mask, thing in zip(masks, scene.things, strict=True))
            for k, kinds in enumerate(KINDS_OF_PATCH)
        ]
    )


def encode(processor, examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    """(token ids, labels) of each example as a chat; only the answer and the end of the turn are labelled."""
    encoded = []
    for example in examples:
        prompt = [{"type": "image"}, {"type": "text", "text": example.question or CAPTION_PROMPT}]
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": example.answer}]
        chat = processor.apply_chat_template(turns)
        start = processor.apply_chat_template(turns[:1], add_generation_prompt=True)
        ids, known = (processor.tokenizer(t, add_special_tokens=False).input_ids for t in (chat, start))
        encoded.append((ids, [-100] * len(known) + ids[len(known) :]))
    return encoded


def as_pixels(images: np.ndarray) -> Tensor:
    """uint8 [b, y, x, 3] to floats in [-1, 1], [b, 3, y, x]."""
    pixels = rearrange(torch.from_numpy(np.ascontiguousarray(images)).to(DEVICE), "b y x c -> b c y x").float()
    return (pixels / 127.5 - 1).to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/toy_pretrain"), help="checkpoints and the finished models"
    )
    parser.add_argument("--only", choices=["vae", "sd", "vlm"], help="one training instead of all three")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = pictures(args.out)
    if args.only != "vlm":
        pipe = models.stable_diffusion(corpus(), args.out / "sd")
        for part in (pipe.vae, pipe.unet):
            part.to(memory_format=torch.channels_last)
        train_vae(pipe, images, args.out)
        if args.only != "vae":
            train_sd(pipe, images, args.out)
            pipe.to(torch.float16).save_pretrained(args.out / "sd")
    if args.only in (None, "vlm"):
        model, processor = models.mllama(corpus() + [CAPTION_PROMPT, "user", "assistant"] * 1000)
        train_vlm(model, processor, images, args.out)
        model.to(torch.float16).save_pretrained(args.out / "vlm")
        processor.save_pretrained(args.out / "vlm")
    print(f"done: {args.out}")


if __name__ == "__main__":
    main()
