"""word_attention: what its forward and its backward share. Symbols as in word_attention.py.

First the tiles: pieces of kernels that load a block or score it. Then what the launches share: the tensors of a call,
the plan of its work, and the arguments made of both.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import strides

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_MASK, BOOL, FLOAT, CAUSAL = (tl.constexpr(i) for i in range(4))

# p_ pointer, s_ stride (b, h, t, p: of that axis), i_ index, m_ mask (True: real), b_ block. Every kernel over dot rows begins with
# p_query, s_qb, s_qh, s_qt, p_key, s_kb, s_kh, s_kp, p_mask, s_mb, s_mh, s_mt, s_mp, p_rows, p_offsets, h, nh, scale2.
# There are nh = n·h maps; scale2 = scale·log2(e).
# Plain numbers, no tuples of strides: Triton 3.6 forgets inside loops that a stride in a tuple is 1 or a multiple of 16.


@triton.jit
def load_vectors(p_vector, m_vector, D: tl.constexpr, BD: tl.constexpr):
    """[·, BD] from a pointer to each vector; 0 where m_vector is False and beyond D."""
    i_d = tl.arange(0, BD)
    return tl.load(p_vector[:, None] + i_d[None, :], mask=m_vector[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def load_resize_x(p_resize_x, i_x, wc, gx, BGX: tl.constexpr):
    """resize_x[:, i_x] as [BGX, BX]."""
    i_gx = tl.arange(0, BGX)
    p = p_resize_x + i_gx[:, None] * wc + i_x[None, :]
    return tl.load(p, mask=(i_gx < gx)[:, None] & (i_x < wc)[None, :], other=0.0)


@triton.jit
def picture_and_head(i_bh, h, GROUP: tl.constexpr):
    hkv = h // GROUP
    return (i_bh // hkv).to(tl.int64), i_bh % hkv


@triton.jit
def dot_rows(p_offsets, i_b, GROUP: tl.constexpr):
    """How many dot rows picture i_b has for each key head."""
    return (tl.load(p_offsets + i_b + 1) - tl.load(p_offsets + i_b)) * GROUP


@triton.jit
def pick(
    i_block, i_b, i_hkv, p_query, s_qb, s_qh, s_qt, p_mask, s_mb, s_mh, s_mt, p_rows, p_offsets, h,
    GROUP: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One block of dot rows. Dot row r is the picture's picked row r // GROUP, through query head i_hkv·GROUP + r % GROUP.

    Returns i_t (their rows of the query, −1: none), i_nh (their places in [n, h]), m_nh (which places are real), the query
    block [BR, BD], and pointers to where their rows of the mask start.
    """
    r = i_block * BR + tl.arange(0, BR)
    i_n = tl.load(p_offsets + i_b).to(tl.int64) + r // GROUP
    head = (i_hkv * GROUP + r % GROUP).to(tl.int64)
    m_nh = r < dot_rows(p_offsets, i_b, GROUP)
    i_t = tl.load(p_rows + i_n, mask=m_nh, other=-1).to(tl.int64)
    b_q = load_vectors(p_query + i_b * s_qb + head * s_qh + i_t * s_qt, i_t >= 0, D, BD)
    return i_t, i_n * h + head, m_nh, b_q, p_mask + i_b * s_mb + head * s_mh + i_t * s_mt


@triton.jit
def score(b_q, b_k, i_key, i_t, p_mask, s_mp, scale2, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """s in base 2, [BR, BK]: (q·k·scale + mask)·log2(e); −inf without key (i_key < 0) or row (i_t < 0), and where masked."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale2
    m_s = (i_key >= 0)[None, :] & (i_t >= 0)[:, None]
    p_s = p_mask[:, None] + i_key[None, :] * s_mp
    if MASK == CAUSAL:
        m_s = m_s & (i_key[None, :] <= i_t[:, None])
    elif MASK == BOOL:
        m_s = m_s & (tl.load(p_s, mask=m_s, other=0) != 0)
    elif MASK == FLOAT:
        # finfo.min·log2(e) must not become −inf: a row of finfo.min attends evenly, as in SDPA
        b_m = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
        b_s += tl.where(b_m == -float("inf"), b_m, tl.maximum(b_m * LOG2E, LOWEST))
    return tl.where(m_s, b_s, -float("inf"))


class Inputs(NamedTuple):
    """The tensors of one call, as the kernels want them."""

    query: Tensor  # [b, h, t, d], each vector in one piece
    key: Tensor  # [b, hkv, p, d], each vector in one piece
    rows: Tensor  # int32 [n]
    offsets: Tensor  # int32 [b + 1]: picture i has rows[offsets[i] : offsets[i + 1]]
    index: Tensor  # int32 [b, hc, wc]
    resize_y: Tensor  # fp32 [b, gy, hc]
    resize_x: Tensor  # fp32 [b, gx, wc]
    mask: Tensor  # [b, h, t, p], expanded: uint8 or float; one number that is not read where there is no mask


class Plan(NamedTuple):
    """The numbers of one call, and how its work is shared out."""

    scale: float
    kind: int  # of mask: NO_MASK, BOOL, FLOAT, CAUSAL
    longest: int  # rows of the picture that has the most
    row_blocks: int  # blocks of dot rows that it takes
    splits: int  # shares of the keys
    blocks: dict[str, int]  # block sizes and warps


def shared_arguments(inputs: Inputs, plan: Plan) -> dict:
    """What every launch over dot rows begins with."""
    query, key, mask = inputs.query, inputs.key, inputs.mask
    h, d = query.shape[1], query.shape[3]
    return {
        "p_query": query, **strides("q", "bht", query), "p_key": key, **strides("k", "bhp", key),
        "p_mask": mask, **strides("m", "bhtp", mask), "p_rows": inputs.rows, "p_offsets": inputs.offsets,
        "h": h, "nh": len(inputs.rows) * h, "scale2": plan.scale * LOG2E.value,
        "GROUP": h // key.shape[1], "D": d, "MASK": plan.kind, **{name: plan.blocks[name] for name in ("BR", "BD", "num_warps")},
        # for fp32 operands; half ones go in as they are
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def canvas_arguments(inputs: Inputs, plan: Plan) -> dict:
    """What the launches that resample have besides."""
    (hc, wc), gy, gx = inputs.index.shape[1:], inputs.resize_y.shape[1], inputs.resize_x.shape[1]
    return {
        "p_resize_y": inputs.resize_y, "p_resize_x": inputs.resize_x, "hc": hc, "wc": wc, "gy": gy, "gx": gx,
        "BX": plan.blocks["BX"], "BGX": max(16, triton.next_power_of_2(gx)),
    }  # fmt: skip
