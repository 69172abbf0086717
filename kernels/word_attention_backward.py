"""word_attention, backward. Symbols and dot rows as in word_attention.py.

Resampling is linear: dA at a cell is (resize_yᵀ · dout · resize_x)[y, x], and 0 for a key outside the layout. For dot row r

    dS_rp = A_rp·(dA_rp − δ_r)     δ_r = Σ_p A_rp·dA_rp = Σ_g out_rg·dout_rg
    dq_r = scale·Σ_p dS_rp·k_p     dk_p = scale·Σ_r dS_rp·q_r

δ comes from the small map, exactly, with no sweep over the keys. Keys outside the layout have dS = −A·δ: they count too.

`key_order` lists the keys once: canvas cells row by row (a canvas row filled up to whole blocks), then the keys in no
cell. A block of that list lies in one canvas row y, so its dA is one line [BR, gx] = Σ_gy resize_y[gy, y]·dout[gy],
times resize_x. `query_gradient` walks a share of the list for a block of dot rows. `sum_query_gradient` adds up the
shares for every query row t, over all picked rows that are t (one may be picked twice). `key_gradient` owns a block of
keys and walks the dot rows of its picture.

No atomics: every number is written by one program, in a fixed order, so two runs are bit-equal. Memory: the order (p
int32) and splits ≤ 16 partial dq of h·n·d; 4·splits·d ≤ p keeps those under a quarter of h·n·p where p > 4d. Work: 4
products of 2·h·n·p·d flops (A twice: once along the keys for dq, once along the dot rows for dk).

Tried on paper and left: one sweep for dq and dk together, which needs a partial dq for every key block, more than h·n·p;
dq from Σ_p A_p·dA_p·k_p − δ·Σ_p A_p·k_p with the second sum from the forward, which cancels badly in bf16 when dA is flat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import strides
from .word_attention_tiles import (
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

# output rows that a canvas row usually reaches when a canvas is shrunk
TAPS = tl.constexpr(4)


@triton.jit
def key_order(p_index, p_inside, p_order, p_count, p, hc, wc, slots, BX: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of BX keys: canvas row by canvas row (−1 fills up), then those in no cell; p_count: blocks of the latter."""
    i_b = tl.program_id(0)
    p_index, p_inside, p_order = p_index + i_b * hc * wc, p_inside + i_b * p, p_order + i_b * slots
    width = tl.cdiv(wc, BX) * BX
    cells = hc * width
    for i in range(0, cells, BLOCK):
        slot = i + tl.arange(0, BLOCK)
        y, x = slot // width, slot % width
        i_key = tl.load(p_index + y * wc + x, mask=(y < hc) & (x < wc), other=-1)
        tl.store(p_order + slot, i_key, mask=slot < cells)
        tl.store(p_inside + i_key, tl.full([BLOCK], 1, tl.int8), mask=i_key >= 0)
    # other threads of this program read the marks
    tl.debug_barrier()
    count = 0
    for i in range(0, p, BLOCK):
        i_key = i + tl.arange(0, BLOCK)
        free = (tl.load(p_inside + i_key, mask=i_key < p, other=1) == 0).to(tl.int32)
        tl.store(p_order + cells + count + tl.cumsum(free, 0) - 1, i_key, mask=free > 0)
        count += tl.sum(free)
    blocks = tl.cdiv(count, BX)
    fill = count + tl.arange(0, BX)
    tl.store(p_order + cells + fill, tl.full([BX], -1, tl.int32), mask=fill < blocks * BX)
    tl.store(p_count + i_b, blocks)


@triton.jit
def span(p_resize_y, y, inside, hc, gy, BGY: tl.constexpr):
    """The output rows [from, to) that canvas row y reaches; (gy, 0) for the keys outside."""
    i_g = tl.arange(0, BGY)
    live = tl.load(p_resize_y + i_g * hc + y, mask=(i_g < gy) & inside, other=0.0) != 0
    return tl.min(tl.where(live, i_g, gy)), tl.max(tl.where(live, i_g + 1, 0))


