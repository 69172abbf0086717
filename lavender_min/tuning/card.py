"""The model card of a run: a README.md beside its weights, so that an adapter on the hub explains itself.

PEFT saves a card beside every adapter, whose headings have no text. This card takes its place. Everything in it is taken from the
run's folder: the flags from `lavender.json`, the losses from the Trainer's log. A card begins with YAML, which is all that the hub
itself reads.
"""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lavender_min.data import SOURCES
from lavender_min.failing import read_json
from lavender_min.hosts import architectures
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags

CARD_FILE = "README.md"
OWN_KINDS = (architectures.BidirectionalLlavaConfig.model_type, architectures.VlmPerceiverConfig.model_type)
TAGS = ["lavender", "diffusion-instruction-tuning", "image-text-to-text"]
# The Trainer's flags that the card shows; lavender.json holds all.
TRAINER_FLAGS = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "lr_scheduler_type",
    "weight_decay", "seed",
)  # fmt: skip
# {what the Trainer logs: what the card calls it}
MEASURES = {
    "loss_vlm": "cross entropy per token, training",
    "loss_att": "alignment loss, training",
    "eval_loss_vlm": "cross entropy per token, validation",
    "eval_loss_att": "alignment loss, validation",
}
LOAD = """```python
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor

here = "."  # this folder, or the repository it was pushed to
{load}
processor = AutoProcessor.from_pretrained(here)
```"""


def write(folder: Path, run: Path, history: Sequence[dict[str, Any]], whole: bool = False) -> None:
    """Writes the card of the run in the folder `run` to `folder`.

    `history` is what the Trainer logged: its `log_history`, a dict an entry. `whole` says that `folder` holds a whole model, into
    which the run's adapter was merged.
    """
    flags = runs.recall(run)
    decided = read_json(run / runs.FLAGS_FILE, dict).get(runs.DECIDES, {})
    whole = whole or flags.mode == "full"
    title = f"{Path(flags.vlm).name}, {'plain tuning' if flags.plain else 'Lavender'}"
    parts = [f"---\n{metadata(flags, decided, whole).to_yaml()}\n---", f"# {title}", intro(flags, whole)]
    parts += ["## How to load it", loading(flags, whole, folder), "## Data", data_text(decided)]
    if measures := last_logged(history):
        steps = max(int(entry.get("step", 0)) for entry in history)
        parts += ["## Measures", f"As last logged, in {steps} steps.", table("measure", measures)]
    parts += ["## Flags", "Those of train.py that differ from its defaults, or that decide most."]
    parts += [table("flag", flags_of(flags, decided))]
    ModelCard("\n\n".join(parts) + "\n").save(folder / CARD_FILE)


def metadata(flags: ModelFlags, decided: dict[str, Any], whole: bool) -> ModelCardData:
    """The YAML, which the hub reads. `decided` is what `tune.decided` wrote down, {} for a run that has no such entry."""
    # The hub refuses a base model that is no name on the hub, such as a folder of this machine.
    local = Path(flags.vlm).exists() or Path(flags.vlm).is_absolute()
    # In a mixture each name has its weight behind it: "flickr30k:0.7 ocrvqa30k:0.3".
    sets = [word.partition(":")[0] for word in decided.get("--data", "").split()]
    return ModelCardData(
        base_model=None if local else flags.vlm,
        base_model_relation=None if local else "finetune" if whole else "adapter",
        library_name="transformers" if whole else "peft",
        pipeline_tag="image-text-to-text",
        tags=TAGS if flags.mode == "full" else ["lora", *TAGS],
        datasets=[next(iter(SOURCES[name].hub)) for name in sets if SOURCES[name].hub] or None,
    )


def loading(flags: ModelFlags, whole: bool, folder: Path) -> str:
    """The Python that loads the model in `folder`. Two kinds of host must be made known to transformers first."""
    configs = [place / "config.json" for place in (folder, Path(flags.vlm))]
    said = "".join(config.read_text(encoding="utf-8") for config in configs if config.exists())
    imports = f"import {architectures.__name__}\n" if any(f'"{kind}"' in said for kind in OWN_KINDS) else ""
    imports += "" if whole else "from peft import PeftModel\n"
    if whole:
        load = 'model = AutoModelForImageTextToText.from_pretrained(here, dtype="auto")'
    else:
        load = f'host = AutoModelForImageTextToText.from_pretrained("{flags.vlm}", dtype="auto")\n'
        load += "model = PeftModel.from_pretrained(host, here)"
    return LOAD.format(imports=imports, load=load)


def intro(flags: ModelFlags, whole: bool) -> str:
    """What was tuned, how, and what the folder holds."""
    trained = "every weight" if flags.mode == "full" and not flags.train_only else flags.train_only or "LoRA adapters"
    what = f"`{flags.vlm}`, fine-tuned ({trained}{', on a 4-bit host' if flags.mode == 'qlora' else ''})"
    how = (
        "on text alone, without alignment."
        if flags.plain
        else "by Diffusion Instruction Tuning (Lavender): its attention from words to the picture was pulled towards Stable "
        "Diffusion's. What was trained beside it, `lavender.safetensors`, is not needed to use it."
    )
    form = "This folder holds the whole model." if whole else "This folder holds a PEFT adapter."
    return f"{what}, {how} {form} It needs no package but those below."


def data_text(decided: dict[str, Any]) -> str:
    """The examples, and how the maps were made."""
    lines = []
    if "the examples" in decided:
        # "512 with sha256 0a1b…"; of a mixture "512 drawn from 300 with sha256 0a1b… and 400 with sha256 2c3d…".
        examples = decided["the examples"].replace(" with", " examples with", 1)
        lines = [f"`--data {decided['--data']}`: {examples}."]
    recipe = {key.removeprefix("the maps' "): value for key, value in decided.items() if key.startswith("the maps' ")}
    if recipe:
        lines += ["Stable Diffusion's maps were made so:", table("", recipe)]
    return "\n\n".join(lines) or "Not written down."


def flags_of(flags: ModelFlags, decided: dict[str, Any]) -> dict[str, Any]:
    """The model's flags that are not at their default, and those that a reader asks for first, whatever their value."""
    found: dict[str, Any] = {"--vlm": flags.vlm, "--mode": flags.mode}
    for field in fields(ModelFlags):
        value = getattr(flags, field.name)
        if field.default is not MISSING and value != field.default:
            found[f"--{field.name}"] = value
    if not flags.plain:
        found |= {"--aggregate": flags.aggregate, "--aligner": flags.aligner, "--lambda_att": flags.lambda_att}
    trainer = {f"--{name}": decided.get(f"--{name}") for name in TRAINER_FLAGS}
    return found | {name: value for name, value in trainer.items() if value is not None}


def last_logged(history: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The last value of each of MEASURES that was logged, by its name in the card."""
    found = {}
    for key, name in MEASURES.items():
        values = [entry[key] for entry in history if key in entry]
        if values:
            found[name] = f"{values[-1]:.4f}"
    return found


def table(first: str, rows: dict[str, Any]) -> str:
    """Two columns, as Markdown; `first` is the heading of the first."""
    # A bar would end its cell, so "¦" stands for it.
    lines = [f"| {name} | {str(value).replace('|', '¦')} |" for name, value in rows.items()]
    return "\n".join([f"| {first} | |", "|---|---|", *lines])
