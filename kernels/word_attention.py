"""word_attention: the attention of a few text tokens over a picture, resampled to a small map. Forward.

Problem. Per head, s_rp = scale·q_r·k_p + mask, A = softmax over all p keys; from the canvas cells (y, x) of the layout

    out_r = rows · A_r[index] · colsᵀ          [gy, hc] · [hc, wc] · [wc, gx]

for R = group·n rows a key head: n picked tokens times the `group` query heads that share that key head. Packed like
this they are the rows of one matrix product, so K is read once for the whole group and never repeated.

Two sweeps over K. `row_stats`: the online softmax (base 2: scale·log2(e) is folded into s) gives every row's max and
sum; the keys are shared out over programs, which leave partial ones. `small_map` merges those, recomputes
A = 2^(s − max) / sum, but only at canvas cells, gathering keys through `index`, and resamples at once: a canvas row
times cols is a line [R, gx] (a dot), and the line is added, times rows[:, y], to the few output rows it reaches.
`rows` is a narrow filter, so a program that owns BY output rows visits just the canvas rows with a weight there.

Backward: word_attention_backward.py. It needs out, max and sum, and recomputes A.

Memory, Llama-3.2 (h 32, t 512, p 6404, n 32, d 128, g 32, one picture). Eager: A alone is h·t·p fp32 = 400 MiB, 1.3 GiB
with its gradient and the scores. Picking rows first: h·n·p = 25 MiB each. Here: partial max and sum, 2·splits·h·n
(128 KiB). Work: 2 products of 2·h·n·p·d flops; eager does one of t/n times as much.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .shapes import check_dtype, check_word_attention

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_MASK, BOOL, FLOAT, CAUSAL = (tl.constexpr(i) for i in range(4))

# p_ pointer, s_ stride (b, h, t, p: of that axis), i_ index, m_ mask (True: real), b_ block. One text for every launch:
# p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_tokens, h, n, scale2 = scale·log2(e).
# Plain numbers, no tuples of strides: Triton 3.6 forgets inside loops that a stride in a tuple is 1 or a multiple of 16.


@triton.jit
def load_rows(p_row, m_row, D: tl.constexpr, BD: tl.constexpr):
    """[·, BD] from a pointer a row; 0 where m_row is False and beyond D."""
    i_d = tl.arange(0, BD)
    return tl.load(p_row[:, None] + i_d[None, :], mask=m_row[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def load_cols(p_cols, i_x, wc, gx, BGX: tl.constexpr):
    """cols[:, i_x] as [BGX, BX]."""
    i_gx = tl.arange(0, BGX)
    p = p_cols + i_gx[:, None] * wc + i_x[None, :]
    return tl.load(p, mask=(i_gx < gx)[:, None] & (i_x < wc)[None, :], other=0.0)


@triton.jit
def picture_and_head(i_bh, h, GROUP: tl.constexpr):
    hkv = h // GROUP
    return (i_bh // hkv).to(tl.int64), i_bh % hkv


@triton.jit
def pick(
    i_block, i_b, i_hkv, p_query, s_qb, s_qh, s_qt, p_mask, s_mb, s_mh, s_mt, p_tokens, h, n,
    GROUP: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Row r is picked token r // GROUP through query head i_hkv·GROUP + r % GROUP.

    Returns the token (−1: none), its place in [b, n, h], whether there is one, the query block, where its mask row starts.
    """
    r = i_block * BR + tl.arange(0, BR)
    i_n, head = r // GROUP, (i_hkv * GROUP + r % GROUP).to(tl.int64)
    token = tl.load(p_tokens + i_b * n + i_n, mask=i_n < n, other=-1).to(tl.int64)
    b_q = load_rows(p_query + i_b * s_qb + head * s_qh + token * s_qt, token >= 0, D, BD)
    return token, (i_b * n + i_n) * h + head, i_n < n, b_q, p_mask + i_b * s_mb + head * s_mh + token * s_mt


