"""The recipes: how a picture is noised, and how often the UNet is asked about it while its attention is recorded.

A recipe is a function of the latents and texts of r rows. It runs passes of the UNet, the interesting ones inside
`with recording(…)`, and returns nothing: the maps are in the recorder.

    paper       5 steps of DDIM inversion, then recorded over 10 steps of denoising. The paper's words: "we limit
                inversion to 5 steps and diffusion to 10 steps"
    null-text   the other reading of these words: null-text inversion (Mokady et al. 2022, arXiv 2211.09794), which the
                paper cites: 10 steps, each with 5 small steps that keep guided denoising on the picture's path
    invert      recorded over the inversion alone
    noise       recorded over plainly noised copies, all in one pass

Except in `null-text` only the conditional branch is run: guidance doubles the cost, and its other half never sees the
words. Latents stay fp32 between passes, and time steps on the CPU.

Shapes: r rows; l tokens; c text channels; latents [r, 4, y, x]. All rows are independent of each other.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from lavender_min.teachers.recording import recording
from lavender_min.teachers.stable_diffusion import StableDiffusion, ask

# Both schedules are spaced from the end, so that inversion stops at the very time step (999) where denoising starts;
# with Stable Diffusion's own spacing it would stop at 801 and denoising start at 901.
DDIM = {"timestep_spacing": "trailing", "clip_sample": False}


def paper(sd, latents, text, recorder, ids, *, inversion_steps: int, denoising_steps: int) -> None:
    """Noise the picture by DDIM inversion, then record while it is denoised again."""
    latents = inverted(sd, latents, text, inversion_steps)[-1]
    down = denoising(sd, denoising_steps)
    with recording(sd.unet, recorder):
        for t in down.timesteps:
            latents = down.step(ask(sd, latents, t, text), t, latents).prev_sample


def invert(sd, latents, text, recorder, ids, *, inversion_steps: int) -> None:
    """Record during the inversion alone: a third of the paper's passes, and no drift away from the picture."""
    with recording(sd.unet, recorder):
        inverted(sd, latents, text, inversion_steps)


def noise(sd, latents, text, recorder, ids, *, timesteps: Sequence[int], draws: int, seed: int) -> None:
    """`draws` noisy copies of the picture at each time step, all in one pass. Cheap.

    The noise of a picture depends on its id alone, not on what else is in the batch, nor on a run's interruptions.
    """
    scheduler = DDIMScheduler.from_config(sd.noise_schedule)
    n = len(timesteps) * draws
    eps = torch.stack([seeded_noise(f"{seed} {id}", (n, *latents.shape[1:])) for id in ids], 1).to(latents)
    latents, text = (repeat(x, "r ... -> (n r) ...", n=n) for x in (latents, text))
    t = repeat(torch.tensor(timesteps, device=latents.device), "s -> (s m)", m=draws * len(ids))
    with recording(sd.unet, recorder):
        ask(sd, scheduler.add_noise(latents, rearrange(eps, "n r ... -> (n r) ..."), t), t, text)


def null_text(sd, latents, text, recorder, ids, *, steps: int, inner_steps: int, guidance: float) -> None:
    """Guided denoising along the picture's own path, recorded in the conditional branch.

    Guidance, eps = eps_null + guidance · (eps_text − eps_null), would leave the path that inversion found. So before
    each step the embedding of the empty text is trained, for each row alone, until the step ends where the path does.
    Learning rate and early stop are those of the authors' code (google/prompt-to-prompt, null_text_w_ptp.ipynb).

    Guidance may be taken on velocities as on noise: one is an affine function of the other, whose offset cancels.
    """
    path = inverted(sd, latents, text, steps)
    down, latents = denoising(sd, steps), path[-1]
    empty = sd.tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(latents.device)
    null = repeat(sd.text_encoder(empty)[0].float(), "1 l c -> r l c", r=len(latents))
    for i, t in enumerate(down.timesteps):
        with recording(sd.unet, recorder):
            conditional = ask(sd, latents, t, text)
        if i < steps - 1:  # nothing is asked after the last step
            step = partial(guided_step, sd, down, latents, t, conditional, guidance)
            null = trained(
                null, step, path[steps - 1 - i], inner_steps, lr=1e-2 * (1 - i / 100), enough=1e-5 + i * 2e-5
            )
            latents = step(null)


