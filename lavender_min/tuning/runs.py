"""A run of `train.py`: its flags, the model they make, and the folder it leaves.

`lavender.json` in the folder remembers the flags, so evaluation can build the same model, and a run that is started again
with other flags is refused rather than mixed with the first.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lavender_min.align.aligner import Align
from lavender_min.hosts.load import Host, load
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import Lavender

ALIGN_FILE = "lavender.safetensors"
FLAGS_FILE = "lavender.json"


def build(
    flags: ModelFlags,
    dtype: torch.dtype = torch.float32,
    trained: str | Path | None = None,
    loaded: Host | None = None,
) -> tuple[Lavender, Any]:
    """(Lavender, processor) for a new run, or with the weights of the run in the folder `trained`.

    `loaded` stands in for a host that does not come from a folder.
    """
    name = str(trained) if trained and flags.mode == "full" else flags.vlm
    host, processor, family = loaded or load(name, quantize=flags.mode == "qlora", dtype=dtype)
    attentions = family.layers(host)
    host.requires_grad_(flags.mode == "full")
    align = None
    if not flags.plain:
        # A projection that trains is no base for a correction.
        rank = 0 if flags.mode == "full" else flags.parallel_rank
        heads = family.heads(next(iter(attentions.values()))).query
        shape = {"variant": flags.aligner, "kernel": flags.aligner_kernel, "norm": flags.aligner_norm}
        # The adapters below start the same with and without alignment.
        with torch.random.fork_rng():
            align = Align(attentions, heads, flags.aggregate, rank, **shape).to(host.device)
    if flags.mode != "full" and trained:
        host = PeftModel.from_pretrained(host, str(trained))
    elif flags.mode != "full":
        config = LoraConfig(
            r=flags.lora_r,
            lora_alpha=flags.lora_alpha,
            lora_dropout=flags.lora_dropout,
            target_modules=family.lora_targets.get(flags.lora_targets, flags.lora_targets),
            task_type="CAUSAL_LM",
        )
        host = get_peft_model(host, config)
    model = Lavender(host, family, align, flags.lambda_att, flags.match)
    if trained and align is not None:
        load_align(model, trained)
    return model, processor


def load_align(model: Lavender, folder: str | Path) -> None:
    """Reads `lavender.safetensors` of a checkpoint back into a model that was built with the same flags."""
    path = Path(folder) / ALIGN_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: was this checkpoint made without alignment (--plain)?")
    assert model.align is not None
    model.align.load_state_dict(load_file(path))


def remember(flags: ModelFlags, folder: Path) -> None:
    """Writes the flags beside the weights; a folder that holds a run with others is an error, not an overwrite."""
    path = folder / FLAGS_FILE
    if path.exists():
        before, now = json.loads(path.read_text()), asdict(flags)
        changed = [f"--{key} {before.get(key)} ─► {now[key]}" for key in now if before.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other flags ({', '.join(changed)}): take another --output_dir, or delete it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(flags), indent=2) + "\n")


def recall(folder: str | Path) -> ModelFlags:
    """The flags of a finished run."""
    path = Path(folder) / FLAGS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} is not the --output_dir of a run of train.py")
    return ModelFlags(**json.loads(path.read_text()))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint. A run killed while it saved leaves one without its last file, trainer_state.json."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            whole.append((json.loads((path / "trainer_state.json").read_text())["global_step"], str(path)))
        except (OSError, ValueError):
            continue
    return max(whole)[1] if whole else None
