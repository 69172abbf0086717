"""Where the memory of a training step will go, before anything is loaded: `python train.py --plan`.

The plan runs the training step itself: host, adapters, Aligner, forward and backward. It runs on torch's device `meta`, whose
tensors have shapes but no numbers, so it needs neither weights nor a GPU nor a network. Below autograd a `Ledger` is told of
every tensor's storage. It adds up the bytes that are alive, and keeps the largest sum with its parts.

What differs on a GPU is imitated (`pretending`).

Not counted are what cuBLAS and the kernels need inside one call, copies of the adapters that autocast keeps for the rest of a
forward, and the allocator's rounding. `RESERVE` is set aside for them. Texts are full (no padding). --cache_vision is ignored.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoConfig, AutoModelForImageTextToText

from lavender_min.geometry import MAP_SIDE
from lavender_min.hosts import FAMILIES
from lavender_min.hosts.base import Imagined
from lavender_min.hosts.load import Host, family_of
from lavender_min.hosts.reading import hook
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import Lavender
from lavender_min.tuning.pretending import pretend

GIB = 2**30
# GiB of each card, as torch reports them.
CARDS = {"T4 16 GB": 14.7, "A10G 24 GB": 22.0, "A100 40 GB": 39.4, "A100 80 GB": 79.1}
# GiB for the CUDA context, cuBLAS's workspace and what the allocator cannot use.
RESERVE = 0.75


class Ledger(TorchDispatchMode):
    """Bytes of the storages alive, by label, and their sum's peak. A view, or a change in place, costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.known: set[int] = set()
        self.label, self.phase = "batch", "forward"
        # For each phase, what was alive at the moment when most was.
        self.peaks: dict[str, Counter[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if "meta" in devices:
            # Token ids and sizes of pictures are real numbers, because hosts compute with them. Here they meet what has none.
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if devices and "device" in kwargs:
            # Moved elsewhere, a tensor keeps what numbers it has.
            kwargs = kwargs | {"device": torch.device("meta" if "meta" in devices else "cpu")}
        out = func(*args, **kwargs)
        tree_map_only(Tensor, self.add, out)
        return out

    def add(self, tensor: Tensor, label: str | None = None) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.known:
            return
        self.known.add(id(storage))
        if label is None:
            is_map = self.phase == "forward" and tensor.shape[-2:] == (MAP_SIDE, MAP_SIDE)
            label = "maps and Aligner" if is_map else self.label
        self.live[label] += storage.nbytes()
        weakref.finalize(storage, self.drop, id(storage), storage.nbytes(), label).atexit = False
        if self.live.total() > self.peaks.get(self.phase, Counter()).total():
            self.peaks[self.phase] = self.live.copy()

    def drop(self, key: int, size: int, label: str) -> None:
        self.known.discard(key)
        self.live[label] -= size

    def within(self, module: nn.Module, label: str, phase: str | None = None) -> None:
        """Tensors made inside this module's forward are counted under `label`. The backward is counted as a whole."""
        outer: list[tuple[str, str]] = []

        def enter(*_) -> None:
            if self.phase != "backward":
                outer.append((self.label, self.phase))
                self.label, self.phase = label, phase or self.phase

        def leave(*_) -> None:
            if self.phase != "backward":
                self.label, self.phase = outer.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def empty_host(flags: ModelFlags, dtype: torch.dtype) -> Host:
    """The hooked host on `meta`, from a folder's config.json or one that its family knows by heart."""
    name = flags.vlm
    families = [family_of(name, model_type) for model_type in FAMILIES]
    if Path(name).is_dir():
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    else:
        config = next(filter(None, (family.config(name) for family in families)), None)
    if config is None:
        raise ValueError(f"--plan needs a folder with a config.json, or a model that it knows; got --vlm {name}")
    family = family_of(name, config.model_type)
    with torch.device("meta"):
        host = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)
    if flags.mode == "qlora":
        pack_nf4(host, dtype)
    hook(host, family)
    return Host(host, None, family)


def pack_nf4(host: Any, dtype: torch.dtype) -> None:
    """In 4 bits, as `hosts.load` wants it, by bitsandbytes itself: an 8-bit scale for 64 numbers, a float32 one for 256 scales."""
    import bitsandbytes as bnb

    # It keeps the code of the 8-bit scales on the first device that needs it, which must not be this one.
    with patch.dict(bnb.functional.name2qmap):
        for name, linear in list(host.named_modules()):
            if isinstance(linear, nn.Linear) and name != "lm_head":
                options: dict[str, Any] = {"compute_dtype": dtype, "quant_type": "nf4", "device": "meta"}
                packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
                packed.weight.data, packed.bias = linear.weight.data, linear.bias
                weight: Any = packed.weight
                weight._quantize(torch.device("meta"))
                host.set_submodule(name, packed)
    # PEFT goes by this.
    host.is_loaded_in_4bit = True


def build(flags: ModelFlags, dtype: torch.dtype) -> Lavender:
    """`runs.build` around an empty host."""
    host = empty_host(flags, dtype)
    with torch.device("meta"):
        return runs.build(flags, dtype, loaded=host)[0].train()


def make_batch(picture: Imagined, b: int, tokens: int, answer: int) -> dict[str, Any]:
    """A batch of full texts about imagined pictures; every token of the answer is labelled and a word of its own."""
    # A picture that stands among the text brings token ids of its own.
    ids = picture.inputs.get("input_ids", torch.empty(b, tokens, dtype=torch.long, device="meta"))
    rows = torch.empty(b * answer, dtype=torch.int32, device="meta")
    words = {
        "rows": rows,
        "counts": [answer] * b,
        "texts": torch.empty_like(rows, dtype=torch.long),
        "tokens": rows.clone(),
        "lengths": torch.empty_like(rows, dtype=torch.long),
        "targets": torch.empty(b * answer, MAP_SIDE, MAP_SIDE, device="meta"),
        "views": [list(view) for view in picture.views],
        "trust": torch.empty(b * answer, device="meta"),
    }
    return {"input_ids": ids, **picture.inputs, "labels": torch.empty_like(ids, device="meta"), "words": words}


def held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What lies in memory before a step, with the part it belongs to: weights, and what 4-bit ones need beside their codes."""
    parts = dict.fromkeys(("vision", "visual", "projector", "connector"), "vision tower")
    parts |= {"embed_tokens": "embedding", "lm_head": "lm_head"}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        part = next((part for key, part in parts.items() if key in name), "text layers")
        if name.startswith("align."):
            yield "parallel attention and Aligner", tensor
        else:
            yield "adapters" if "lora_" in name else f"weights: {part}", tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            for extra in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                yield f"weights: {part}", extra


def optimizer_bytes(parameter: Tensor, name: str) -> int:
    """AdamW's two moments: as the parameter, or in 8 bits with a float32 scale for every 256 (bitsandbytes, from 4,096 numbers)."""
    n = parameter.numel()
    if "8bit" in name:
        return 2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n
    # And the number of steps.
    return 2 * parameter.nbytes + 4


class Plan(NamedTuple):
    """All in bytes, by label."""

    peaks: dict[str, Counter[str]]  # phase of the step -> what is alive when most is
    kept: Counter[str]  # alive between forward and backward
    saved: int  # by autograd, weights left out: what saved_tensors_hooks see


def simulate(model: Lavender, batch: dict[str, Any], rows: int, optim: str, half: torch.dtype | None) -> Plan:
    """One step in the middle of a run: gradients of the batch before are there, and the optimiser's state."""
    ledger = Ledger()
    for label, tensor in held(model):
        ledger.add(tensor, label)
    weights = set(ledger.known)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            ledger.add(parameter.grad, "gradients")
            ledger.live["optimiser state"] += optimizer_bytes(parameter, optim)
    tree_map_only(Tensor, lambda tensor: ledger.add(tensor, "batch"), batch)
    *tower, projector = model.family.vision(model.base)
    for module in tower:
        ledger.within(module, "vision tower at work", "vision tower")
    ledger.within(projector, "picture states")
    ledger.within(model.family.decoder(model.base), "hidden states kept")
    ledger.label = "logits and loss"

    # Holds the tensors themselves, so that no address is used twice.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            saved[id(storage)] = tensor
        return tensor

    with pretend(batch["labels"].shape, rows, half), ledger:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch)["loss"]
        kept, size = ledger.live.copy(), sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        saved.clear()
        ledger.label, ledger.phase = "a layer at work, and its gradients", "backward"
        loss.backward()
    return Plan(ledger.peaks, kept, size)


