"""A run of `train.py`: its flags, the model they make, and the folder it leaves.

`lavender.json` in the folder remembers the flags, so evaluation can build the same model, and what else decides the result, so a
run that is started again with other flags, data or maps is refused rather than mixed with the first.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lavender_min.align.aligner import Align
from lavender_min.failing import naming, read_json, shaped
from lavender_min.hosts.base import Family
from lavender_min.hosts.load import Host, load
from lavender_min.tuning import grammar
from lavender_min.tuning.flags import COMPONENTS, ModelFlags
from lavender_min.tuning.model import Lavender, read_layers

ALIGN_FILE = "lavender.safetensors"
FLAGS_FILE = "lavender.json"
# Its entry for what decides a run beside `ModelFlags`.
DECIDES = "decides"
ADVICE = "it is not as train.py wrote it: delete the folder, or take another"


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
    family = family.with_latents(flags.latents)
    attentions = read_layers(family, host, flags.align_layers)
    host.requires_grad_(flags.mode == "full")
    if flags.train_only:
        freeze_others(host, family, flags.train_only)
    align = None
    if not flags.plain:
        # A projection that trains is no base for a correction.
        rank = 0 if flags.mode == "full" else flags.parallel_rank
        heads = family.heads(next(iter(attentions.values()))).query
        shape = {"variant": flags.aligner, "kernel": flags.aligner_kernel, "norm": flags.aligner_norm}
        # The adapters below start the same with and without alignment.
        with torch.random.fork_rng():
            align = Align(attentions, heads, flags.aggregate, rank, flags.parallel_start, **shape).to(host.device)
    if flags.mode != "full" and trained:
        with naming(trained):
            host = PeftModel.from_pretrained(host, str(trained))
    elif flags.mode != "full":
        host = with_adapters(host, family, flags)
    match = grammar.same_root(processor) if flags.match == "root" else flags.match
    model = Lavender(host, family, align, flags.lambda_att, match, flags.align_layers)
    if trained and align is not None:
        load_align(model, trained)
    return model, processor


def with_adapters(host: Any, family: Family, flags: ModelFlags) -> Any:
    """The host with new LoRA adapters. Raises ValueError if --lora_targets names what cannot have one."""
    targets = family.lora_targets.get(flags.lora_targets, flags.lora_targets)
    named = {name: module for name, module in host.named_modules() if re.fullmatch(targets, name)}
    if not named:
        raise ValueError(f"--lora_targets {flags.lora_targets} names no module of {flags.vlm}")
    for name, module in named.items():
        if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            raise ValueError(
                f"--lora_targets {flags.lora_targets} names {name or 'the whole host'}, a {type(module).__name__}; "
                "adapters go to linear layers, for instance .*q_proj"
            )
    config = LoraConfig(
        r=flags.lora_r,
        lora_alpha=flags.lora_alpha,
        lora_dropout=flags.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(host, config)


def freeze_others(host: Any, family: Family, wanted: str) -> None:
    """Freezes what `wanted` (--train_only) does not name. Raises ValueError if it names nothing of the host."""
    *tower, projector = family.vision(host)
    # The projector may be a part of the tower; what is neither is the language model's.
    component = {parameter: "language" for parameter in host.parameters()}
    component |= {parameter: "vision" for module in tower for parameter in module.parameters()}
    component |= {parameter: "projector" for parameter in projector.parameters()}
    names = wanted.split(",")
    by_component = set(names) <= set(COMPONENTS)
    trained = False
    for name, parameter in host.named_parameters():
        chosen = component[parameter] in names if by_component else bool(re.fullmatch(wanted, name))
        parameter.requires_grad_(chosen)
        trained |= chosen
    if not trained:
        raise ValueError(
            f"--train_only {wanted} names no parameter of the host, and is none of {', '.join(COMPONENTS)}"
        )


def load_align(model: Lavender, folder: str | Path) -> None:
    """Reads `lavender.safetensors` of a checkpoint back into a model that was built with the same flags."""
    path = Path(folder) / ALIGN_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: was this checkpoint made without alignment (--plain)?")
    assert model.align is not None
    with naming(path):
        held = load_file(path)
        model.align.load_state_dict(held)
        for name, tensor in held.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds what is no finite number; {ADVICE}")


def load_whole(host: Any, folder: str | Path) -> None:
    """Reads every weight of a checkpoint of --full back into the host.

    Many families name their weights in files otherwise than in the model, and only `from_pretrained` knows both names.
    """
    loaded, found = type(host).from_pretrained(folder, dtype=host.dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of the host's weights, the first {missing[0]}; {ADVICE}")
    host.load_state_dict(loaded.state_dict())


def remember(flags: ModelFlags, folder: Path, decides: dict[str, Any] | None = None) -> None:
    """Writes beside the weights what decided them (see `tune.decided`); a folder that holds another run is refused.

    What an older version did not write down is not compared.
    """
    path = folder / FLAGS_FILE
    now = {**asdict(flags), DECIDES: decides or {}}
    before: dict[str, Any] = {}
    if path.exists():
        before = read_json(path, dict, ADVICE)
        was = {f"--{key}": value for key, value in asdict(recall(folder)).items()}
        was |= shaped(before.get(DECIDES, {}), dict, f"{path}, {DECIDES}")
        is_now = {f"--{key}": value for key, value in asdict(flags).items()} | now[DECIDES]
        changed = [f"{key} {was[key]} ─► {is_now[key]}" for key in is_now if key in was and was[key] != is_now[key]]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other flags ({', '.join(changed)}): take another --output_dir, or delete it"
            )
        now[DECIDES] = before.get(DECIDES, {}) | now[DECIDES]
    if now != before:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".tmp-{FLAGS_FILE}"
        aside.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, path)


def recall(folder: str | Path) -> ModelFlags:
    """The flags of a finished run. What an older version did not write down has its default."""
    path = Path(folder) / FLAGS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} is not the --output_dir of a run of train.py")
    held = read_json(path, dict, ADVICE)
    types = get_type_hints(ModelFlags)
    flags = {name: shaped(held[name], of, f"{path}, {name}") for name, of in types.items() if name in held}
    if not flags.get("vlm"):
        raise ValueError(f"{path} does not name the host that was tuned (vlm); {ADVICE}")
    with naming(path):
        return ModelFlags(**flags)