@triton.jit
def gradient_line(p_dout, i_nh, m_nh, p_resize_y, y, inside, g0, hc, gy, gx, BR: tl.constexpr, BGX: tl.constexpr):
    """TAPS terms of Σ_gy resize_y[gy, y]·dout[gy], [BR, BGX]: what canvas row y gets back, still over output columns."""
    i_gx = tl.arange(0, BGX)
    b_line = tl.zeros([BR, BGX], tl.float32)
    for tap in tl.static_range(TAPS):
        m_g = inside & (g0 + tap < gy)
        p_tap = p_dout + ((i_nh * gy + g0 + tap) * gx)[:, None] + i_gx[None, :]
        weight = tl.load(p_resize_y + (g0 + tap) * hc + y, mask=m_g, other=0.0)
        b_line += weight * tl.load(p_tap, mask=m_nh[:, None] & (i_gx < gx)[None, :] & m_g, other=0.0)
    return b_line


@triton.jit
def row_state(p_stats, p_delta, i_nh, m_nh, nh):
    """max, 1 / sum and δ of the dot rows."""
    b_max, b_inv = tl.load(p_stats + i_nh, mask=m_nh, other=0.0), tl.load(p_stats + nh + i_nh, mask=m_nh, other=0.0)
    return b_max, b_inv, tl.load(p_delta + i_nh, mask=m_nh, other=0.0)


@triton.jit
def score_gradient(b_s, b_line, b_resize_x, b_max, b_inv, b_delta, PRECISION: tl.constexpr):
    """dS = A·(dA − δ), [BR, BX], with dA = line·resize_x: 0 for keys outside, whose line is 0."""
    b_da = tl.dot(b_line, b_resize_x, input_precision=PRECISION)
    return tl.exp2(b_s - b_max[:, None]) * b_inv[:, None] * (b_da - b_delta[:, None])


@triton.jit
def gradient_dot(b_ds, b_x, b_acc, PRECISION: tl.constexpr):
    """acc + dS·x. dS may be 1e-8: fine in bf16, but 0 in fp16, so there x is widened and the product is TF32."""
    if b_x.dtype == tl.float16:
        b_x = b_x.to(tl.float32)
    return tl.dot(b_ds.to(b_x.dtype), b_x, b_acc, input_precision=PRECISION)


