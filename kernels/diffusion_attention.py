"""diffusion_attention: the UNet's cross-attention and, in the same pass, where each word looks.

Problem. For every pixel q and head h of one layer, with t text tokens (77) of width d,

    A_hq = softmax_t(scale·q_hq·k_ht)      out_hq = Σ_t A_hqt·v_ht      maps_wq += (1/h)·Σ_h Σ_t A_hqt·W_tw

where W [t, w] spreads a word over its tokens (1/k on each of k). Eager attention stores A, [b, h, q, t]: at 64² pixels, 8 heads
and 77 tokens 2.5 M numbers a picture and layer, written and read several times. Flash attention never has A. The trick
of passing cat[V, W] as value gives Σ_t A·W per head, but pays w more columns a head, the concatenation, a value that is
wider than the query, and a mean over heads afterwards.

Kernel. A program owns BQ pixels of one picture and walks the heads. All t tokens fit in one block, so the softmax is whole at
once: no running max. A [BQ, BT] is added up over heads in registers, in fp32 (SOS takes 0.9 to 0.99 of the mass and words
share the rest), and multiplied by W once, after the last head: the mean over heads and W are linear. Only this program
writes these pixels, so `maps +=` needs no atomics and has a fixed order.

d is walked in chunks of BD (16, 32 or 64: whichever pads least; 40 → 3·16, 80 → 5·16, 160 → 5·32) both for q·k, which adds
up, and for A·v, whose chunks are independent outputs. Shared memory is then the same for every head dim: a whole
[128, 256] block of K and one of V in half precision would take 128 KB at d 160, more than the A10G has.

Memory: nothing beside `out`. Work: 2·b·h·q·t·d·2 flops as any attention, with t padded to 128, and b·q·t·w·2 for the words.
Bytes: q and out once (h·q·d each), k and v once a pixel block (from L2), maps once. No gradient: Stable Diffusion is frozen.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .shapes import check_dtype, strides

LOG2E = tl.constexpr(1.4426950408889634)

# p_ pointer, s_ stride, i_ index, m_ mask (True: real), b_ block. BQ pixels, BT ≥ t tokens, BD of d at a time, BW words at a time.


@triton.jit
def load_chunk(p_x, s_row, i_row, m_row, i_d, D: tl.constexpr):
    """Rows i_row, columns i_d of x [·, D]; 0 outside."""
    return tl.load(p_x + i_row[:, None] * s_row + i_d[None, :], mask=m_row[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def attend(
    p_query, s_qb, s_qh, s_qq, p_key, s_kb, s_kh, s_kt, p_value, s_vb, s_vh, s_vt, p_out, s_ob, s_oh, s_oq,
    p_words, s_wb, s_wt, s_ww, p_maps, s_mb, s_mw, s_mq, h, q, length, w, scale2,
    D: tl.constexpr, PRECISION: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    i_q, i_t = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BT)
    m_q, m_t = i_q < q, i_t < length
    p_query, p_out = p_query + i_b * s_qb, p_out + i_b * s_ob
    p_key, p_value = p_key + i_b * s_kb, p_value + i_b * s_vb

    b_heads = tl.zeros([BQ, BT], tl.float32)  # Σ_h A
    for i_h in range(0, h):
        b_s = tl.zeros([BQ, BT], tl.float32)
        for i in range(0, D, BD):
            i_d = i + tl.arange(0, BD)
            b_q = load_chunk(p_query + i_h * s_qh, s_qq, i_q, m_q, i_d, D)
            b_k = load_chunk(p_key + i_h * s_kh, s_kt, i_t, m_t, i_d, D)
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION)
        b_s = tl.where(m_t[None, :], b_s * scale2, -float("inf"))
        b_a = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
        b_a = b_a / tl.sum(b_a, 1)[:, None]
        b_heads += b_a
        for i in range(0, D, BD):
            i_d = i + tl.arange(0, BD)
            b_v = load_chunk(p_value + i_h * s_vh, s_vt, i_t, m_t, i_d, D)
            b_o = tl.dot(b_a.to(b_v.dtype), b_v, input_precision=PRECISION)
            p = p_out + i_h * s_oh + i_q[:, None] * s_oq + i_d[None, :]
            tl.store(p, b_o.to(p_out.dtype.element_ty), mask=m_q[:, None] & (i_d < D)[None, :])

    for i in range(0, w, BW):
        i_w = i + tl.arange(0, BW)
        m_w = i_w < w
        p = p_words + i_b * s_wb + i_t[:, None] * s_wt + i_w[None, :] * s_ww
        b_w = tl.load(p, mask=m_t[:, None] & m_w[None, :], other=0.0).to(tl.float32)
        # [BQ, BW]; plain TF32 would keep three digits of 1/3
        b_map = tl.dot(b_heads / h, b_w, input_precision="tf32x3")
        p = p_maps + i_b * s_mb + i_w[None, :] * s_mw + i_q[:, None] * s_mq
        m = m_q[:, None] & m_w[None, :]
        tl.store(p, tl.load(p, mask=m, other=0.0) + b_map, mask=m)


def blocks(b: int, q: int, d: int, dtype: torch.dtype) -> dict:
    """Pixels a program and the chunk of d. Few programs get few pixels: an H100 has 132 SMs, and 32² pixels are 32 blocks of 32.

    Tried by compiling (no GPU at hand): 64 pixels and 8 warps take 84 to 96 KB of shared memory, so one block an SM on an
    A10G, 32 pixels 50 KB. On paper: d in one padded block, 128 KB at d 160; blocks of 64 + 16 tokens instead of 128, a
    third less work in the dots but twice the code, for a kernel that waits for memory.
    """
    # fp32 takes twice the shared memory: 128 tokens in chunks of 64 would need 152 KB, more than an A10G has.
    chunks = (32, 16) if dtype == torch.float32 else (64, 32, 16)
    chunk = min(chunks, key=lambda size: (triton.cdiv(d, size) * size, -size))
    # fp32: tf32x3 spills a little at 16 pixels (100 bytes), more at 32
    many = b * triton.cdiv(q, 32) >= 128 and dtype != torch.float32
    return {"BQ": 32 if many else 16, "BD": chunk, "num_warps": 4}


@torch.no_grad()
def diffusion_attention(
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b h t d"],
    value: Float[Tensor, "b h t d"],
    word_weights: Float[Tensor, "b t w"],
    maps: Float[Tensor, "b w q"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h q d"]:
    """See lavender_min.ops.diffusion_attention, which checks the shapes. Up to 128 tokens; strides are passed on."""
    check_dtype("diffusion_attention (Triton)", "query", query, (torch.float32, torch.float16, torch.bfloat16))
    (b, h, q, d), length, w = query.shape, key.shape[2], maps.shape[1]
    if length > 128:
        raise ValueError(
            f"diffusion_attention: the Triton kernel takes up to 128 tokens; got {length}; use backend='torch'"
        )
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query)
    if out.stride(-1) != 1:
        # an expanded query
        out = query.new_empty(query.shape)
    scale, size = d**-0.5 if scale is None else scale, blocks(b, q, d, query.dtype)
    attend[triton.cdiv(q, size["BQ"]), b](
        p_query=query, **strides("q", "bhq", query), p_key=key, **strides("k", "bht", key),
        p_value=value, **strides("v", "bht", value), p_out=out, **strides("o", "bhq", out),
        p_words=word_weights, **strides("w", "btw", word_weights), p_maps=maps, **strides("m", "bwq", maps),
        h=h, q=q, length=length, w=w, scale2=scale * LOG2E.value,
        D=d, PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        BT=max(16, triton.next_power_of_2(length)), BW=max(16, min(32, triton.next_power_of_2(w))), **size,
    )  # fmt: skip
    return out