def describe(flags: ModelFlags, args: Any, tokens: int = 512) -> str:
    """The plan as a table, for `TrainingArguments` and texts of so many tokens, a quarter of which answer."""
    # float16 on a T4: as many bytes.
    half = torch.bfloat16
    lavender = build(flags, torch.float32 if flags.mode == "full" else half)
    # Its new name, and its old one.
    checkpointed = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    if checkpointed:
        lavender.gradient_checkpointing_enable()
    b, answer = args.per_device_train_batch_size, max(1, tokens // 4)
    picture = lavender.family.imagine(lavender.base.config, b, tokens)
    batch = make_batch(picture, b, tokens, answer)
    optim = str(getattr(args.optim, "value", args.optim))
    plan = simulate(lavender, batch, b * answer, optim, half)
    totals = {phase: alive.total() / GIB for phase, alive in plan.peaks.items()}
    phase = max(totals, key=lambda phase: totals[phase])
    peak = totals.pop(phase)
    lines = [
        f"{flags.vlm}, {flags.mode}: {b} × {tokens} tokens ({answer} of the answer, each a word), {picture.about}, "
        f"{'activations checkpointed' if checkpointed else 'all activations kept'}, {optim}",
        "",
    ]
    for label, size in sorted(
        plan.peaks[phase].items(), key=lambda item: (not item[0].startswith("weights"), -item[1])
    ):
        if size:
            lines.append(f"{label:42}{size / GIB:8.3f} GiB")
    others = ", ".join(f"{total:.2f} in the {name}" for name, total in totals.items())
    lines += ["-" * 54, f"{f'peak, in the {phase}':42}{peak:8.3f} GiB   ({others})", ""]
    for card, gib in CARDS.items():
        left = gib - RESERVE - peak
        lines.append(
            f"{card:12}{'fits' if left >= 0 else 'does not fit'}, {abs(left):.1f} GiB {'left' if left >= 0 else 'short'}"
        )
    lines.append(f"({RESERVE} GiB of each set aside for the CUDA context and what the allocator cannot use)")
    return "\n".join(lines)
