"""The cases in which the kernels must be right: sizes, inputs, and plain PyTorch beside each kernel.

Head dims from 16 to 256, odd ones as well; every kind of mask; sizes that fill no block; query and key strided as models have them.
Inputs are drawn anew for every case, the same ones every time.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from measure import DEVICE
from torch import Tensor

from lavender_min import ops
from lavender_min.geometry import PatchLayout, resize_matrix

HEAD_DIMS = (16, 17, 24, 32, 33, 40, 48, 64, 72, 80, 96, 112, 128, 129, 160, 192, 255, 256)
MASKS = ("bool, one for all", "bool", "float", "causal")


class Word(NamedTuple):
    """Sizes of a call of word_attention; its usual case."""

    h: int = 8
    hkv: int = 2
    t: int = 37
    p: int = 523
    d: int = 64
    counts: tuple[int, ...] = (5, 9)
    canvas: tuple[int, int] = (13, 17)
    g: tuple[int, int] = (32, 29)
    mask: str = "none"


class Diffusion(NamedTuple):
    b: int = 2
    h: int = 8
    q: int = 300
    length: int = 77
    d: int = 40
    w: int = 13


class Aligner(NamedTuple):
    m: int = 64
    c: int = 32
    g: tuple[int, int] = (32, 32)
    output: str = "minmax"


class Case(NamedTuple):
    op: str
    dtype: str
    what: str  # in what it differs from the op's usual case
    sizes: Any


USUAL = {"word_attention": Word(), "diffusion_attention": Diffusion(), "aligner_mse": Aligner()}
# The interpreter takes a second for what a GPU does in microseconds.
TINY = {
    "word_attention": Word(h=2, hkv=1, t=5, p=19, d=8, counts=(2, 1), canvas=(3, 4), g=(4, 3)),
    "diffusion_attention": Diffusion(b=1, h=2, q=18, length=7, d=10, w=3),
    "aligner_mse": Aligner(m=3, c=3, g=(5, 4)),
}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "word_attention": {
        "one line of latents": {"canvas": (1, 64), "p": 64, "g": (2, 7)},
        "enlarged": {"canvas": (4, 4), "g": (32, 12), "p": 17},
        "no grouped heads": {"h": 3, "hkv": 3, "t": 1, "counts": (1,)},
        "many rows a key head": {"h": 18, "hkv": 1, "counts": (7, 40)},
        "a picture without words": {"counts": (0, 3)},
        "Llama-3.2": {"h": 32, "t": 512, "p": 6404, "d": 128, "counts": (32, 17), "canvas": (80, 80), "g": (32, 32)},
    },
    "diffusion_attention": {
        "64²": {"q": 4096, "b": 4},
        "five tokens": {"length": 5, "q": 17},
        "128 tokens, head dim 64": {"length": 128, "d": 64},
    },
    "aligner_mse": {
        "odd": {"m": 3, "c": 5, "g": (6, 7)},
        "no normalisation": {"output": "none"},
        "large": {"m": 3, "g": (128, 128)},
    },
}


def cases(tiny: bool) -> list[Case]:
    """Of every op the usual case and what differs from it in one thing, in every precision."""
    found = []
    for op, usual in (TINY if tiny else USUAL).items():
        changes: dict[str, dict[str, Any]] = {"usual": {}}
        if op == "aligner_mse" and tiny:
            changes["no normalisation"] = SHAPES[op]["no normalisation"]
        if not tiny:
            changes |= SHAPES[op]
        if op != "aligner_mse" and not tiny:
            changes |= {f"head dim {d}": {"d": d} for d in HEAD_DIMS}
        if op == "word_attention":
            changes |= {f"mask {mask}": {"mask": mask} for mask in MASKS}
        for dtype in ("float32", "float16") if tiny else ("float32", "float16", "bfloat16"):
            found += [Case(op, dtype, what, usual._replace(**change)) for what, change in changes.items()]
    # A second each in the interpreter, which therefore sees the masks once.
    return [case for case in found if not (tiny and case.dtype == "float32" and case.what.startswith("mask"))]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Ways(NamedTuple):
    """The kernel and plain PyTorch, both on the inputs that get a gradient, and these inputs in float32."""

    kernel: Any
    eager: Any
    inputs: list[Tensor]


# --- word_attention ---------------------------------------------------------------------------------------------------


def eager_word(query, key, rows, counts, layout, attn_mask=None, is_causal=False) -> Tensor:
    """The whole [b, h, t, p] in the inputs' own precision, then the rows and the keys that are wanted."""
    (b, h, t, d), (hkv, p) = query.shape, key.shape[1:3]
    scores = query @ key.repeat_interleave(h // hkv, 1).mT * d**-0.5
    if is_causal:
        attn_mask = torch.ones(t, p, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(query.dtype)
    # A row that sees nothing gives 0 / 0, and counts as 0.
    full = torch.nan_to_num(scores.softmax(-1))
    # Index −1, where there is no patch, finds the zero put behind the last key.
    full = torch.cat([full, full.new_zeros(b, h, t, 1)], -1)
    maps = []
    for i, some in enumerate(rows.split(counts)):
        canvas = full[i][:, some.long()][..., layout.index[i].long()]
        resize_y, resize_x = (matrix[i].to(query.dtype) for matrix in layout[1:])
        maps.append((resize_y @ canvas @ resize_x.mT).transpose(0, 1))
    return torch.cat(maps)


def word_ways(dtype: torch.dtype, sizes: Word) -> Ways:
    h, hkv, t, p, d, counts, canvas, g, mask = sizes
    b, (hc, wc), make = len(counts), canvas, torch.Generator().manual_seed(0)
    query, key = (draw(i, b, *s, d).transpose(1, 2) for i, s in enumerate(((t, h), (p, hkv))))
    rows = torch.cat([torch.randint(0, t, (n,), generator=make) for n in counts]).int()
    index = torch.stack([torch.randperm(p, generator=make)[: hc * wc].view(hc, wc) for _ in range(b)]).int()
    index[torch.rand(b, hc, wc, generator=make) < 0.15] = -1
    layout = PatchLayout(index, *(resize_matrix(c, x).expand(b, -1, -1) for c, x in zip(canvas, g, strict=True)))
    options: dict[str, Any] = {}
    if mask == "bool":
        options["attn_mask"] = draw(5, b, 1, t, p) > -0.5
        # a picked row that sees nothing
        options["attn_mask"][0, 0, rows[0]] = False
    elif mask == "bool, one for all":
        options["attn_mask"] = draw(5, p) > -0.5
    elif mask == "float":
        options["attn_mask"] = draw(5, 1, h, t, p).to(dtype).masked_fill(draw(6, 1, h, t, p) > 1, -torch.inf)
    elif mask == "causal":
        options["is_causal"] = True
    fixed = {"rows": rows.to(DEVICE), "counts": list(counts), "layout": layout.to(DEVICE), **options}
    return Ways(partial(ops.word_attention, backend="triton", **fixed), partial(eager_word, **fixed), [query, key])


# --- the other two ----------------------------------------------------------------------------------------------------


def diffusion_ways(dtype: torch.dtype, sizes: Diffusion) -> Ways:
    b, h, q, length, d, w = sizes
    inputs = [draw(i, b, many, h, d).transpose(1, 2) for i, many in enumerate((q, length, length))]
    weights, start = draw(3, b, length, w).softmax(1), draw(4, b, w, q)

    def kernel(query, key, value):
        maps = start.clone()
        with torch.no_grad():
            return ops.diffusion_attention(query, key, value, weights, maps, backend="triton"), maps

    def eager(query, key, value):
        attention = (query @ key.mT * d**-0.5).softmax(-1)
        maps = start.to(torch.promote_types(query.dtype, torch.float32))
        return attention @ value, maps + (attention.mean(1).to(maps.dtype) @ weights.to(maps.dtype)).mT

    return Ways(kernel, eager, inputs)


def aligner_ways(dtype: torch.dtype, sizes: Aligner) -> Ways:
    m, c, g, output = sizes
    inputs, target, trust = (
        [draw(0, m, c, *g), draw(1, c), draw(2, 1)],
        draw(3, m, *g).sigmoid(),
        (draw(4, m) > -0.8).float(),
    )
    trust[0] = 1

    def kernel(*inputs):
        return ops.aligner_mse(*inputs, target, output=output, trust=trust, backend="triton")

    def eager(features, weight, bias):
        z = (features * weight[:, None, None]).sum(1) + bias
        if output == "minmax":
            low, high = z.amin((1, 2), keepdim=True), z.amax((1, 2), keepdim=True)
            z = (z - low) / (high - low + 1e-6)
        error = (z - target)[trust > 0].square()
        return error.to(torch.promote_types(error.dtype, torch.float32)).mean()

    return Ways(kernel, eager, inputs)


WAYS = {"word_attention": word_ways, "diffusion_attention": diffusion_ways, "aligner_mse": aligner_ways}
