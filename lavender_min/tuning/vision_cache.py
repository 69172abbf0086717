"""What a frozen vision tower makes of a picture is the same every epoch: with `--cache_vision` it is computed once.

One safetensors file a picture holds what `Family.picture_states` gives, in the precision the host computes in: for Llama 3.2
[4 tiles, 1601, 4096] in bfloat16, 52 MB. They lie on disk, since 1,000 pictures already are 52 GB, and the collator reads a
batch's when it is due; the text model then gets them in place of pixels, inside the root forward as always. Files are named
by the pixels of their picture, so captions of one picture share one.
"""

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import ConcatDataset


class VisionCache:
    """A folder of picture states."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, picture: Image.Image) -> Path:
        return self.folder / f"{sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:32]}.safetensors"

    def read(self, picture: Image.Image) -> dict[str, Tensor]:
        return load_file(self.path(picture))

    def write(self, picture: Image.Image, states: dict[str, Tensor]) -> None:
        """Written aside and renamed, so that a killed run leaves no half file under a whole one's name."""
        aside = self.path(picture).with_suffix(f".{os.getpid()}")
        save_file({name: state.contiguous().cpu() for name, state in states.items()}, aside)
        aside.rename(self.path(picture))


@torch.no_grad()
def cache_vision(trainer: Any, folder: Path) -> None:
    """Fills the cache with a LavenderTrainer's pictures, those held out too, as far as they are not there yet, each process its
    share; and hands it to the collator.

    Before the Trainer wraps the model: the tower of a sharded one can only run inside the root forward. Raises ValueError if
    the tower trains, OSError if the disk is too small.
    """
    collate, host = trainer.data_collator, trainer.lavender.base
    parts = trainer.train_dataset, trainer.eval_dataset
    dataset: ConcatDataset[Any] = ConcatDataset([part for part in parts if part is not None])
    tower = collate.family.vision(host)
    train = sum(p.numel() for module in tower for p in module.parameters() if p.requires_grad)
    if train:
        raise ValueError(
            f"--cache_vision keeps what a frozen vision tower says, but {train:,} parameters of it and its projector train "
            "(--full, or --lora_targets of your own): leave out one of the two"
        )
    if trainer.is_fsdp_enabled:
        # The host still waits on the CPU.
        for module in tower:
            module.to(trainer.args.device)
    folder.mkdir(parents=True, exist_ok=True)
    cache, told = VisionCache(folder), False
    for i in range(trainer.args.process_index, len(dataset), trainer.args.world_size):
        example = dataset[i]
        picture = example[0].image()
        if cache.path(picture).exists():
            continue
        # A whole text: processors have settings of their own for a picture in a text.
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(trainer.args.device), collate([example]))
        with trainer.accelerator.autocast():
            states = collate.family.picture_states(host, inputs)[0]
        if not told:
            one = sum(state.nbytes for state in states.values())
            need, free = one * (len(dataset) - i), shutil.disk_usage(folder).free
            print(f"vision states: {one / 1e6:.1f} MB a picture, up to {need / 1e9:.1f} GB in {folder}")
            if need > free:
                raise OSError(
                    f"--cache_vision needs {need / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free"
                )
            told = True
        cache.write(picture, states)
    trainer.accelerator.wait_for_everyone()
    collate.vision = cache
