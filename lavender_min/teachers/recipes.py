"""The recipes: how a picture is noised, and in which passes of the UNet its attention is recorded. Names and settings: RECIPES.

A recipe is a function of the model, of what the UNet is run on (`Inputs`), and of a recorder. It runs passes of the UNet, some
of them inside `with recording(…)`. It returns nothing, as the maps are in the recorder then.

Only `null_text` runs the unconditional branch too: guidance doubles the cost, and the branch without text never sees the
words. Latents stay fp32 between passes.

Shapes in this file: r windows of text, each with its picture, all independent of each other; t tokens of a window; e channels
of a token; latents [r, c, y, x], c = 4; s time steps; m copies of a window.
"""

import hashlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from lavender_min.teachers import Recipe
from lavender_min.teachers.recording import Recorder, recording
from lavender_min.teachers.stable_diffusion import StableDiffusion, predict

# Both schedules are spaced from the end, so that inversion stops at the very time step (999) where denoising starts;
# with Stable Diffusion's own spacing it would stop at 801 and denoising start at 901.
DDIM: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False}


class Inputs(NamedTuple):
    """What the UNet is run on: r windows of text, each with the picture it belongs to."""

    # The pictures, encoded by the VAE and scaled; fp32.
    latents: Float[Tensor, "r c y x"]

    # The tokens, encoded by the text encoder.
    text: Float[Tensor, "r t e"]

    # The pictures' ids, on which `noise` depends.
    ids: Sequence[str]


def run(recipe: Recipe, sd: StableDiffusion, inputs: Inputs, recorder: Recorder) -> None:
    """Run a recipe; the maps are in the recorder afterwards."""
    pkgutil.resolve_name(recipe.function)(sd, inputs, recorder, **recipe.settings)


def paper(
    sd: StableDiffusion, inputs: Inputs, recorder: Recorder, *, inversion_steps: int, denoising_steps: int
) -> None:
    """Noise the picture by DDIM inversion, then record while it is denoised again.

    In the paper's words: "we limit inversion to 5 steps and diffusion to 10 steps". `null_text` is the other reading of them.
    """
    latents = inverted(sd, inputs.latents, inputs.text, inversion_steps)[-1]
    down = denoising(sd, denoising_steps)
    with recording(sd.unet, recorder):
        for timestep in down.timesteps:
            latents = down.step(predict(sd, latents, timestep, inputs.text), timestep, latents).prev_sample


def invert(sd: StableDiffusion, inputs: Inputs, recorder: Recorder, *, inversion_steps: int) -> None:
    """Record during the inversion alone: a third of the paper's passes, and no drift away from the picture."""
    with recording(sd.unet, recorder):
        inverted(sd, inputs.latents, inputs.text, inversion_steps)


def noise(
    sd: StableDiffusion, inputs: Inputs, recorder: Recorder, *, timesteps: Sequence[int], draws: int, seed: int
) -> None:
    """`draws` noisy copies of the picture at each time step, all in one pass. Cheap.

    The noise of a picture depends on its id alone, not on what else is in the batch, nor on a run's interruptions.
    """
    latents, text, ids = inputs
    scheduler: Any = DDIMScheduler.from_config(sd.noise_schedule)
    copies = len(timesteps) * draws
    eps = torch.stack([seeded_noise(f"{seed} {id}", (copies, *latents.shape[1:])) for id in ids], 1).to(latents)
    eps = rearrange(eps, "m r ... -> (m r) ...")
    latents, text = (repeat(x, "r ... -> (m r) ...", m=copies) for x in (latents, text))
    timestep = repeat(torch.tensor(timesteps, device=latents.device), "s -> (s dr)", dr=draws * len(ids))
    with recording(sd.unet, recorder):
        predict(sd, scheduler.add_noise(latents, eps, timestep), timestep, text)


