"""Block-quantized products for many rows of x: the tensor cores, on weights dequantized to bfloat16.

``_tile_kernel`` dequantizes in registers, for tens of rows. ``_dequantize_kernel`` writes the whole matrix once, for a
vendor's product of hundreds of rows, which then outweighs it. ``_finish_kernel`` does what follows a product that was
left unfinished: sums over splits of the columns, bias, gate and residual.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import half
from ostinato.kernels.triton import dot_bfloat16, gate_times_up, trigger, wait


@triton.jit
def values(
    bytes_, high, d, m, sub_d, sub_m, rows, g, inside, KG: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
):  # fmt: skip
    """Elements 0 … 15 and 16 … 31 of groups g [NG] of rows [BN]: float32 [BN, NG, 16] each; zeros outside.

    bytes_: the plane ``words`` as uint8. inside: bool [BN, NG].
    """
    SUB: tl.constexpr = GROUP != SUPER
    at = rows[:, None] * KG + g[None, :]
    over = rows[:, None] * (KG * 32 // SUPER) + (g // (SUPER // 32))[None, :]
    i = tl.arange(0, 16)[None, None, :]
    wide = inside[:, :, None]
    if BITS == 8:  # flipping the sign bit adds 128
        lo = tl.load(bytes_ + (at * 32)[:, :, None] + i, mask=wide, other=0).to(tl.int32) ^ 128
        hi = tl.load(bytes_ + (at * 32)[:, :, None] + i + 16, mask=wide, other=0).to(tl.int32) ^ 128
    else:
        both = tl.load(bytes_ + (at * 16)[:, :, None] + i, mask=wide, other=0).to(tl.int32)
        lo = both & 15
        hi = both >> 4
        if BITS == 5:
            h = tl.load(high + at, mask=inside, other=0)[:, :, None] >> (8 * (i % 4) + i // 4)
            lo |= (h & 1) << 4
            hi |= h & 16
        if BITS == 6:
            shift = 8 * (i % 4) + 2 * (i // 4)
            lo |= ((tl.load(high + at * 2, mask=inside, other=0)[:, :, None] >> shift) & 3) << 4
            hi |= ((tl.load(high + at * 2 + 1, mask=inside, other=0)[:, :, None] >> shift) & 3) << 4
    dd = tl.load(d + over, mask=inside, other=0.0).to(tl.float32)
    mm = dd
    sd = at
    sm = at
    if MIN_SIGN != 0:
        mm = tl.load(m + over, mask=inside, other=0.0).to(tl.float32)
    if SUB:
        sd = tl.load(sub_d + at, mask=inside, other=0).to(tl.int32)
        if MIN_SIGN != 0:
            sm = tl.load(sub_m + at, mask=inside, other=0).to(tl.int32)
    scale, minimum = half(dd, mm, sd, sm, False, GROUP, 0, MIN_SIGN, SUB)
    # 2**23 + q is the float with q in its low bits: cheaper than a conversion, and exact.
    base: tl.constexpr = 8388608.0 + (128 if BITS == 8 else OFFSET)
    lo_values = ((lo | 0x4B000000).to(tl.float32, bitcast=True) - base) * scale[:, :, None]
    if GROUP == 16:
        upper, upper_minimum = half(dd, mm, sd, sm, True, GROUP, 0, MIN_SIGN, SUB)
    else:
        upper, upper_minimum = scale, minimum
    hi_values = ((hi | 0x4B000000).to(tl.float32, bitcast=True) - base) * upper[:, :, None]
    if MIN_SIGN != 0:
        lo_values += minimum[:, :, None]
        hi_values += upper_minimum[:, :, None]
    return lo_values, hi_values


@triton.jit
def _tile_kernel(
    x, stride_x, norm, eps, bytes_, high, d, m, sub_d, sub_m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    BN: tl.constexpr, NG: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [SPLITS, M, N]: BN rows of W times BM rows of x, over one of SPLITS parts of the columns.

    With more than one split the sums are left as they are: no norm, bias, residual or gate.
    """
    trigger(PDL)
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + NG * SPLITS - 1) // (NG * SPLITS)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    column = (tl.arange(0, NG * 16) // 16) * 32 + tl.arange(0, NG * 16) % 16
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    wait(PDL)
    for step in range(STEPS):
        first = (split * STEPS + step) * NG
        g = first + tl.arange(0, NG)
        inside = (n < N)[:, None] & (g < KG)[None, :]
        k = first * 32 + column
        mask = (row < M)[:, None] & (k < K)[None, :]
        source = x + row[:, None] * stride_x + k[None, :]
        x_lo = tl.load(source, mask=mask, other=0.0)
        x_hi = tl.load(source + 16, mask=mask, other=0.0)
        if NORM:  # the root mean square only scales a row, so it is applied at the end
            x_lo = x_lo.to(tl.float32)
            x_hi = x_hi.to(tl.float32)
            squares += tl.sum(x_lo * x_lo + x_hi * x_hi, 1)
            x_lo *= tl.load(norm + k, mask=k < K, other=0.0)[None, :]
            x_hi *= tl.load(norm + k + 16, mask=k < K, other=0.0)[None, :]
        x_lo = tl.trans(x_lo.to(tl.bfloat16))
        x_hi = tl.trans(x_hi.to(tl.bfloat16))
        lo, hi = values(bytes_, high, d, m, sub_d, sub_m, n, g, inside, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
        acc = dot_bfloat16(tl.reshape(lo, (BN, NG * 16)).to(tl.bfloat16), x_lo, acc)
        acc = dot_bfloat16(tl.reshape(hi, (BN, NG * 16)).to(tl.bfloat16), x_hi, acc)
        if GATE is not None:
            lo, hi = values(
                bytes_, high, d, m, sub_d, sub_m, n + N, g, inside, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN
            )
            up = dot_bfloat16(tl.reshape(lo, (BN, NG * 16)).to(tl.bfloat16), x_lo, up)
            up = dot_bfloat16(tl.reshape(hi, (BN, NG * 16)).to(tl.bfloat16), x_hi, up)
    store = (n < N)[:, None] & (row < M)[None, :]
    where = row[None, :] * N + n[:, None]
    if SPLITS > 1:
        where += split * M * N
    if NORM:
        root = tl.rsqrt(squares / K + eps)[None, :]
        acc *= root
        up *= root
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATE is not None:
        if BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        acc = gate_times_up(acc, up, GATE)
    if RESIDUAL:
        acc += tl.load(residual + where, mask=store, other=0.0)
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=store)


