"""One step before the first, so that what would waste an hour is found at once.

The head of the data goes through the model forwards and backwards, and the step is not taken: gradients, running statistics
and random state are put back, and a run is bit-equal to one that was not looked at.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

# At most so many are tried for a word that can be aligned. The first batch nearly always has one.
EXAMPLES = 32
# Times the loss that goes backwards: float16 would lose the smallest gradients.
SCALE = 128


def check(trainer: Any, model: nn.Module) -> None:
    """Words are mapped and matched, losses finite, no BOS doubled; gradients reach all that should train, and nothing else.

    `trainer` is a LavenderTrainer, `model` what it steps (DDP and FSDP wrap it). Raises ValueError, in one line.
    """
    lavender = trainer.lavender
    tower = trainer.data_collator.family.vision(lavender.base)
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
            try_step(trainer, model)
            require(
                not (frozen and any(graph)), "the frozen vision tower builds a graph: something asks for its gradients"
            )
            reached(lavender)
    finally:
        hook.remove()
        model.zero_grad()
        for buffer, before in kept:
            buffer.copy_(before)


def try_step(trainer: Any, model: nn.Module) -> None:
    """Forward and backward over the head of the data, until a word was aligned."""
    dataset, args, align = trainer.train_dataset, trainer.args, trainer.lavender.align
    n = args.per_device_train_batch_size
    # Words that have a map, and those of them that are aligned.
    counts = torch.zeros(2, device=args.device)
    for start in range(0, min(EXAMPLES, len(dataset)), n * args.world_size):
        first = start + n * args.process_index
        examples = [dataset[i % len(dataset)] for i in range(first, first + n)]
        batch = trainer._prepare_inputs(trainer.data_collator(examples))
        # Padding may be the same token.
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -1)
        one_beginning(ids, trainer.data_collator.processor.tokenizer.bos_token_id)
        with trainer.compute_loss_context_manager():
            out = model(**batch)
        for name in ("loss_vlm", "loss_att"):
            value = float(out.get(name, 0))
            require(math.isfinite(value), f"{name} is {value} before the first step; is it so with --fp16 false?")
        (out["loss"] * SCALE).backward()
        if align is None:
            return
        spoken = batch["words"]["tokens"] >= 0
        mapped = len(batch["words"]["lengths"]) if spoken.any() else 0
        found = torch.stack([out["words"].new_tensor(mapped), out["words"]])
        counts += trainer.accelerator.reduce(found.float())
        if counts[1]:
            return
    mapped, tried = int(counts[0]), min(start + n * args.world_size, len(dataset))
    require(mapped, f"the first {tried} examples hold no word with a map; does --words all find some, or no --pos?")
    raise ValueError(
        f"stopped before the first step: the host predicts none of {mapped} mapped words in {tried} examples, so "
        "nothing would be aligned; take --match all, or a host that knows its task"
    )


def one_beginning(ids: Tensor, bos: int | None) -> None:
    """BOS must not be doubled. Further on the same token may begin or end a turn; some hosts have none (`bos` is None)."""
    is_bos = ids == bos if bos is not None else torch.zeros_like(ids, dtype=torch.bool)
    first = is_bos & (is_bos.cumsum(1) == 1)
    doubled = first[:, :-1] & is_bos[:, 1:]
    require(not doubled.any(), "a text begins with BOS twice: the chat template and the tokenizer both add it")


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
