"""word_attention: the attention of a few rows of the query over a picture, resampled to a small map. Forward.

Problem. Picture b has counts[b] picked rows of the query. For each of them and each head, s_p = scale·q·k_p + mask
and A = softmax over all p keys. From the canvas cells (y, x) of the layout

    out = resize_y · A[index] · resize_xᵀ          [gy, hc] · [hc, wc] · [wc, gx]

Dot rows. The `group` query heads that share a key head are packed with the picked rows: group·counts[b] vectors, the
rows of one matrix product with K. So K is read once for the whole group and never repeated. "Dot row r" below is a row
of that product. Pictures may differ in their number of dot rows. The grid has room for the picture with the most;
programs beyond a picture's own blocks return at once.

Two sweeps over K. `row_stats` is the online softmax (base 2: scale·log2(e) is folded into s). It gives every dot row's
max and sum; the keys are shared out over programs, which leave partial ones. `small_map` merges those and recomputes
A = 2^(s − max) / sum, but only at canvas cells, gathering keys through `index`. It resamples at once: a canvas row
times resize_x is a line [BR, gx] (a dot), and the line is added, times resize_y[:, y], to the few output rows it
reaches. `resize_y` is a narrow filter, so a program that owns BY output rows visits just the canvas rows with a weight
there.

Backward: word_attention_backward.py. It needs out, max and sum, and recomputes A. Both files build on
word_attention_tiles.py.

Memory, Llama-3.2 (h 32, t 512, p 6404, n 32, d 128, g 32, one picture). Eager: A alone is h·t·p fp32 = 400 MiB, 1.3 GiB
with its gradient and the scores. Picking rows first: h·n·p = 25 MiB each. Here: partial max and sum, 2·splits·h·n
(96 KiB). Work: 2 products of 2·h·n·p·d flops; eager does one of t/n times as much. n counts the rows there are.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .shapes import check_dtype
from .word_attention_backward import gradients
from .word_attention_tiles import (
    BOOL,
    CAUSAL,
    FLOAT,
    NO_MASK,
    Inputs,
    Plan,
    canvas_arguments,
    dot_rows,
    load_resize_x,
    load_vectors,
    pick,
    picture_and_head,
    score,
    shared_arguments,
)  # fmt: skip


@triton.jit
def row_stats(
    p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_rows, p_offsets, h, nh, scale2,
    p_part, p, GROUP: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Partial max and sum of every dot row over one share of the keys: p_part [2, splits, n·h]."""
    i_block, i_split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i_b, i_hkv = picture_and_head(tl.program_id(2), h, GROUP)
    if i_block * BR >= dot_rows(p_offsets, i_b, GROUP):
        return
    p_key += i_b * s_kb + i_hkv.to(tl.int64) * s_kh
    i_t, i_nh, m_nh, b_q, p_mask = pick(
        i_block, i_b, i_hkv, p_query, s_qb, s_qh, s_qt, p_mask, s_mb, s_mh, s_mt, p_rows, p_offsets, h, GROUP, D, BR, BD
    )  # fmt: skip
    share = tl.cdiv(tl.cdiv(p, BK), splits) * BK
    b_max, b_sum = tl.full([BR], -float("inf"), tl.float32), tl.zeros([BR], tl.float32)
    for i in range(i_split * share, tl.minimum(p, (i_split + 1) * share), BK):
        i_key = i + tl.arange(0, BK)
        i_key = tl.where(i_key < p, i_key, -1)
        b_k = load_vectors(p_key + i_key * s_kp, i_key >= 0, D, BD)
        b_s = score(b_q, b_k, i_key, i_t, p_mask, s_mp, scale2, MASK, PRECISION)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # −inf − (−inf) would be nan
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_ref) + tl.sum(tl.exp2(b_s - b_ref[:, None]), 1)
        b_max = b_new
    tl.store(p_part + i_split * nh + i_nh, b_max, mask=m_nh)
    tl.store(p_part + (splits + i_split) * nh + i_nh, b_sum, mask=m_nh)


