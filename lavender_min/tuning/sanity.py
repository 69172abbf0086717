"""One step before the first, so that what would waste an hour is found at once.

The head of the data goes through the model forwards and backwards, and the step is not taken: gradients, running statistics
and random state are put back, and a run is bit-equal to one that was not looked at.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

EXAMPLES = 32  # looked at, at most, for a word that can be aligned; the first batch nearly always has one
SCALE = 128  # of the loss going backwards: float16 would lose the smallest gradients


def check(trainer: Any, model: nn.Module) -> None:
    """Words are mapped and matched, losses finite, one BOS a row; gradients reach all that should train, and nothing else.

    `trainer` is a LavenderTrainer, `model` what it steps (DDP and FSDP wrap it). Raises ValueError, in one line.
    """
    lavender, dataset, args = trainer.lavender, trainer.train_dataset, trainer.args
    collate, n = trainer.data_collator, args.per_device_train_batch_size
    tower = collate.family.vision(lavender.base)
    frozen = not any(p.requires_grad for module in tower for p in module.parameters())
    adapters_only = hasattr(lavender.host, "peft_config")
    strangers = [
        name
        for name, p in lavender.named_parameters()
        if p.requires_grad and adapters_only and ".lora_" not in name and not name.startswith("align.")
    ]
    require(not strangers, f"{len(strangers)} parameters train that should not, {strangers[:1]} for one")

    kept = [(buffer, buffer.clone()) for buffer in (lavender.align.buffers() if lavender.align else ())]
    graph: list[bool] = []
    hook = tower[-1].register_forward_hook(lambda module, inputs, out: graph.append(out.requires_grad))
    model.train()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            counts = torch.zeros(2, device=args.device)  # words that have a map, and those of them to align
            for start in range(0, min(EXAMPLES, len(dataset)), n * args.world_size):
                first = start + n * args.process_index
                batch = trainer._prepare_inputs(collate([dataset[i % len(dataset)] for i in range(first, first + n)]))
                begins = (batch["input_ids"] == collate.processor.tokenizer.bos_token_id).sum(1)
                require(
                    bool((begins == 1).all()),
                    f"a text begins {begins.max()} times, once is right: the chat template and the tokenizer both add BOS",
                )
                with trainer.compute_loss_context_manager():
                    out = model(**batch)
                for name in ("loss_vlm", "loss_att"):
                    value = float(out.get(name, 0))
                    require(
                        math.isfinite(value), f"{name} is {value} before the first step; is it so with --fp16 false?"
                    )
                (out["loss"] * SCALE).backward()
                if lavender.align is None:
                    break
                spoken = batch["words"]["tokens"] >= 0
                mapped = len(batch["words"]["lengths"]) if spoken.any() else 0
                found = torch.stack([out["words"].new_tensor(mapped), out["words"]])
                counts += trainer.accelerator.reduce(found.float())
                if counts[1]:
                    break
            if lavender.align is not None:
                seen, (mapped, matched) = min(start + n * args.world_size, len(dataset)), counts.int().tolist()
                require(mapped, f"the first {seen} examples hold no word with a map; does --words all find some?")
                require(
                    matched,
                    f"the host predicts none of {mapped} mapped words in {seen} examples, so --match exact aligns nothing; "
                    "take --match all, or a host that knows its task",
                )
            require(
                not (frozen and any(graph)), "the frozen vision tower builds a graph: something asks for its gradients"
            )
            reached(lavender)
    finally:
        hook.remove()
        model.zero_grad()
        for buffer, before in kept:
            buffer.copy_(before)


def reached(lavender: Any) -> None:
    """Every adapter, every parallel attention and the Aligner must have a gradient; their first factors may still be 0."""
    parts: dict[str, float] = {}
    for name, parameter in lavender.named_parameters():
        if parameter.requires_grad and (lavender.lambda_att or not name.startswith("align.")):
            part = name.split(".lora_")[0]
            if part == name:
                part = ".".join(name.split(".")[: 3 if name.startswith("align.parallel") else 2])
            grad = parameter.grad
            norm = torch.zeros(()) if grad is None else grad.float().norm()
            parts[part] = parts.get(part, 0.0) + float(whole(norm))
    for part, norm in parts.items():
        require(math.isfinite(norm), f"the gradient of {part} is {norm} before the first step")
        require(norm, f"no gradient reaches {part}, so it would not train")


def whole(tensor: Tensor) -> Tensor:
    """What FSDP has spread over processes, in one piece."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"stopped before the first step: {otherwise}")