@triton.jit
def query_gradient(
    p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_rows, p_offsets, h, nh, scale2,
    hc, wc, gy, gx, p_resize_y, p_resize_x, p_stats, p_delta, p_order, p_count, p_dout, slots, p_part,
    GROUP: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    BX: tl.constexpr, BGX: tl.constexpr, BGY: tl.constexpr,
):  # fmt: skip
    """Σ_p dS_rp·k_p over one share of the canvas rows and of the keys outside: p_part [splits, n·h, D]."""
    i_block, i_split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i_b, i_hkv = picture_and_head(tl.program_id(2), h, GROUP)
    if i_block * BR >= dot_rows(p_offsets, i_b, GROUP):
        return
    p_key += i_b * s_kb + i_hkv.to(tl.int64) * s_kh
    i_t, i_nh, m_nh, b_q, p_mask = pick(
        i_block, i_b, i_hkv, p_query, s_qb, s_qh, s_qt, p_mask, s_mb, s_mh, s_mt, p_rows, p_offsets, h, GROUP, D, BR, BD
    )  # fmt: skip
    p_order, p_resize_y, p_resize_x = p_order + i_b * slots, p_resize_y + i_b * gy * hc, p_resize_x + i_b * gx * wc
    b_max, b_inv, b_delta = row_state(p_stats, p_delta, i_nh, m_nh, nh)
    nx, blocks, i_d = tl.cdiv(wc, BX), tl.load(p_count + i_b), tl.arange(0, BD)
    b_dq = tl.zeros([BR, BD], tl.float32)
    end = (i_split + 1) * hc // splits
    # the last turn is for the keys outside
    for y in range(i_split * hc // splits, end + 1):
        inside = y < end
        b_line = tl.zeros([BR, BGX], tl.float32)
        g0, g1 = span(p_resize_y, y, inside, hc, gy, BGY)
        for g in range(g0, g1, TAPS):
            b_line += gradient_line(p_dout, i_nh, m_nh, p_resize_y, y, inside, g, hc, gy, gx, BR, BGX)
        first = tl.where(inside, y * nx, hc * nx + i_split * blocks // splits)
        last = tl.where(inside, y * nx + nx, hc * nx + (i_split + 1) * blocks // splits)
        for i in range(first, last):
            i_key = tl.load(p_order + i * BX + tl.arange(0, BX))
            b_k = load_vectors(p_key + i_key * s_kp, i_key >= 0, D, BD)
            b_s = score(b_q, b_k, i_key, i_t, p_mask, s_mp, scale2, MASK, PRECISION)
            b_resize_x = load_resize_x(p_resize_x, (i - first) * BX + tl.arange(0, BX), wc, gx, BGX)
            b_ds = score_gradient(b_s, b_line, b_resize_x, b_max, b_inv, b_delta, PRECISION)
            b_dq = gradient_dot(b_ds, b_k, b_dq, PRECISION)
    p_part += (i_split * nh + i_nh)[:, None] * D + i_d[None, :]
    tl.store(p_part, b_dq, mask=m_nh[:, None] & (i_d < D)[None, :])


@triton.jit
def sum_query_gradient(
    p_part, p_rows, p_offsets, p_dquery, s_db, s_dh, s_dt, h, nh, splits, scale,
    D: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dquery of query row i_t: the partial sums of every picked row of the picture that is i_t; 0 if there is none."""
    i_t, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.load(p_offsets + i_b)
    count = tl.load(p_offsets + i_b + 1) - first
    p_rows += first
    i_d, i_n = tl.arange(0, BD), tl.arange(0, BN)
    head = (tl.program_id(2) * BH + tl.arange(0, BH)).to(tl.int64)
    m = (head < h)[:, None] & (i_d < D)[None, :]
    b_dq = tl.zeros([BH, BD], tl.float32)
    if tl.sum((tl.load(p_rows + i_n, mask=i_n < count, other=-1) == i_t).to(tl.int32)) > 0:
        for i in range(0, count):
            if tl.load(p_rows + i) == i_t:
                i_nh = (first + i) * h + head
                for i_split in range(0, splits):
                    b_dq += tl.load(p_part + (i_split * nh + i_nh)[:, None] * D + i_d[None, :], mask=m, other=0.0)
    p_dquery += i_b * s_db + head[:, None] * s_dh + i_t * s_dt + i_d[None, :]
    tl.store(p_dquery, (b_dq * scale).to(p_dquery.dtype.element_ty), mask=m)


@triton.jit
def key_gradient(
    p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_rows, p_offsets, h, nh, scale2,
    hc, wc, gy, gx, p_resize_y, p_resize_x, p_stats, p_delta, p_order, p_count, p_dout, slots, p_dkey, s_db, s_dh, s_dp, scale,
    GROUP: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    BX: tl.constexpr, BGX: tl.constexpr, BGY: tl.constexpr,
):  # fmt: skip
    """dkey of one block of the key order: Σ_r dS_rp·q_r, walking all dot rows of the picture and key head."""
    i = tl.program_id(0)
    i_b, i_hkv = picture_and_head(tl.program_id(1), h, GROUP)
    nx, i_d = tl.cdiv(wc, BX), tl.arange(0, BD)
    if i >= hc * nx + tl.load(p_count + i_b):
        return
    p_key += i_b * s_kb + i_hkv.to(tl.int64) * s_kh
    p_resize_y, p_resize_x = p_resize_y + i_b * gy * hc, p_resize_x + i_b * gx * wc
    inside, y = i < hc * nx, tl.minimum(i // nx, hc)
    i_key = tl.load(p_order + i_b * slots + i * BX + tl.arange(0, BX))
    b_k = load_vectors(p_key + i_key * s_kp, i_key >= 0, D, BD)
    b_resize_x = load_resize_x(p_resize_x, (i - y * nx) * BX + tl.arange(0, BX), wc, gx, BGX)
    b_dk = tl.zeros([BX, BD], tl.float32)
    g0, g1 = span(p_resize_y, y, inside, hc, gy, BGY)
    # dS is linear in dA: a canvas row that reaches more than TAPS output rows (an enlarged one) takes turns, δ in the first
    for g in range(g0, tl.maximum(g1, g0 + 1), TAPS):
        for i_block in range(0, tl.cdiv(dot_rows(p_offsets, i_b, GROUP), BR)):
            i_t, i_nh, m_nh, b_q, p_mask_t = pick(
                i_block, i_b, i_hkv, p_query, s_qb, s_qh, s_qt, p_mask, s_mb, s_mh, s_mt, p_rows, p_offsets, h, GROUP, D, BR, BD
            )  # fmt: skip
            b_max, b_inv, b_delta = row_state(p_stats, p_delta, i_nh, m_nh, nh)
            b_s = score(b_q, b_k, i_key, i_t, p_mask_t, s_mp, scale2, MASK, PRECISION)
            b_line = gradient_line(p_dout, i_nh, m_nh, p_resize_y, y, inside, g, hc, gy, gx, BR, BGX)
            b_ds = score_gradient(b_s, b_line, b_resize_x, b_max, b_inv, tl.where(g == g0, b_delta, 0.0), PRECISION)
            b_dk = gradient_dot(tl.trans(b_ds), b_q, b_dk, PRECISION)
    p_dkey += i_b * s_db + i_hkv.to(tl.int64) * s_dh + i_key[:, None] * s_dp + i_d[None, :]
    tl.store(p_dkey, (b_dk * scale).to(p_dkey.dtype.element_ty), mask=(i_key >= 0)[:, None] & (i_d < D)[None, :])


def gradients(
    inputs: Inputs, plan: Plan, out: Tensor, stats: Tensor, dout: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dquery and dkey (None where not needed), in the dtype and strides of query and key."""
    query, key = inputs.query, inputs.key
    (b, h, t, d), (hkv, p), n = query.shape, key.shape[1:3], len(inputs.rows)
    call, canvas = shared_arguments(inputs, plan), canvas_arguments(inputs, plan)
    hc, wc, gy, bx = (canvas[name] for name in ("hc", "wc", "gy", "BX"))
    slots = (hc * triton.cdiv(wc, bx) + triton.cdiv(p, bx)) * bx
    order, count = inputs.index.new_empty(b, slots), inputs.index.new_empty(b)
    inside = inputs.index.new_zeros(b, p, dtype=torch.int8)
    key_order[b,](
        p_index=inputs.index, p_inside=inside, p_order=order, p_count=count, p=p, hc=hc, wc=wc, slots=slots, BX=bx, BLOCK=1024
    )  # fmt: skip

    dout = dout.float().contiguous()
    common = call | canvas | {
        "p_stats": stats, "p_delta": torch.linalg.vecdot(out.flatten(2), dout.flatten(2)), "p_dout": dout,
        "p_order": order, "p_count": count, "slots": slots, "BGY": triton.next_power_of_2(gy),
    }  # fmt: skip
    dquery = dkey = None
    if needs[0]:
        dquery, part = dense_like(query), query.new_empty(plan.splits, n * h, d, dtype=torch.float32)
        query_gradient[plan.row_blocks, plan.splits, b * hkv](**common, p_part=part)
        bh = max(1, min(triton.next_power_of_2(h), 4096 // call["BD"]))
        sum_query_gradient[t, b, triton.cdiv(h, bh)](
            p_part=part, p_rows=inputs.rows, p_offsets=inputs.offsets, p_dquery=dquery, **strides("d", "bht", dquery),
            h=h, nh=n * h, splits=plan.splits, scale=plan.scale,
            D=d, BN=triton.next_power_of_2(max(1, plan.longest)), BH=bh, BD=call["BD"],
        )  # fmt: skip
        # its room goes to dkey
        del part
    if needs[1]:
        dkey = dense_like(key)
        # Dot rows in blocks of 64 would spill on sm_90; so would, in fp32, more than one stage of prefetching.
        mine = common | {"BR": min(32, call["BR"]), "num_stages": 1 if query.dtype == torch.float32 else 2}
        key_gradient[slots // bx, b * hkv](**mine, p_dkey=dkey, **strides("d", "bhp", dkey), scale=plan.scale)
    return dquery, dkey


def dense_like(x: Tensor) -> Tensor:
    """Room for a gradient, strided as x where x is dense, its vectors in one piece."""
    dx = torch.empty_like(x)
    return dx if dx.stride(-1) == 1 else x.new_empty(x.shape)