def guided_step(sd, down, latents, t, conditional, guidance: float, null: Float[Tensor, "r l c"]) -> Tensor:
    """Where guided denoising goes from here with this embedding of the empty text."""
    unconditional = ask(sd, latents, t, null)
    return down.step(unconditional + guidance * (conditional - unconditional), t, latents).prev_sample


def trained(
    null: Float[Tensor, "r l c"], step: Callable[[Tensor], Tensor], goal: Tensor, inner_steps: int, lr: float, enough: float
) -> Float[Tensor, "r l c"]:  # fmt: skip
    """A few steps of Adam on the mean squared distance between `step(null)` and `goal`; a row that is near enough stops."""
    null = null.clone().requires_grad_()
    adam, going = torch.optim.Adam([null], lr), torch.ones(len(null), dtype=torch.bool, device=null.device)
    for _ in range(inner_steps):
        with torch.enable_grad():
            error = step(null) - goal
            # The gradient of the sum, divided afterwards: the mean's would be lost among the smallest numbers of fp16.
            null.grad = torch.autograd.grad(error.square().sum(), null)[0] / error[0].numel()
        before = null.detach().clone()
        adam.step()
        null.data = torch.where(rearrange(going, "r -> r 1 1"), null.data, before)
        going &= error.detach().square().mean((1, 2, 3)) >= enough
        if not going.any():
            break
    return null.detach()


def denoising(sd: StableDiffusion, steps: int) -> Any:
    down: Any = DDIMScheduler.from_config(sd.noise_schedule, **DDIM)
    down.set_timesteps(steps)
    return down


def inverted(sd: StableDiffusion, latents: Tensor, text: Tensor, steps: int) -> list[Float[Tensor, "r c y x"]]:
    """From the picture, step by step, to the noise from which DDIM would make it: its steps, taken backwards."""
    # An inverse step pairs the UNet's answer at t with a picture still at the step before. The scheduler can do so with
    # a predicted noise, but not with a predicted velocity, whose meaning depends on t: turn that into noise here.
    up = DDIMInverseScheduler.from_config(sd.noise_schedule, **DDIM, prediction_type="epsilon")
    up.set_timesteps(steps)
    path = [latents]
    for t in up.timesteps:
        eps = ask(sd, path[-1], t, text)
        if sd.noise_schedule.get("prediction_type") == "v_prediction":
            kept = up.alphas_cumprod[t]
            eps = kept.sqrt() * eps + (1 - kept).sqrt() * path[-1]
        path.append(up.step(eps, t, path[-1]).prev_sample)
    return path


def seeded_noise(name: str, shape: Sequence[int]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recipe(NamedTuple):
    """`run(sd, latents [r, 4, y, x], text [r, l, c], recorder, ids [r], **settings)`."""

    run: Callable[..., None]
    settings: dict[str, Any]
    passes: Callable[[dict[str, Any]], int]  # UNet passes a picture, at most; one back through it counts as one


RECIPES = {
    "paper": Recipe(paper, {"inversion_steps": 5, "denoising_steps": 10}, lambda s: sum(s.values())),
    "null-text": Recipe(
        null_text,
        {"steps": 10, "inner_steps": 5, "guidance": 7.5},
        lambda s: 2 * s["steps"] + (s["steps"] - 1) * (2 * s["inner_steps"] + 1),
    ),
    "invert": Recipe(invert, {"inversion_steps": 5}, lambda s: sum(s.values())),
    "noise": Recipe(
        noise, {"timesteps": [51, 151, 301], "draws": 1, "seed": 0}, lambda s: len(s["timesteps"]) * s["draws"]
    ),
}
