"""Stage 1 with Stable Diffusion v1.4 at full size, random weights, fp16, 512 px: how many pictures a second become word maps.

Each recipe at the batch that fits the memory, plain and with torch.compile: how much of the time is the UNet's, and which share of
a large matrix product's speed is reached (`of_matmul`: the flops of all UNet passes over the whole time). Then one pass of the
UNet not recorded, recorded by us, and recorded in the way of two public projects: time, and memory beyond the weights.
"""

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import DEVICE, extra_peak_mib, milliseconds
from torch.utils.flop_counter import FlopCounterMode

from gpu.peers import AttentionMapDiffusers, Daam
from gpu.record import Record, ceilings
from lavender_min.teachers import Recipe, attention_maps, find_recipe, stable_diffusion
from lavender_min.teachers.recording import Recorder, recording
from lavender_min.teachers.stable_diffusion import StableDiffusion

# any ids will do
TOKENIZER = Path(stable_diffusion.__file__).parents[1] / "toy/models/sd/tokenizer"
CAPTION, TINY_CAPTION = ({"answer": text} for text in ("a red circle is left of a blue square", "a red dog"))
# pictures at once to try first; null-text has 119 passes
MOST = {"paper": 64, "noise": 64, "invert": 64, "null-text": 16}
TINY_STEPS: dict[str, dict[str, int]] = {
    "paper": {"inversion_steps": 1, "denoising_steps": 1},
    "invert": {"inversion_steps": 1},
    "null-text": {"steps": 2, "inner_steps": 1},
}
# v1.4's configs, where they differ from the defaults of their classes.
UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408,
    "projection_dim": 768, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1,
}  # fmt: skip
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip


class Setup(NamedTuple):
    sd: StableDiffusion
    caption: dict[str, str]
    steps: dict[str, dict[str, int]]  # recipe ─► what differs from its settings
    flops: float  # of one picture's pass
    most: float  # TFLOP/s of a large matrix product


def full_size() -> StableDiffusion:
    """As `stable_diffusion.load` leaves it, without a folder to load from."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.device(DEVICE):
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT))
        vae, unet = AutoencoderKL(**VAE), UNet2DConditionModel(**UNET)
    for part in (text_encoder, vae, unet):
        part.to(torch.float16).eval().requires_grad_(False)
    for part in (vae, unet):
        part.to(memory_format=torch.channels_last)
    vae.enable_slicing()
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    return StableDiffusion(tokenizer, text_encoder, vae, unet, SCHEDULE)


def small() -> StableDiffusion:
    from tiny_sd import build_tiny_sd

    with tempfile.TemporaryDirectory() as folder:
        return stable_diffusion.load(str(build_tiny_sd(Path(folder))))


def run(record: Record) -> None:
    torch.manual_seed(0)
    sd = small() if record.tiny else full_size()
    flops, most = pass_flops(sd), ceilings(record.tiny, sd.unet.dtype)["matmul_tflops"]
    setup = Setup(sd, TINY_CAPTION, TINY_STEPS, flops, most) if record.tiny else Setup(sd, CAPTION, {}, flops, most)
    size = sum(parameter.numel() for parameter in sd.unet.parameters())
    record.add("UNet", parameters=size, gflops_a_pass=flops / 1e9, matmul_tflops=most)
    for recipe, pictures in MOST.items():
        with record.trying(recipe):
            tried = 1 if record.tiny else pictures
            batch = stable_diffusion.fitting_batch(lambda n, recipe=recipe: make_maps(setup, recipe, n), tried)
            record.add(recipe, **rate(setup, recipe, batch))
    for way in ("not recorded", "ours", "DAAM", "attention-map-diffusers"):
        with record.trying(way):
            record.add(f"one pass, {way}", **one_pass(sd, way, 1 if record.tiny else 8))
    # Last, because compiling takes most of a minute each time.
    for recipe in ("noise",) if record.tiny else ("noise", "paper", "invert"):
        name = f"{recipe}, compiled"
        if recipe not in record.numbers or (record.left() < 60 and not record.tiny):
            record.add(name, skipped="no time left, or no batch that fits")
            continue
        with record.trying(name):
            # On a CPU without making code, which takes longer there than everything else.
            how = {"backend": "eager"} if record.tiny else {}
            record.add(name, **compiled_rate(setup, recipe, record.numbers[recipe]["batch"], how))


def make_maps(setup: Setup, name: str, pictures: int) -> dict[str, float]:
    """The maps of a batch, made and thrown away; the seconds of each phase."""
    sd, recipe = setup.sd, recipe_of(setup, name)
    pixels = torch.rand(pictures, 3, sd.side, sd.side) * 2 - 1
    ids = [str(i) for i in range(pictures)]
    recorded = attention_maps.record(sd, pixels, [setup.caption] * pictures, ids, recipe)
    attention_maps.combine(recorded, recipe)
    return recorded.seconds


def recipe_of(setup: Setup, name: str) -> Recipe:
    return find_recipe(name, **setup.steps.get(name, {}))


def rate(setup: Setup, name: str, batch: int) -> dict[str, Any]:
    """One batch, after one that warmed up (the trial of what fits)."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    phases = make_maps(setup, name, batch)
    seconds = time.perf_counter() - began
    recipe = recipe_of(setup, name)
    tflops = recipe.passes(recipe.settings) * batch * setup.flops / seconds / 1e12
    return {
        "batch": batch, "pictures_per_second": batch / seconds, "unet_share": phases["UNet"] / seconds,
        "tflops": tflops, "of_matmul": tflops / setup.most,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0,
    }  # fmt: skip


