"""What a frozen vision tower says of a picture is the same every epoch: with `--cache_vision` it is asked once.

One safetensors file a picture holds its states after the projector, [tiles, p_tile, c], in the precision the host computes
in: for Llama 3.2 in bfloat16 4 · 1601 · 4096 numbers, 52 MB. They lie on disk, since 1,000 pictures already are 52 GB, and
the collator reads a batch's when it is due; the language model then gets `cross_attention_states` in place of pixels,
inside the root forward as always. Files are named by the pixels of their picture, so captions of one picture share one.
"""

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor


class VisionCache:
    """A folder of picture states."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, picture: Image.Image) -> Path:
        return self.folder / f"{sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:32]}.safetensors"

    def read(self, pictures: list[Image.Image]) -> Float[Tensor, "b_tiles p_tile c"]:
        states = torch.stack([load_file(self.path(picture))["states"] for picture in pictures])
        return rearrange(states, "b tiles p c -> (b tiles) p c")

    def write(self, picture: Image.Image, states: Float[Tensor, "tiles p_tile c"]) -> None:
        aside = self.path(picture).with_suffix(f".{os.getpid()}")
        save_file({"states": states.contiguous().cpu()}, aside)
        aside.rename(self.path(picture))  # so that a killed run leaves no half file under a whole one's name


@torch.no_grad()
def cache_vision(trainer: Any, folder: Path) -> None:
    """Fills the cache with the pictures of a LavenderTrainer not there yet, each process its share, and hands it to the collator.

    Before the Trainer wraps the model: the tower of a sharded one can only run inside the root forward. Raises ValueError if
    the tower trains, OSError if the disk is too small.
    """
    collate, host, dataset = trainer.data_collator, trainer.lavender.host, trainer.train_dataset
    tower = collate.host.vision(host)
    train = sum(p.numel() for module in tower for p in module.parameters() if p.requires_grad)
    if train:
        raise ValueError(
            f"--cache_vision keeps what a frozen vision tower says, but {train:,} parameters of it and its projector train "
            "(--full, or --lora_targets of your own): leave out one of the two"
        )
    if trainer.is_fsdp_enabled:  # the host still waits on the CPU
        for module in tower:
            module.to(trainer.args.device)
    folder.mkdir(parents=True, exist_ok=True)
    cache, told = VisionCache(folder), False
    for i in range(trainer.args.process_index, len(dataset), trainer.args.world_size):
        picture = dataset.examples[i].image()
        if cache.path(picture).exists():
            continue
        inputs = collate.processor.image_processor(images=[[picture]], return_tensors="pt")
        with trainer.accelerator.autocast():
            states = collate.host.picture_states(host, inputs.to(trainer.args.device))[0]
        if not told:
            need, free = states.nbytes * (len(dataset) - i), shutil.disk_usage(folder).free
            print(f"vision states: {states.nbytes / 1e6:.1f} MB a picture, up to {need / 1e9:.1f} GB in {folder}")
            if need > free:
                raise OSError(
                    f"--cache_vision needs {need / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free"
                )
            told = True
        cache.write(picture, states)
    trainer.accelerator.wait_for_everyone()
    collate.vision = cache
