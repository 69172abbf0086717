"""aligner_mse: the Aligner's closing 1×1 convolution, the map normalisation and the squared error, in one pass.

Problem. For each of m words, c channels, cells i of a g×g map (N cells), trust τ ≥ 0 in each word, T = Σ τ:

    z_i = Σ_c f_ci·w_c + bias      u_i = (z_i − lo) / s,  lo = min z, hi = max z, s = hi − lo + 1e-6      (or u = z)
    loss = 1/(T·N) Σ_words τ Σ_i (u_i − y_i)²

Eager: z, u, u − y and its square are [m, N] each, and autograd keeps f, [m, c, N], c times larger than all of them, until the
backward. Here one program owns one word, and everything of a word but f stays in registers.

Backward, by hand. With e_i = dloss/du_i = 2τ(u_i − y_i)/(T·N),

    dz_i = e_i/s − [z_i = lo]/n_lo · Σ(e_j − e_j·u_j)/s − [z_i = hi]/n_hi · Σ e_j·u_j/s

because dlo moves every u_j by −(1 − u_j)/s and dhi by −u_j/s; cells that tie for lo or hi (n_lo, n_hi of them) share. A constant
map has s = 1e-6 and no direction in which to stretch: its gradient is taken as 0, its error counts. Then

    df_ci = w_c·dz_i        dw_c = Σ_words Σ_i f_ci·dz_i        dbias = Σ_words Σ_i dz_i

dz, dw and dbias are finished in the forward, while the word's f is still in L2, so only dz (fp32, N a word) and w wait for
the backward, not f: c times less for this op (the layer before may keep its own output, that is its affair). The backward
scales by the incoming gradient: df is one outer product, written once.

Work is nothing (4·c·N flops a word); bytes decide: f is read from DRAM once (and once more from L2), eager reads it
three times. Blocks: N padded to a power of two (1024 at 32×32) across 8 warps, 4 channels at a time for dw. Losses, dw and
dbias are stored per word and summed by torch in a fixed order: no atomics. Tried and left: a whole [c, N] block in registers, to
read f once: 128 KB a program at c = 32, it spills.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .shapes import check_dtype, strides

EPS = tl.constexpr(1e-6)

# p_ pointer, s_ stride, i_ index, m_ mask (True: real), b_ block. BI ≥ N cells, BC channels at a time.


@triton.jit
def load_channels(p_cell, s_c, i_c, c, m_i):
    """Channels i_c of a word at every cell, [BC, BI]; 0 outside."""
    p = p_cell[None, :] + i_c[:, None] * s_c
    return tl.load(p, mask=(i_c < c)[:, None] & m_i[None, :], other=0.0).to(tl.float32)


@triton.jit
def word_error(
    p_f, s_fm, s_fc, s_fy, s_fx, p_weight, p_bias, p_target, s_tm, s_ty, s_tx, p_trust, p_dz, p_sums, m, c, gx, cells,
    MINMAX: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dz [m, cells], and p_sums [m, c + 2]: the word's share of loss, dbias and dw. All 0 for a word of no trust."""
    i_m, i_i = tl.program_id(0).to(tl.int64), tl.arange(0, BI)
    m_i = i_i < cells
    p_dz, p_sums = p_dz + i_m * cells, p_sums + i_m * (c + 2)
    trust = tl.load(p_trust + i_m)
    # Through an integer: in the interpreter a comparison of single floats keeps the type of a float.
    valid = (trust > 0).to(tl.int32) != 0
    # T, added up by every program: 4 m bytes
    total = 0.0
    for i in range(0, m, BM):
        i_w = i + tl.arange(0, BM)
        total += tl.sum(tl.load(p_trust + i_w, mask=i_w < m, other=0.0))

    # z
    p_cell = p_f + i_m * s_fm + (i_i // gx) * s_fy + (i_i % gx) * s_fx
    b_z = tl.zeros([BI], tl.float32) + tl.load(p_bias).to(tl.float32)
    for i in range(0, c, BC):
        i_c = i + tl.arange(0, BC)
        b_f = load_channels(p_cell, s_fc, i_c, c, m_i & valid)
        b_w = tl.load(p_weight + i_c, mask=i_c < c, other=0.0).to(tl.float32)
        b_z += tl.sum(b_f * b_w[:, None], 0)

    # u, loss, e
    lo, hi = tl.min(tl.where(m_i, b_z, float("inf"))), tl.max(tl.where(m_i, b_z, -float("inf")))
    s = 1.0
    b_u = b_z
    if MINMAX:
        s = hi - lo + EPS
        b_u = (b_z - lo) / s
    p_y = p_target + i_m * s_tm + (i_i // gx) * s_ty + (i_i % gx) * s_tx
    b_y = tl.load(p_y, mask=m_i & valid, other=0.0).to(tl.float32)
    b_error = tl.where(m_i & valid, b_u - b_y, 0.0)
    share = trust / (tl.where(total > 0, total, 1.0) * cells)
    b_e = 2.0 * b_error * share

    # dz
    b_dz = b_e / s
    if MINMAX:
        b_lo, b_hi = (m_i & (b_z == lo)).to(tl.float32), (m_i & (b_z == hi)).to(tl.float32)
        to_hi = tl.sum(b_e * b_u) / s
        b_dz -= b_lo * ((tl.sum(b_e) / s - to_hi) / tl.sum(b_lo)) + b_hi * (to_hi / tl.sum(b_hi))
        b_dz = tl.where(hi > lo, b_dz, 0.0)
    tl.store(p_dz + i_i, b_dz, mask=m_i)
    tl.store(p_sums, tl.sum(b_error * b_error) * share)
    tl.store(p_sums + 1, tl.sum(b_dz))

    # dw: f once more, from L2
    for i in range(0, c, BC):
        i_c = i + tl.arange(0, BC)
        b_f = load_channels(p_cell, s_fc, i_c, c, m_i & valid)
        tl.store(p_sums + 2 + i_c, tl.sum(b_f * b_dz[None, :], 1), mask=i_c < c)


@triton.jit
def feature_gradient(p_dz, p_weight, p_dloss, p_df, s_dm, s_dc, s_dy, s_dx, c, gx, cells, BI: tl.constexpr):
    """df_ci = dloss·w_c·dz_i: one word, all channels."""
    i_m, i_i = tl.program_id(0).to(tl.int64), tl.arange(0, BI)
    b_dz = tl.load(p_dz + i_m * cells + i_i, mask=i_i < cells, other=0.0) * tl.load(p_dloss)
    p_cell = p_df + i_m * s_dm + (i_i // gx) * s_dy + (i_i % gx) * s_dx
    for i_c in range(0, c):
        b_df = b_dz * tl.load(p_weight + i_c).to(tl.float32)
        tl.store(p_cell + i_c * s_dc, b_df.to(p_df.dtype.element_ty), mask=i_i < cells)


class AlignerMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, target, minmax, trust):
        m, c, gy, gx = features.shape
        weight = weight.contiguous()
        sums, dz = (features.new_empty(m, columns, dtype=torch.float32) for columns in (c + 2, gy * gx))
        block = triton.next_power_of_2(gy * gx)
        word_error[m,](
            p_f=features, **strides("f", "mcyx", features), p_weight=weight, p_bias=bias,
            p_target=target, **strides("t", "myx", target), p_trust=trust.contiguous(),
            p_dz=dz, p_sums=sums, m=m, c=c, gx=gx, cells=gy * gx,
            MINMAX=minmax, BM=1024, BC=max(1, 4096 // block), BI=block, num_warps=8,
        )  # fmt: skip
        loss, dbias, dweight = sums.sum(0).split([1, 1, c])
        ctx.save_for_backward(dz, weight, dweight, dbias)
        # Strides with a place for every number: of features that were expanded, whole rows share one.
        strided = torch.empty_like(features, device="meta").stride()
        ctx.like = (features.shape, strided, features.dtype, bias.shape, bias.dtype)
        return loss.view(())

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dz, weight, dweight, dbias = ctx.saved_tensors
        shape, stride, dtype, bias_shape, bias_dtype = ctx.like
        (m, c, gy, gx), df = shape, None
        if ctx.needs_input_grad[0]:
            df = torch.empty_strided(shape, stride, dtype=dtype, device=dz.device)
            block = triton.next_power_of_2(gy * gx)
            feature_gradient[m,](
                p_dz=dz, p_weight=weight, p_dloss=dloss, p_df=df, **strides("d", "mcyx", df), c=c, gx=gx, cells=gy * gx,
                BI=block, num_warps=8,
            )  # fmt: skip
        return df, (dweight * dloss).to(weight.dtype), (dbias * dloss).to(bias_dtype).view(bias_shape), None, None, None


def aligner_mse(
    features: Float[Tensor, "m c gy gx"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, ""] | Float[Tensor, " 1"],
    target: Float[Tensor, "m gy gx"],
    *,
    output: str = "minmax",
    trust: Float[Tensor, " m"],
) -> Float[Tensor, ""]:
    """See lavender_min.ops.aligner_mse, which checks the shapes. Maps of up to 128×128 cells, strided or not."""
    check_dtype("aligner_mse (Triton)", "features", features, (torch.float32, torch.float16, torch.bfloat16))
    m, _, gy, gx = features.shape
    if gy * gx > 128 * 128:
        raise ValueError(
            f"aligner_mse: the Triton kernel takes up to 16384 cells; got {list(target.shape)}; use backend='torch'"
        )
    if m == 0:
        # no word, no program: still a graph, so that every gradient is 0 and not None
        return (features.sum() + (weight * 0).sum() + (bias * 0).sum()).float()
    return AlignerMSE.apply(features, weight, bias, target, output == "minmax", trust)