def compiled_rate(setup: Setup, recipe: str, batch: int, how: dict[str, Any]) -> dict[str, Any]:
    """As `extract.py --compile` does it, for this recipe alone."""
    torch._dynamo.reset()
    setup.sd.unet.compile(**how)
    try:
        began = time.perf_counter()
        make_maps(setup, recipe, batch)
        seconds = time.perf_counter() - began
        return rate(setup, recipe, batch) | {"compile_seconds": seconds}
    finally:
        # as it was before `compile`
        setup.sd.unet._compiled_call_impl = None


def unet_pass(sd: StableDiffusion, pictures: int) -> Callable[[], torch.Tensor]:
    """One pass of the UNet, always on the same numbers."""
    config = sd.unet.config
    latents = torch.randn(pictures, config.in_channels, *[config.sample_size] * 2, device=DEVICE)
    text = torch.randn(pictures, sd.tokenizer.model_max_length, config.cross_attention_dim, device=DEVICE)
    return torch.no_grad()(lambda: stable_diffusion.predict(sd, latents, torch.tensor(500), text))


def pass_flops(sd: StableDiffusion) -> float:
    """Of one picture, by what PyTorch counts of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        unet_pass(sd, 1)()
    return counter.get_total_flops()


def one_pass(sd: StableDiffusion, way: str, pictures: int) -> dict[str, Any]:
    plain = unet_pass(sd, pictures)
    weights = torch.zeros(pictures, sd.tokenizer.model_max_length, 13, device=DEVICE)
    # SOS and twelve words of one token
    weights[:, range(13), range(13)] = 1

    def call():
        with recorded(sd, way, weights):
            return plain()

    return {"pictures": pictures, "ms": milliseconds(call), "extra_mib": extra_peak_mib(call)}


@contextlib.contextmanager
def recorded(sd: StableDiffusion, way: str, weights: torch.Tensor) -> Iterator[None]:
    """One of the ways around a pass; afterwards the UNet is as it was. Maps are dropped after the pass."""
    if way == "ours":
        with recording(sd.unet, Recorder(weights, sd.map_sides)):
            yield
        return
    kind = {"not recorded": None, "DAAM": Daam, "attention-map-diffusers": AttentionMapDiffusers}[way]
    layers = {name: (layer, layer.processor) for name, layer in sd.unet.named_modules() if name.endswith("attn2")}
    maps: dict[Any, Any] = defaultdict(float)
    for name, (layer, _) in layers.items():
        if kind is not None:
            layer.set_processor(kind(name, maps))
    try:
        yield
    finally:
        for layer, original in layers.values():
            layer.set_processor(original)