def null_text(
    sd: StableDiffusion, inputs: Inputs, recorder: Recorder, *, steps: int, inner_steps: int, guidance: float
) -> None:
    """Null-text inversion (Mokady et al. 2022, arXiv 2211.09794), which the paper cites: guided denoising along the picture's
    own path, recorded in the conditional branch.

    Guidance, eps = eps_null + guidance · (eps_text − eps_null), would leave the path that inversion found. So before
    each step the embedding of the empty text is trained for `inner_steps`, for each window alone, until the step ends where
    the path does. Learning rate and early stop are those of the authors' code (google/prompt-to-prompt,
    null_text_w_ptp.ipynb).

    Guidance may be taken on velocities as on noise: one is an affine function of the other, whose offset cancels.
    """
    path = inverted(sd, inputs.latents, inputs.text, steps)
    down, latents = denoising(sd, steps), path[-1]
    empty = sd.tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(latents.device)
    null = repeat(sd.text_encoder(empty)[0].float(), "1 t e -> r t e", r=len(latents))
    for i, timestep in enumerate(down.timesteps):
        with recording(sd.unet, recorder):
            conditional = predict(sd, latents, timestep, inputs.text)
        # Where the last step would lead is of no interest.
        if i < steps - 1:
            step = partial(guided_step, sd, down, latents, timestep, conditional, guidance)
            lr, enough = 1e-2 * (1 - i / 100), 1e-5 + i * 2e-5
            null = trained(null, step, path[steps - 1 - i], inner_steps, lr=lr, enough=enough)
            latents = step(null)


def guided_step(
    sd: StableDiffusion, down: Any, latents: Float[Tensor, "r c y x"], timestep: Tensor,
    conditional: Float[Tensor, "r c y x"], guidance: float, null: Float[Tensor, "r t e"],
) -> Float[Tensor, "r c y x"]:  # fmt: skip
    """Where guided denoising goes from here with this embedding of the empty text."""
    unconditional = predict(sd, latents, timestep, null)
    return down.step(unconditional + guidance * (conditional - unconditional), timestep, latents).prev_sample


def trained(
    null: Float[Tensor, "r t e"],
    step: Callable[[Float[Tensor, "r t e"]], Float[Tensor, "r c y x"]],
    goal: Float[Tensor, "r c y x"],
    inner_steps: int,
    lr: float,
    enough: float,
) -> Float[Tensor, "r t e"]:
    """Adam on the mean squared distance between `step(null)` and `goal`: at most `inner_steps`.

    Each window stops by itself: the step that finds its distance below `enough` is its last.
    """
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
    """A DDIMScheduler that leads from pure noise to the picture in so many steps."""
    down: Any = DDIMScheduler.from_config(sd.noise_schedule, **DDIM)
    down.set_timesteps(steps)
    return down


def inverted(
    sd: StableDiffusion, latents: Float[Tensor, "r c y x"], text: Float[Tensor, "r t e"], steps: int
) -> list[Float[Tensor, "r c y x"]]:
    """From the picture, step by step, to the noise from which DDIM would make it: its steps, taken backwards."""
    # An inverse step takes the prediction at a time step for a picture that is still at the step before. The scheduler can do
    # so with a predicted noise, but not with a predicted velocity, whose meaning depends on the step: turn that into noise.
    up: Any = DDIMInverseScheduler.from_config(sd.noise_schedule, **DDIM, prediction_type="epsilon")
    up.set_timesteps(steps)
    path = [latents]
    for timestep in up.timesteps:
        eps = predict(sd, path[-1], timestep, text)
        if sd.noise_schedule.get("prediction_type") == "v_prediction":
            kept = up.alphas_cumprod[timestep]
            eps = kept.sqrt() * eps + (1 - kept).sqrt() * path[-1]
        path.append(up.step(eps, timestep, path[-1]).prev_sample)
    return path


def seeded_noise(name: str, shape: Sequence[int]) -> Float[Tensor, "m c y x"]:
    """Noise that depends on a name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