@triton.jit
def small_map(
    p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_rows, p_offsets, h, nh, scale2,
    hc, wc, gy, gx, p_index, p_resize_y, p_resize_x, p_part, p_stats, p_out, splits,
    GROUP: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    BX: tl.constexpr, BGX: tl.constexpr, BS: tl.constexpr, BHC: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """BY output rows of the maps of BR dot rows: A at the canvas cells that reach them, times resize_x, times resize_y."""
    i_block, i_out = tl.program_id(0), tl.program_id(1)
    i_b, i_hkv = picture_and_head(tl.program_id(2), h, GROUP)
    if i_block * BR >= dot_rows(p_offsets, i_b, GROUP):
        return
    p_key += i_b * s_kb + i_hkv.to(tl.int64) * s_kh
    i_t, i_nh, m_nh, b_q, p_mask = pick(
        i_block, i_b, i_hkv, p_query, s_qb, s_qh, s_qt, p_mask, s_mb, s_mh, s_mt, p_rows, p_offsets, h, GROUP, D, BR, BD
    )  # fmt: skip
    p_index, p_resize_y, p_resize_x = p_index + i_b * hc * wc, p_resize_y + i_b * gy * hc, p_resize_x + i_b * gx * wc

    # 1. merge the partial softmaxes; a dot row with no key left has sum 0 and gets A = 0
    i_s = tl.arange(0, BS)
    m_part = (i_s < splits)[:, None] & m_nh[None, :]
    b_maxs = tl.load(p_part + i_s[:, None] * nh + i_nh[None, :], mask=m_part, other=-float("inf"))
    b_sums = tl.load(p_part + (splits + i_s)[:, None] * nh + i_nh[None, :], mask=m_part, other=0.0)
    b_max = tl.max(b_maxs, 0)
    b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.sum(b_sums * tl.exp2(b_maxs - b_max[None, :]), 0)
    b_inv = tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
    tl.store(p_stats + i_nh, b_max, mask=m_nh & (i_out == 0))
    tl.store(p_stats + nh + i_nh, b_inv, mask=m_nh & (i_out == 0))

    # 2. the canvas rows that reach output rows i_gy: those with a weight
    i_gy, i_gx, i_y = i_out * BY + tl.arange(0, BY), tl.arange(0, BGX), tl.arange(0, BHC)
    m_w = (i_gy < gy)[:, None] & (i_y < hc)[None, :]
    b_w = tl.load(p_resize_y + i_gy[:, None] * hc + i_y[None, :], mask=m_w, other=0.0)
    live = tl.max((b_w != 0).to(tl.int32), 0) > 0
    first, last = tl.min(tl.where(live, i_y, hc)), tl.max(tl.where(live, i_y + 1, 0))

    # 3. each becomes a line [BR, gx], which is added where it reaches
    b_out = tl.zeros([BR, BY, BGX], tl.float32)
    for y in range(first, last):
        b_line = tl.zeros([BR, BGX], tl.float32)
        for x in range(0, wc, BX):
            i_x = x + tl.arange(0, BX)
            i_key = tl.load(p_index + y * wc + i_x, mask=i_x < wc, other=-1)
            b_k = load_vectors(p_key + i_key * s_kp, i_key >= 0, D, BD)
            b_s = score(b_q, b_k, i_key, i_t, p_mask, s_mp, scale2, MASK, PRECISION)
            # A·sum, [BR, BX]
            b_a = tl.exp2(b_s - b_max[:, None])
            b_resize_x = load_resize_x(p_resize_x, i_x, wc, gx, BGX)
            b_line = tl.dot(b_a, tl.trans(b_resize_x), b_line, input_precision=PRECISION)
        weight = tl.load(p_resize_y + i_gy * hc + y, mask=i_gy < gy, other=0.0)
        b_out += b_line[:, None, :] * weight[None, :, None]
    p_out += (i_nh * gy)[:, None, None] * gx + (i_gy * gx)[None, :, None] + i_gx[None, None, :]
    m_out = m_nh[:, None, None] & (i_gy < gy)[None, :, None] & (i_gx < gx)[None, None, :]
    tl.store(p_out, b_out * b_inv[:, None, None], mask=m_out)


def blocks(group: int, n: int, d: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps, the same on every GPU. No spills on sm_80, 86, 89, 90 at the sizes of `aot.py`, mask included.

    Tried by compiling (no GPU at hand, so by registers and shared memory, not by time). 4 warps at 64 dot rows spill with
    a mask, whose pointers alone take 64 registers a thread. 64 keys a step spill in small_map. BY·gx = 128 output cells a
    dot row spill there on sm_86, 64 do not. fp32 goes through tf32x3 (three TF32 products a product), which needs three
    times the operand registers: 16 dot rows, 16 keys. "ieee" would need no tensor core and be right as well, several
    times slower.
    """
    bd = max(16, triton.next_power_of_2(d))
    small = dtype == torch.float32 or bd > 128
    br = min(16 if small else 64, max(16, triton.next_power_of_2(n * group)))
    # 16 dot rows are one tensor-core tile: too few for 8 warps
    few = br == 16 and not small
    return {"BR": br, "BD": bd, "BX": 16 if small else 32, "BK": 32 if small else 64, "num_warps": 4 if few else 8}


def make_plan(query: Tensor, key: Tensor, counts: Sequence[int], kind: int, scale: float | None) -> Plan:
    """Block sizes follow the picture with the most rows; the number of shares follows the blocks of all pictures."""
    (_, h, _, d), (hkv, p) = query.shape, key.shape[1:3]
    group, longest = h // hkv, max(counts, default=0)
    size = blocks(group, longest, d, query.dtype)
    taken = [triton.cdiv(count * group, size["BR"]) for count in counts]
    # About 256 programs whatever the GPU, so sums have one order everywhere; and few enough that partial dq stay small.
    splits = max(1, min(16, 256 // max(1, sum(taken) * hkv), p // (4 * d)))
    return Plan(d**-0.5 if scale is None else scale, kind, longest, max(taken, default=0), splits, size)


class WordAttention(torch.autograd.Function):
    """Autograd wants the tensors of an Inputs one by one."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        inputs = Inputs(*tensors)
        query, key, (n,) = inputs.query, inputs.key, inputs.rows.shape
        (b, h), (hkv, p) = query.shape[:2], key.shape[1:3]
        call, canvas = shared_arguments(inputs, plan), canvas_arguments(inputs, plan)
        part, stats = (query.new_empty(2, shares, n * h, dtype=torch.float32) for shares in (plan.splits, 1))
        out = query.new_empty(n, h, canvas["gy"], canvas["gx"], dtype=torch.float32)
        row_stats[plan.row_blocks, plan.splits, b * hkv](**call, p_part=part, p=p, BK=plan.blocks["BK"])
        # 4,096 numbers of out a program: no more fit the registers, see `blocks`
        by = max(1, min(triton.next_power_of_2(canvas["gy"]), 4096 // (call["BR"] * canvas["BGX"])))
        small_map[plan.row_blocks, triton.cdiv(canvas["gy"], by), b * hkv](
            **call, **canvas, p_index=inputs.index, p_part=part, p_stats=stats, p_out=out, splits=plan.splits,
            BS=triton.next_power_of_2(plan.splits), BHC=triton.next_power_of_2(canvas["hc"]), BY=by,
        )  # fmt: skip
        ctx.save_for_backward(*inputs, out, stats)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *tensors, out, stats = ctx.saved_tensors
        dquery, dkey = gradients(Inputs(*tensors), ctx.plan, out, stats, dout, needs=ctx.needs_input_grad[1:3])
        return None, dquery, dkey, *(None,) * 6


def word_attention(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b hkv p d"],
    rows: Int[Tensor, " n"],
    counts: Sequence[int],
    layout,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "n h gy gx"]:
    """See lavender_min.ops.word_attention, which checks the shapes. Strides of query, key and mask are passed on.

    Each key in one cell at most, index in [−1, p), rows in [−1, t): not checked, as reading them would wait for the GPU.
    """
    check_dtype("word_attention (Triton)", "query", query, (torch.float32, torch.float16, torch.bfloat16))
    (_, gy, hc), gx, d = layout.resize_y.shape, layout.resize_x.shape[1], query.shape[3]
    # Whole in a block: a vector, a line of a map, and a weight for each output row and for each canvas row.
    for name, size, limit in (("d", d, 256), ("gx", gx, 128), ("gy", gy, 1024), ("hc", hc, 1024)):
        if size > limit:
            raise ValueError(
                f"word_attention: the Triton kernel takes {name} up to {limit}; got {size}; use backend='torch'"
            )
    # without a mask, a pointer that is not read
    kind, mask = NO_MASK, query.new_empty(1).expand(1, 1, 1, 1)
    if is_causal:
        kind = CAUSAL
    elif attn_mask is not None:
        kind = BOOL if attn_mask.dtype == torch.bool else FLOAT
        mask = attn_mask.view(torch.uint8) if kind is BOOL else attn_mask
        mask = mask.expand(*query.shape[:3], key.shape[2])
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    # The driver takes over so few numbers at once: nothing waits for the GPU.
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(query.device, non_blocking=True)
    index, resize_y, resize_x = layout.index.int(), layout.resize_y.float(), layout.resize_x.float()
    inputs = Inputs(query, key, *(x.contiguous() for x in (rows.int(), offsets, index, resize_y, resize_x)), mask)
    return WordAttention.apply(make_plan(query, key, counts, kind.value, scale), *inputs)
