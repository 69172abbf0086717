"""What the trainings of all toy models share: one loop that can be stopped at any time, the pictures, the sentences."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lavender_min.toy import data, world

# Of the pretraining split.
SCENES = 20_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Steps between checkpoints.
SAVE_EVERY = 100

LossOf = Callable[[np.random.Generator], Tensor]


def fit(name: str, module: nn.Module, loss_of: LossOf, steps: int, lr: float, out: Path) -> None:
    """AdamW, linear warm-up over 200 steps, cosine to zero; saved to `out/name.pt` every SAVE_EVERY steps.

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
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
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