@triton.jit
def score(b_q, b_k, i_key, token, p_mask, s_mp, scale2, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """s in base 2, [BR, BK]: (q·k·scale + mask)·log2(e); −inf where there is no key (i_key < 0), no token, or it is masked."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale2
    m_s = (i_key >= 0)[None, :] & (token >= 0)[:, None]
    p_s = p_mask[:, None] + i_key[None, :] * s_mp
    if MASK == CAUSAL:
        m_s = m_s & (i_key[None, :] <= token[:, None])
    elif MASK == BOOL:
        m_s = m_s & (tl.load(p_s, mask=m_s, other=0) != 0)
    elif MASK == FLOAT:  # finfo.min·log2(e) must not become −inf: a row of finfo.min attends evenly, as in SDPA
        b_m = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
        b_s += tl.where(b_m == -float("inf"), b_m, tl.maximum(b_m * LOG2E, LOWEST))
    return tl.where(m_s, b_s, -float("inf"))


@triton.jit
def row_stats(
    p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_tokens, h, n, scale2,
    p_part, p, bnh, GROUP: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Partial max and sum of every row over one share of the keys: p_part [2, splits, b·n·h]."""
    i_split, splits = tl.program_id(1), tl.num_programs(1)
    i_b, i_hkv = picture_and_head(tl.program_id(2), h, GROUP)
    p_key += i_b * s_kb + i_hkv.to(tl.int64) * s_kh
    token, row, m_row, b_q, p_mask = pick(
        tl.program_id(0),
        i_b,
        i_hkv,
        p_query,
        s_qb,
        s_qh,
        s_qt,
        p_mask,
        s_mb,
        s_mh,
        s_mt,
        p_tokens,
        h,
        n,
        GROUP,
        D,
        BR,
        BD,
    )
    share = tl.cdiv(tl.cdiv(p, BK), splits) * BK
    b_max, b_sum = tl.full([BR], -float("inf"), tl.float32), tl.zeros([BR], tl.float32)
    for i in range(i_split * share, tl.minimum(p, (i_split + 1) * share), BK):
        i_key = i + tl.arange(0, BK)
        i_key = tl.where(i_key < p, i_key, -1)
        b_k = load_rows(p_key + i_key * s_kp, i_key >= 0, D, BD)
        b_s = score(b_q, b_k, i_key, token, p_mask, s_mp, scale2, MASK, PRECISION)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)  # −inf − (−inf) would be nan
        b_sum = b_sum * tl.exp2(b_max - b_ref) + tl.sum(tl.exp2(b_s - b_ref[:, None]), 1)
        b_max = b_new
    tl.store(p_part + i_split * bnh + row, b_max, mask=m_row)
    tl.store(p_part + (splits + i_split) * bnh + row, b_sum, mask=m_row)


