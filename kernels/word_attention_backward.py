"""word_attention, backward. Symbols as in word_attention.py.

Resampling is linear: dA at a cell is (rowsᵀ · dout_r · cols)[y, x], and 0 for a key outside the layout.

    dS_rp = A_rp·(dA_rp − δ_r)     δ_r = Σ_p A_rp·dA_rp = Σ_g out_rg·dout_rg
    dq_r = scale·Σ_p dS_rp·k_p     dk_p = scale·Σ_r dS_rp·q_r

δ comes from the small map, exactly, with no sweep over the keys. Keys outside the layout have dS = −A·δ: they count too.

`key_order` lists the keys once: canvas cells row by row (a row filled up to whole blocks), then the keys in no cell. A
block of that list lies in one canvas row y, so its dA is one line [R, gx] = Σ_gy rows[gy, y]·dout_r[gy] times cols.
`query_gradient` walks a share of the list for a block of rows; `sum_query_gradient` adds up the shares of all rows that
picked token t (a token may be picked twice). `key_gradient` owns a block of keys and walks the rows.

No atomics: every number is written by one program, in a fixed order, so two runs are bit-equal. Memory: the order (p
int32) and splits ≤ 16 partial dq of h·n·d; 4·splits·d ≤ p keeps those under a quarter of h·n·p where p > 4d. Work: 4
products of 2·h·n·p·d flops (A twice: once along the keys for dq, once along the rows for dk).

Tried on paper and left: one sweep for dq and dk together, which needs a partial dq for every key block, more than h·n·p;
dq from Σ_p A_p·dA_p·k_p − δ·Σ_p A_p·k_p with the second sum from the forward, which cancels badly in bf16 when dA is flat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .word_attention import arguments, load_cols, load_rows, pick, picture_and_head, score

TAPS = tl.constexpr(4)  # output rows that a canvas row usually reaches when a canvas is shrunk


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
    tl.debug_barrier()  # other threads of this program read the marks
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
def span(p_rows, y, inside, hc, gy, BGY: tl.constexpr):
    """The output rows [from, to) that canvas row y reaches; (gy, 0) for the keys outside."""
    i_g = tl.arange(0, BGY)
    live = tl.load(p_rows + i_g * hc + y, mask=(i_g < gy) & inside, other=0.0) != 0
    return tl.min(tl.where(live, i_g, gy)), tl.max(tl.where(live, i_g + 1, 0))


@triton.jit
def gradient_line(p_dout, row, m_row, p_rows, y, inside, g0, hc, gy, gx, BR: tl.constexpr, BGX: tl.constexpr):
    """TAPS terms of Σ_gy rows[gy, y]·dout_r[gy], [BR, BGX]: what canvas row y gets back, still over output columns."""
    i_gx = tl.arange(0, BGX)
    b_line = tl.zeros([BR, BGX], tl.float32)
    for tap in tl.static_range(TAPS):
        m_g = inside & (g0 + tap < gy)
        p_tap = p_dout + ((row * gy + g0 + tap) * gx)[:, None] + i_gx[None, :]
        weight = tl.load(p_rows + (g0 + tap) * hc + y, mask=m_g, other=0.0)
        b_line += weight * tl.load(p_tap, mask=m_row[:, None] & (i_gx < gx)[None, :] & m_g, other=0.0)
    return b_line


@triton.jit
def row_state(p_stats, p_delta, row, m_row, bnh):
    """max, 1 / sum and δ of the rows."""
    b_max, b_inv = tl.load(p_stats + row, mask=m_row, other=0.0), tl.load(p_stats + bnh + row, mask=m_row, other=0.0)
    return b_max, b_inv, tl.load(p_delta + row, mask=m_row, other=0.0)


@triton.jit
def score_gradient(b_s, b_line, b_cols, b_max, b_inv, b_delta, PRECISION: tl.constexpr):
    """dS = A·(dA − δ), [BR, BX], with dA = line·cols: 0 for keys outside, whose line is 0."""
    b_da = tl.dot(b_line, b_cols, input_precision=PRECISION)
    return tl.exp2(b_s - b_max[:, None]) * b_inv[:, None] * (b_da - b_delta[:, None])


@triton.jit
def gradient_dot(b_ds, b_x, b_acc, PRECISION: tl.constexpr):
    """acc + dS·x. dS may be 1e-8: fine in bf16, but 0 in fp16, so there x is widened and the product is TF32."""
    if b_x.dtype == tl.float16:
        b_x = b_x.to(tl.float32)
    return tl.dot(b_ds.to(b_x.dtype), b_x, b_acc, input_precision=PRECISION)


@triton.jit
def query_gradient(
    p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_tokens, h, n, scale2,
    hc, wc, gy, gx, p_stats, p_delta, p_order, p_count, p_rows, p_cols, p_dout, slots, bnh, p_part,
    GROUP: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    BX: tl.constexpr, BGX: tl.constexpr, BGY: tl.constexpr,
):  # fmt: skip
    """Σ_p dS_rp·k_p over one share of the canvas rows and of the keys outside: p_part [splits, b·n·h, D]."""
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
    p_order, p_rows, p_cols = p_order + i_b * slots, p_rows + i_b * gy * hc, p_cols + i_b * gx * wc
    b_max, b_inv, b_delta = row_state(p_stats, p_delta, row, m_row, bnh)
    nx, blocks, i_d = tl.cdiv(wc, BX), tl.load(p_count + i_b), tl.arange(0, BD)
    b_dq = tl.zeros([BR, BD], tl.float32)
    end = (i_split + 1) * hc // splits
    for y in range(i_split * hc // splits, end + 1):  # the last turn is for the keys outside
        inside = y < end
        b_line = tl.zeros([BR, BGX], tl.float32)
        g0, g1 = span(p_rows, y, inside, hc, gy, BGY)
        for g in range(g0, g1, TAPS):
            b_line += gradient_line(p_dout, row, m_row, p_rows, y, inside, g, hc, gy, gx, BR, BGX)
        first = tl.where(inside, y * nx, hc * nx + i_split * blocks // splits)
        last = tl.where(inside, y * nx + nx, hc * nx + (i_split + 1) * blocks // splits)
        for i in range(first, last):
            i_key = tl.load(p_order + i * BX + tl.arange(0, BX))
            b_k = load_rows(p_key + i_key * s_kp, i_key >= 0, D, BD)
            b_s = score(b_q, b_k, i_key, token, p_mask, s_mp, scale2, MASK, PRECISION)
            b_cols = load_cols(p_cols, (i - first) * BX + tl.arange(0, BX), wc, gx, BGX)
            b_ds = score_gradient(b_s, b_line, b_cols, b_max, b_inv, b_delta, PRECISION)
            b_dq = gradient_dot(b_ds, b_k, b_dq, PRECISION)
    p_part += (i_split * bnh + row)[:, None] * D + i_d[None, :]
    tl.store(p_part, b_dq, mask=m_row[:, None] & (i_d < D)[None, :])


@triton.jit
def sum_query_gradient(
    p_part, p_tokens, p_dquery, s_db, s_dh, s_dt, h, n, splits, bnh, scale,
    D: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dquery of text token i_t: the partial sums of every picked row with that token; 0 if there is none."""
    i_t, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_d, i_n = tl.arange(0, BD), tl.arange(0, BN)
    head = (tl.program_id(2) * BH + tl.arange(0, BH)).to(tl.int64)
    m = (head < h)[:, None] & (i_d < D)[None, :]
    b_dq = tl.zeros([BH, BD], tl.float32)
    if tl.sum((tl.load(p_tokens + i_b * n + i_n, mask=i_n < n, other=-1) == i_t).to(tl.int32)) > 0:
        for j in range(0, n):
            if tl.load(p_tokens + i_b * n + j) == i_t:
                row = (i_b * n + j) * h + head
                for i_split in range(0, splits):
                    b_dq += tl.load(p_part + (i_split * bnh + row)[:, None] * D + i_d[None, :], mask=m, other=0.0)
    p_dquery += i_b * s_db + head[:, None] * s_dh + i_t * s_dt + i_d[None, :]
    tl.store(p_dquery, (b_dq * scale).to(p_dquery.dtype.element_ty), mask=m)


