"""The first kernels of prefill: the gates' sums over the hidden size, then the convolution and the gates themselves.

The sums over the hidden size are split over programs, since a few tokens alone would leave one program to walk over all
of the weights; the programs of the convolution, which run anyway, add up the parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.delta.triton import silu, softplus
from ostinato.kernels.triton import dot_bfloat16, trigger, wait


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b, summed in float32. PRECISION: ``bf16`` or an input precision of tl.dot."""
    if PRECISION == "bf16":
        acc = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
        return dot_bfloat16(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def delta_gates_kernel(
    h,
    norm,
    beta_alpha,
    sums,
    num_tokens,
    padded,
    H: tl.constexpr,
    HV: tl.constexpr,
    HVP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """The part of STEPS blocks of the hidden size in b, a and the sum of squares of a block of tokens.

    sums: [parts, 2 HV + 1, padded], the rows of b, of a, and the squares.
    """
    trigger(PDL)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1)
    row = tl.arange(0, 2 * HVP)
    head = row % HVP
    source = tl.where(row < HVP, head, HV + head)
    in_head = head < HV
    in_t = t < num_tokens
    if STEPS == 1:  # weights can be read ahead
        column = part * BLOCK_H + tl.arange(0, BLOCK_H)
        in_h = column < H
        w_at = beta_alpha + source[None, :] * H + column[:, None]
        w = tl.load(w_at, mask=in_head[None, :] & in_h[:, None], other=0.0)
        gain = tl.load(norm + column, mask=in_h, other=0.0)
        wait(PDL)
        h_at = h + t.to(tl.int64)[:, None] * H + column[None, :]
        x = tl.load(h_at, mask=in_t[:, None] & in_h[None, :], other=0.0)
        squares = tl.sum(x * x, 1)
        total = product(x * gain[None, :], w, PRECISION)
    else:
        wait(PDL)
        squares = tl.zeros((TOKENS,), tl.float32)
        total = tl.zeros((TOKENS, 2 * HVP), tl.float32)
        for step in range(STEPS):
            column = (part * STEPS + step) * BLOCK_H + tl.arange(0, BLOCK_H)
            in_h = column < H
            h_at = h + t.to(tl.int64)[:, None] * H + column[None, :]
            x = tl.load(h_at, mask=in_t[:, None] & in_h[None, :], other=0.0)
            w_at = beta_alpha + source[None, :] * H + column[:, None]
            w = tl.load(w_at, mask=in_head[None, :] & in_h[:, None], other=0.0)
            squares += tl.sum(x * x, 1)
            total += product(x * tl.load(norm + column, mask=in_h, other=0.0)[None, :], w, PRECISION)
    out = sums + part * (2 * HV + 1) * padded + t
    tl.store(out[:, None] + source[None, :] * padded, total, mask=in_head[None, :])
    tl.store(out + 2 * HV * padded, squares)


@triton.jit
def _store_gates(
    sums, a_log, dt_bias, betas, decays, t, num_tokens, padded, head, norm_eps,
    H: tl.constexpr, HV: tl.constexpr, PARTS: tl.constexpr, PARTS_P: tl.constexpr,
):  # fmt: skip
    """beta and the logarithm of the decay of tokens t and one head; zeros beyond the last token."""
    part = tl.arange(0, PARTS_P)
    at = sums + (part * (2 * HV + 1) * padded)[:, None] + t[None, :]
    inside = (part < PARTS)[:, None] & (t < padded)[None, :]
    b = tl.sum(tl.load(at + head * padded, mask=inside, other=0.0), 0)
    a = tl.sum(tl.load(at + (HV + head) * padded, mask=inside, other=0.0), 0)
    squares = tl.sum(tl.load(at + 2 * HV * padded, mask=inside, other=0.0), 0)
    scale = tl.rsqrt(squares / H + norm_eps)
    beta = tl.sigmoid(tl.maximum(b * scale, -80.0))
    decay = -tl.exp(tl.load(a_log + head)) * softplus(a * scale + tl.load(dt_bias + head))
    tl.store(betas + t * HV + head, tl.where(t < num_tokens, beta, 0.0))
    tl.store(decays + t * HV + head, tl.where(t < num_tokens, decay, 0.0))


@triton.jit
def delta_conv_kernel(
    qkvz,
    conv_weight,
    conv_state,
    slots,
    positions,
    mixed,
    sums,
    a_log,
    dt_bias,
    betas,
    decays,
    num_tokens,
    padded,
    q_scale,
    norm_eps,
    H: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    L2_EPS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """SiLU of the convolution of one head's channels, queries and keys normalized; zeros beyond the last token.

    The programs of value heads also add up the parts of their gates.
    """
    trigger(PDL)
    head = tl.program_id(0)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    is_value = head >= 2 * HK
    dim = tl.where(is_value, DV, DK)
    start = tl.where(is_value, 2 * HK * DK + (head - 2 * HK) * DV, head * DK)
    d = tl.arange(0, DP)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = start + d
    in_d = d < dim
    wait(PDL)
    position = tl.load(positions)
    ring = conv_state + tl.load(slots).to(tl.int64) * (W * C)
    total = tl.zeros((TOKENS, DP), tl.float32)
    for back in tl.static_range(W):
        tap = tl.load(conv_weight + (W - 1 - back) * C + column, mask=in_d, other=0.0)
        source = t - back
        here = (source >= 0) & (t < num_tokens)
        x_at = qkvz + source.to(tl.int64)[:, None] * (C + HV * DV) + column[None, :]
        x = tl.load(x_at, mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        if back > 0:
            before = (source < 0) & (position + source >= 0)
            past_at = ring + ((position + source + W) % W)[:, None] * C + column[None, :]
            x += tl.load(past_at, mask=before[:, None] & in_d[None, :], other=0.0)
        total += x * tap[None, :]
    out = tl.where((t < num_tokens)[:, None], silu(total), 0.0)
    scale = tl.rsqrt(tl.sum(out * out, 1) + L2_EPS) * tl.where(head < HK, q_scale, 1.0)
    out *= tl.where(is_value, 1.0, scale)[:, None]
    tl.store(mixed + t.to(tl.int64)[:, None] * C + column[None, :], out.to(mixed.dtype.element_ty), mask=in_d[None, :])
    if is_value:
        _store_gates(
            sums, a_log, dt_bias, betas, decays, t, num_tokens, padded, head - 2 * HK, norm_eps, H, HV, PARTS, PARTS_P
        )