@triton.jit
def _dequantize_kernel(
    bytes_, high, d, m, sub_d, sub_m, out, N, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, BN: tl.constexpr, NG: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [N, K]: the matrix in out's dtype."""
    trigger(PDL)
    KG: tl.constexpr = K // 32
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    g = tl.program_id(1) * NG + tl.arange(0, NG)
    inside = (n < N)[:, None] & (g < KG)[None, :]
    lo, hi = values(bytes_, high, d, m, sub_d, sub_m, n, g, inside, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
    wait(PDL)
    to = out + n.to(tl.int64)[:, None, None] * K + (g[:, None] * 32 + tl.arange(0, 16)[None, :])[None]
    tl.store(to, lo.to(out.dtype.element_ty), mask=inside[:, :, None])
    tl.store(to + 16, hi.to(out.dtype.element_ty), mask=inside[:, :, None])


@triton.jit
def _finish_kernel(
    product, bias, residual, out, M, N, SPLITS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, N] from product [SPLITS, M, N], or [SPLITS, M, 2N] where gated."""
    trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    width = N * 2 if GATE is not None else N
    wait(PDL)
    y = tl.zeros((BLOCK,), tl.float32)
    up = y
    for split in tl.static_range(SPLITS):
        source = product + (split * M + row) * width + n
        y += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        if GATE is not None:
            up += tl.load(source + N, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        if GATE is not None:
            up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
    if GATE is not None:
        y = gate_times_up(y, up, GATE)
    if RESIDUAL:
        y += tl.load(residual + row * N + n, mask=inside, other=0.0)
    tl.store(out + row * N + n, y.to(out.dtype.element_ty), mask=inside)