@triton.jit
def small_map(
    p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_tokens, h, n, scale2,
    hc, wc, gy, gx, p_index, p_rows, p_cols, p_part, p_stats, p_out, splits, bnh,
    GROUP: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    BX: tl.constexpr, BGX: tl.constexpr, BS: tl.constexpr, BHC: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """BY output rows of the maps of BR rows: A at the canvas cells that reach them, times cols, times rows."""
    i_out = tl.program_id(1)
    i_b, i_hkv = picture_and_head(tl.program_id(2), h, GROUP)
    p_key += i_b * s_kb + i_hkv.to(tl.int64) * s_kh
    token, row, m_row, b_q, p_mask = pick(
        tl.program_id(0),
        i_b,
        i_hkv,
        p_query,
        s_qb,
        s_qh,
        s_qt,
        p_mask,
        s_mb,
        s_mh,
        s_mt,
        p_tokens,
        h,
        n,
        GROUP,
        D,
        BR,
        BD,
    )
    p_index, p_rows, p_cols = p_index + i_b * hc * wc, p_rows + i_b * gy * hc, p_cols + i_b * gx * wc

    # 1. merge the partial softmaxes; a row with no key left has sum 0 and gets A = 0
    i_s = tl.arange(0, BS)
    m_part = (i_s < splits)[:, None] & m_row[None, :]
    b_maxs = tl.load(p_part + i_s[:, None] * bnh + row[None, :], mask=m_part, other=-float("inf"))
    b_sums = tl.load(p_part + (splits + i_s)[:, None] * bnh + row[None, :], mask=m_part, other=0.0)
    b_max = tl.max(b_maxs, 0)
    b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.sum(b_sums * tl.exp2(b_maxs - b_max[None, :]), 0)
    b_inv = tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
    tl.store(p_stats + row, b_max, mask=m_row & (i_out == 0))
    tl.store(p_stats + bnh + row, b_inv, mask=m_row & (i_out == 0))

    # 2. the canvas rows that reach output rows i_gy: those with a weight
    i_gy, i_gx, i_y = i_out * BY + tl.arange(0, BY), tl.arange(0, BGX), tl.arange(0, BHC)
    m_w = (i_gy < gy)[:, None] & (i_y < hc)[None, :]
    live = tl.max((tl.load(p_rows + i_gy[:, None] * hc + i_y[None, :], mask=m_w, other=0.0) != 0).to(tl.int32), 0) > 0
    first, last = tl.min(tl.where(live, i_y, hc)), tl.max(tl.where(live, i_y + 1, 0))

    # 3. each becomes a line [BR, gx], which is added where it reaches
    b_out = tl.zeros([BR, BY, BGX], tl.float32)
    for y in range(first, last):
        b_line = tl.zeros([BR, BGX], tl.float32)
        for x in range(0, wc, BX):
            i_x = x + tl.arange(0, BX)
            i_key = tl.load(p_index + y * wc + i_x, mask=i_x < wc, other=-1)
            b_k = load_rows(p_key + i_key * s_kp, i_key >= 0, D, BD)
            b_s = score(b_q, b_k, i_key, token, p_mask, s_mp, scale2, MASK, PRECISION)
            b_a = tl.exp2(b_s - b_max[:, None])  # A·sum, [BR, BX]
            b_line = tl.dot(b_a, tl.trans(load_cols(p_cols, i_x, wc, gx, BGX)), b_line, input_precision=PRECISION)
        weight = tl.load(p_rows + i_gy * hc + y, mask=i_gy < gy, other=0.0)
        b_out += b_line[:, None, :] * weight[None, :, None]
    p_out += (row * gy)[:, None, None] * gx + (i_gy * gx)[None, :, None] + i_gx[None, None, :]
    m_out = m_row[:, None, None] & (i_gy < gy)[None, :, None] & (i_gx < gx)[None, None, :]
    tl.store(p_out, b_out * b_inv[:, None, None], mask=m_out)


def blocks(group: int, n: int, d: int, dtype: torch.dtype) -> dict:
    """Block sizes and warps, the same on every GPU. No spills on sm_80, 86, 89, 90 at the sizes of `aot.py`, mask included.

    Tried by compiling (no GPU at hand, so by registers and shared memory, not by time): 4 warps at 64 rows spill with a mask, whose
    pointers alone take 64 registers a thread; 64 keys a step spill in small_map; BY·gx = 128 output cells a row spill there on
    sm_86, 64 do not. fp32 goes through tf32x3 (three TF32 products a product), which needs three times the operand registers: 16
    rows, 16 keys; "ieee" would need no tensor core and be right as well, several times slower.
    """
    bd = max(16, triton.next_power_of_2(d))
    small = dtype == torch.float32 or bd > 128
    rows = min(16 if small else 64, max(16, triton.next_power_of_2(n * group)))
    few = rows == 16 and not small  # 16 rows are one tensor-core tile: too few for 8 warps
    return {"BR": rows, "BD": bd, "BX": 16 if small else 32, "BK": 32 if small else 64, "num_warps": 4 if few else 8}


def arguments(query: Tensor, key: Tensor, mask: Tensor, tokens: Tensor, scale: float) -> tuple:
    """What every launch starts with."""
    numbers = query.shape[1], tokens.shape[1], scale * LOG2E.value
    return (query, *query.stride()[:3], key, *key.stride()[:3], mask, *mask.stride(), tokens, *numbers)


class WordAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, tokens, index, rows, cols, mask, kind, scale):
        (b, h, _, d), (hkv, p), n = query.shape, key.shape[1:3], tokens.shape[1]
        hc, _, gy, gx = canvas = (*index.shape[1:], rows.shape[1], cols.shape[1])
        size = blocks(h // hkv, n, d, query.dtype)
        meta = {
            "GROUP": h // hkv, "D": d, "MASK": kind, "BR": size["BR"], "BD": size["BD"], "num_warps": size["num_warps"],
            "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",  # of fp32 operands; half ones go in as they are
        }  # fmt: skip
        row_blocks, bnh = triton.cdiv(n * h // hkv, size["BR"]), b * n * h
        # about 256 programs whatever the GPU, so sums have one order everywhere; and few enough that partial dq stay small
        splits = max(1, min(16, 256 // (row_blocks * b * hkv), p // (4 * d)))
        part, stats = (query.new_empty(2, s, bnh, dtype=torch.float32) for s in (splits, 1))
        out = query.new_empty(b, n, h, gy, gx, dtype=torch.float32)
        call = arguments(query, key, mask, tokens, scale)
        row_stats[row_blocks, splits, b * hkv](*call, part, p, bnh, **meta, BK=size["BK"])
        shape = {"BX": size["BX"], "BGX": max(16, triton.next_power_of_2(gx))}
        by = max(1, min(triton.next_power_of_2(gy), 4096 // (size["BR"] * shape["BGX"])))
        small_map[row_blocks, triton.cdiv(gy, by), b * hkv](
            *call, *canvas, index, rows, cols, part, stats, out, splits, bnh, **meta, **shape,
            BS=triton.next_power_of_2(splits), BHC=triton.next_power_of_2(hc), BY=by,
        )  # fmt: skip
        ctx.save_for_backward(query, key, tokens, index, rows, cols, mask, out, stats)
        ctx.plan = (meta, shape | {"BGY": triton.next_power_of_2(gy)}, row_blocks, splits, canvas, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        from .word_attention_backward import gradients  # here, because that file uses the tiles of this one

        dquery, dkey = gradients(ctx.needs_input_grad[:2], dout, *ctx.saved_tensors, *ctx.plan)
        return dquery, dkey, *(None,) * 7


def word_attention(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b hkv p d"],
    tokens: Int[Tensor, "b n"],
    layout,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b n h gy gx"]:
    """See lavender_min.ops.word_attention. Strides of query, key and mask are passed on, nothing large is copied.

    Each key in one cell at most, index in [−1, p), tokens in [−1, t): not checked here, as reading them would wait for the GPU.
    """
    sizes = check_word_attention(query, key, tokens, layout, attn_mask, is_causal)
    check_dtype("word_attention (Triton)", "query", query, (torch.float32, torch.float16, torch.bfloat16))
    for name, limit in (("d", 256), ("gx", 128), ("gy", 1024), ("hc", 1024)):
        if sizes[name] > limit:
            raise ValueError(
                f"word_attention: the Triton kernel takes {name} up to {limit}; got {sizes[name]}; use backend='torch'"
            )
    kind, mask = NO_MASK, query.new_empty(1).expand(1, 1, 1, 1)  # a pointer that is not read
    if is_causal:
        kind = CAUSAL
    elif attn_mask is not None:
        kind = BOOL if attn_mask.dtype == torch.bool else FLOAT
        mask = attn_mask.view(torch.uint8) if kind is BOOL else attn_mask
        mask = mask.expand(*(sizes[axis] for axis in "bhtp"))
    if not (sizes["n"] and sizes["b"]):
        return query.new_zeros(*(sizes[axis] for axis in ("b", "n", "h", "gy", "gx")), dtype=torch.float32)
    index, tokens = layout.index.int().contiguous(), tokens.int().contiguous()
    rows, cols = layout.resize_y.float().contiguous(), layout.resize_x.float().contiguous()
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))  # each vector in one piece
    scale = sizes["d"] ** -0.5 if scale is None else scale
    return WordAttention.apply(query, key, tokens, index, rows, cols, mask, kind.value, scale)