@triton.jit
def key_gradient(
    p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_tokens, h, n, scale2,
    hc, wc, gy, gx, p_stats, p_delta, p_order, p_count, p_rows, p_cols, p_dout, slots, bnh, p_dkey, s_db, s_dh, s_dp, scale,
    GROUP: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    BX: tl.constexpr, BGX: tl.constexpr, BGY: tl.constexpr,
):  # fmt: skip
    """dkey of one block of the key order: Σ_r dS_rp·q_r, walking all rows of the key head."""
    i = tl.program_id(0)
    i_b, i_hkv = picture_and_head(tl.program_id(1), h, GROUP)
    p_key += i_b * s_kb + i_hkv.to(tl.int64) * s_kh
    nx, i_d = tl.cdiv(wc, BX), tl.arange(0, BD)
    if i >= hc * nx + tl.load(p_count + i_b):
        return
    p_rows, p_cols = p_rows + i_b * gy * hc, p_cols + i_b * gx * wc
    inside, y = i < hc * nx, tl.minimum(i // nx, hc)
    i_key = tl.load(p_order + i_b * slots + i * BX + tl.arange(0, BX))
    b_k = load_rows(p_key + i_key * s_kp, i_key >= 0, D, BD)
    b_cols = load_cols(p_cols, (i - y * nx) * BX + tl.arange(0, BX), wc, gx, BGX)
    b_dk = tl.zeros([BX, BD], tl.float32)
    g0, g1 = span(p_rows, y, inside, hc, gy, BGY)
    # dS is linear in dA: a canvas row that reaches more than TAPS output rows (an enlarged one) takes turns, δ in the first
    for g in range(g0, tl.maximum(g1, g0 + 1), TAPS):
        for i_block in range(0, tl.cdiv(n * GROUP, BR)):
            token, row, m_row, b_q, p_mask_row = pick(
                i_block, i_b, i_hkv, p_query, s_qb, s_qh, s_qt, p_mask, s_mb, s_mh, s_mt, p_tokens, h, n,
                GROUP, D, BR, BD,
            )  # fmt: skip
            b_max, b_inv, b_delta = row_state(p_stats, p_delta, row, m_row, bnh)
            b_s = score(b_q, b_k, i_key, token, p_mask_row, s_mp, scale2, MASK, PRECISION)
            b_line = gradient_line(p_dout, row, m_row, p_rows, y, inside, g, hc, gy, gx, BR, BGX)
            b_ds = score_gradient(b_s, b_line, b_cols, b_max, b_inv, tl.where(g == g0, b_delta, 0.0), PRECISION)
            b_dk = gradient_dot(tl.trans(b_ds), b_q, b_dk, PRECISION)
    p_dkey += i_b * s_db + i_hkv.to(tl.int64) * s_dh + i_key[:, None] * s_dp + i_d[None, :]
    tl.store(p_dkey, (b_dk * scale).to(p_dkey.dtype.element_ty), mask=(i_key >= 0)[:, None] & (i_d < D)[None, :])


def gradients(
    needs: tuple[bool, bool], dout: Tensor,
    query: Tensor, key: Tensor, tokens: Tensor, index: Tensor, rows: Tensor, cols: Tensor, mask: Tensor, out: Tensor, stats: Tensor,
    meta: dict, shape: dict, row_blocks: int, splits: int, canvas: tuple[int, ...], scale: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dquery and dkey (None where not needed), in the dtype and strides of query and key."""
    (b, h, t, d), (hkv, p), n, (hc, wc, _, _) = query.shape, key.shape[1:3], tokens.shape[1], canvas
    bnh, bx, dout = b * n * h, shape["BX"], dout.float().contiguous()
    delta = torch.linalg.vecdot(out.flatten(3), dout.flatten(3))
    slots = (hc * triton.cdiv(wc, bx) + triton.cdiv(p, bx)) * bx
    order, count, inside = tokens.new_empty(b, slots), tokens.new_empty(b), tokens.new_zeros(b, p, dtype=torch.int8)
    key_order[b,](index, inside, order, count, p, hc, wc, slots, BX=bx, BLOCK=1024)

    call = arguments(query, key, mask, tokens, scale)
    common = (*call, *canvas, stats, delta, order, count, rows, cols, dout, slots, bnh)
    dquery = dkey = None
    if needs[0]:
        dquery, part = dense_like(query), query.new_empty(splits, bnh, d, dtype=torch.float32)
        query_gradient[row_blocks, splits, b * hkv](*common, part, **meta, **shape)
        bh = max(1, min(triton.next_power_of_2(h), 4096 // meta["BD"]))
        sum_query_gradient[t, b, triton.cdiv(h, bh)](
            part, tokens, dquery, *dquery.stride()[:3], h, n, splits, bnh, scale,
            D=d, BN=triton.next_power_of_2(n), BH=bh, BD=meta["BD"],
        )  # fmt: skip
        del part  # its room goes to dkey
    if needs[1]:
        dkey = dense_like(key)
        # 64 rows (on sm_90) or, in fp32, more than one stage of prefetching would spill
        mine = meta | {"BR": min(32, meta["BR"]), "num_stages": 1 if query.dtype == torch.float32 else 2}
        key_gradient[slots // bx, b * hkv](*common, dkey, *dkey.stride()[:3], scale, **mine, **shape)
    return dquery, dkey


def dense_like(x: Tensor) -> Tensor:
    """Room for a gradient, strided as x where x is dense, its vectors in one piece."""
    dx = torch.empty_like(x)
    return dx if dx.stride(-1) == 1 else x.new_empty(x.shape)
