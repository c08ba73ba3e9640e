"""Block-quantized products for few rows of x: int8 activations, dp4a, exact integer sums within a group.

A tile is BN rows of W by NG groups of 32 columns, int32 words [BN, NG, 4]; ``quant/blocks.py`` says what they hold.
Two kernels share it. In ``_resident_kernel`` each program quantizes its rows of x itself and keeps them in registers
over TILES tiles of W, which saves a kernel and its launch. Where x is too long for that, ``_streamed_kernel`` reads
rows that were quantized before and walks along the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.triton import dp4a, gate_times_up, quantize_quads, trigger, wait


@triton.jit
def load_tile(
    words, high, d, m, sub_d, sub_m, rows, g, KG: tl.constexpr, BITS: tl.constexpr, SUPER: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_SUB: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The raw planes of a tile. What a kind does not have is the first plane again, and unused.

    rows: int32 [BN]. g: int32 [NG], the groups; those from KG on read as zeros where MASKED.
    For groups of 16, sub_d and sub_m hold two int8 in an int16, one per half of 32 columns.
    """
    at = rows[:, None] * KG + g[None, :]
    over = rows[:, None] * (KG * 32 // SUPER) + (g // (SUPER // 32))[None, :]
    inside = (g < KG)[None, :] if MASKED else None
    wide = (g < KG)[None, :, None] if MASKED else None
    zero = 0 if MASKED else None
    t = tl.arange(0, 4)[None, None, :]
    per: tl.constexpr = 8 if BITS == 8 else 4
    wa = tl.load(words + (at * per)[:, :, None] + t, mask=wide, other=zero)
    wb = wa
    h0 = wa
    h1 = wa
    if BITS == 8:
        wb = tl.load(words + (at * per)[:, :, None] + t + 4, mask=wide, other=zero)
    if BITS == 5:
        h0 = tl.load(high + at, mask=inside, other=zero)
    if BITS == 6:
        h0 = tl.load(high + at * 2, mask=inside, other=zero)
        h1 = tl.load(high + at * 2 + 1, mask=inside, other=zero)
    dd = tl.load(d + over, mask=inside, other=zero)
    mm = dd
    sd = dd
    sm = dd
    if HAS_MIN:
        mm = tl.load(m + over, mask=inside, other=zero)
    if HAS_SUB:
        sd = tl.load(sub_d + at, mask=inside, other=zero)
        if HAS_MIN:
            sm = tl.load(sub_m + at, mask=inside, other=zero)
    return wa, wb, h0, h1, dd, mm, sd, sm


@triton.jit
def quads(wa, wb, h0, h1, BITS: tl.constexpr):
    """Quads 0 … 3 and 4 … 7 of each group, as four bytes of each of [BN, NG, 4] words."""
    lo = wa
    hi = wb
    if BITS < 8:
        t = tl.arange(0, 4)[None, None, :]
        lo = wa & 0x0F0F0F0F
        hi = (wa >> 4) & 0x0F0F0F0F
        if BITS == 5:
            lo |= ((h0[:, :, None] >> t) & 0x01010101) << 4
            hi |= ((h0[:, :, None] >> (t + 4)) & 0x01010101) << 4
        if BITS == 6:
            lo |= ((h0[:, :, None] >> (2 * t)) & 0x03030303) << 4
            hi |= ((h1[:, :, None] >> (2 * t)) & 0x03030303) << 4
    return lo, hi


@triton.jit
def half(dd, mm, sd, sm, UPPER: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
         HAS_SUB: tl.constexpr):  # fmt: skip
    """Scale, and minimum - offset * scale, of one half of each group of 32: float32 [BN, NG]."""
    scale = dd.to(tl.float32)
    minimum = MIN_SIGN * mm.to(tl.float32)
    if HAS_SUB:
        if GROUP == 16:
            scale *= (sd.to(tl.int32) >> 8 if UPPER else (sd.to(tl.int32) << 24) >> 24).to(tl.float32)
            if MIN_SIGN != 0:
                minimum *= (sm.to(tl.int32) >> 8 if UPPER else (sm.to(tl.int32) << 24) >> 24).to(tl.float32)
        else:
            scale *= sd.to(tl.float32)
            if MIN_SIGN != 0:
                minimum *= sm.to(tl.float32)
    if MIN_SIGN == 0:
        minimum = -OFFSET * scale
    elif OFFSET != 0:
        minimum -= OFFSET * scale
    return scale, minimum


@triton.jit
def add_tile(
    acc, wa, wb, h0, h1, dd, mm, sd, sm, x_lo, x_hi, x_scale, sum_lo, sum_hi, BITS: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, HAS_SUB: tl.constexpr,
):  # fmt: skip
    """acc [BN, ROWS, NG] plus the products of one tile.

    x_lo, x_hi: int32 words [ROWS, NG, 4]. x_scale: float32 [ROWS, NG]. sum_lo, sum_hi: float32 [ROWS, NG], the scaled
    sums of each half of x (of the whole group in sum_lo for groups of 32).
    """
    lo, hi = quads(wa, wb, h0, h1, BITS)
    shape: tl.constexpr = (acc.shape[0], acc.shape[1], acc.shape[2], 4)
    zero = tl.zeros(shape, tl.int32)
    first = dp4a(tl.broadcast_to(lo[:, None], shape), tl.broadcast_to(x_lo[None], shape), zero)
    scale, minimum = half(dd, mm, sd, sm, False, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
    if GROUP == 32:
        first = dp4a(tl.broadcast_to(hi[:, None], shape), tl.broadcast_to(x_hi[None], shape), first)
        acc += tl.sum(first, 3).to(tl.float32) * (scale[:, None] * x_scale[None])
        if MIN_SIGN != 0 or OFFSET != 0:
            acc += minimum[:, None] * sum_lo[None]
    else:
        second = dp4a(tl.broadcast_to(hi[:, None], shape), tl.broadcast_to(x_hi[None], shape), zero)
        upper, upper_minimum = half(dd, mm, sd, sm, True, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
        both = tl.sum(first, 3).to(tl.float32) * scale[:, None] + tl.sum(second, 3).to(tl.float32) * upper[:, None]
        acc += both * x_scale[None] + minimum[:, None] * sum_lo[None] + upper_minimum[:, None] * sum_hi[None]
    return acc


@triton.jit
def half_sums(x_lo, x_hi, x_scale, GROUP: tl.constexpr):
    """The scaled sums of each half of x's groups, or of the whole groups where W's groups are 32 wide."""
    ones = tl.full(x_lo.shape, 0x01010101, tl.int32)
    first = dp4a(x_lo, ones, tl.zeros_like(x_lo))
    if GROUP == 32:
        first = dp4a(x_hi, ones, first)
        sums = tl.sum(first, 2).to(tl.float32) * x_scale
        return sums, sums
    else:  # noqa: RET505
        second = dp4a(x_hi, ones, tl.zeros_like(x_hi))
        return tl.sum(first, 2).to(tl.float32) * x_scale, tl.sum(second, 2).to(tl.float32) * x_scale


@triton.jit
def _resident_kernel(
    x, stride_x, norm, eps, words, high, d, m, sub_d, sub_m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    BN: tl.constexpr, NG: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    KG: tl.constexpr = K // 32
    MASKED: tl.constexpr = KG != NG
    SUB: tl.constexpr = GROUP != SUPER
    MIN: tl.constexpr = MIN_SIGN != 0
    g = tl.arange(0, NG)
    start = tl.program_id(0) * (BN * TILES)
    last = tl.minimum(start + BN * TILES, N) - 1
    rows = tl.minimum(start + tl.arange(0, BN), last)
    wa, wb, h0, h1, dd, mm, sd, sm = load_tile(
        words, high, d, m, sub_d, sub_m, rows, g, KG, BITS, SUPER, MIN, SUB, MASKED
    )
    ua, ub, u0, u1, ud, um, us, ut = wa, wb, h0, h1, dd, mm, sd, sm
    if GATE is not None:
        ua, ub, u0, u1, ud, um, us, ut = load_tile(
            words, high, d, m, sub_d, sub_m, rows + N, g, KG, BITS, SUPER, MIN, SUB, MASKED
        )
    column = g[:, None, None] * 32 + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (row < M)[:, None, None, None] & (g < KG)[None, :, None, None]
    if NORM:
        norm_lo = tl.load(norm + column, mask=(g < KG)[:, None, None], other=0.0)
        norm_hi = tl.load(norm + column + 16, mask=(g < KG)[:, None, None], other=0.0)
    wait(PDL)
    source = x + row[:, None, None, None] * stride_x + column[None]
    lo = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    hi = tl.load(source + 16, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        # The root mean square only scales a row: int8 rounding is the same without it, so it is applied at the end.
        squares = tl.sum(tl.sum(tl.sum(lo * lo + hi * hi, 3), 2), 1)
        lo *= norm_lo[None]
        hi *= norm_hi[None]
    x_lo, x_hi, x_scale = quantize_quads(lo, hi)
    sum_lo = x_scale
    sum_hi = x_scale
    if MIN or OFFSET != 0:
        sum_lo, sum_hi = half_sums(x_lo, x_hi, x_scale, GROUP)
    for i in range(TILES):
        n = start + i * BN + tl.arange(0, BN)
        store = (n < N)[:, None] & (row < M)[None, :]
        where = row[None, :] * N + n[:, None]
        if RESIDUAL:
            added = tl.load(residual + where, mask=store, other=0.0)
        if TILES > 1:  # the next tile's loads are under way while this one is multiplied
            rows = tl.minimum(n + BN, last)
            na, nb, n0, n1, nd, nm, ns, nt = load_tile(
                words, high, d, m, sub_d, sub_m, rows, g, KG, BITS, SUPER, MIN, SUB, MASKED
            )
            if GATE is not None:
                va, vb, v0, v1, vd, vm, vs, vt = load_tile(
                    words, high, d, m, sub_d, sub_m, rows + N, g, KG, BITS, SUPER, MIN, SUB, MASKED
                )
        acc = add_tile(
            tl.zeros((BN, ROWS, NG), tl.float32), wa, wb, h0, h1, dd, mm, sd, sm, x_lo, x_hi, x_scale, sum_lo, sum_hi,
            BITS, GROUP, OFFSET, MIN_SIGN, SUB,
        )  # fmt: skip
        y = tl.sum(acc, 2)
        if NORM:
            root = tl.rsqrt(squares / K + eps)[None, :]
            y *= root
        if BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATE is not None:
            acc = add_tile(
                tl.zeros((BN, ROWS, NG), tl.float32), ua, ub, u0, u1, ud, um, us, ut, x_lo, x_hi, x_scale, sum_lo,
                sum_hi, BITS, GROUP, OFFSET, MIN_SIGN, SUB,
            )  # fmt: skip
            up = tl.sum(acc, 2)
            if NORM:
                up *= root
            if BIAS:
                up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            y = gate_times_up(y, up, GATE)
        if RESIDUAL:
            y += added
        tl.store(out + where, y.to(out.dtype.element_ty), mask=store)
        if TILES > 1:
            wa, wb, h0, h1, dd, mm, sd, sm = na, nb, n0, n1, nd, nm, ns, nt
            if GATE is not None:
                ua, ub, u0, u1, ud, um, us, ut = va, vb, v0, v1, vd, vm, vs, vt


@triton.jit
def _streamed_kernel(
    x_words, x_scales, words, high, d, m, sub_d, sub_m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    BN: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + NG - 1) // NG
    MASKED: tl.constexpr = KG % NG != 0
    SUB: tl.constexpr = GROUP != SUPER
    MIN: tl.constexpr = MIN_SIGN != 0
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, N - 1)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, M - 1)
    store = (n < N)[:, None] & (row < M)[None, :]
    where = row[None, :] * N + n[:, None]
    g = tl.arange(0, NG)
    t = tl.arange(0, 4)[None, None, :]
    wa, wb, h0, h1, dd, mm, sd, sm = load_tile(
        words, high, d, m, sub_d, sub_m, rows, g, KG, BITS, SUPER, MIN, SUB, MASKED
    )
    ua, ub, u0, u1, ud, um, us, ut = wa, wb, h0, h1, dd, mm, sd, sm
    if GATE is not None:
        ua, ub, u0, u1, ud, um, us, ut = load_tile(
            words, high, d, m, sub_d, sub_m, rows + N, g, KG, BITS, SUPER, MIN, SUB, MASKED
        )
    wait(PDL)
    if RESIDUAL:
        added = tl.load(residual + where, mask=store, other=0.0)
    acc = tl.zeros((BN, ROWS, NG), tl.float32)
    up = acc
    for step in range(STEPS):
        at = safe[:, None] * KG + g[None, :]
        if MASKED:
            inside = (g < KG)[None, :]
            x_lo = tl.load(x_words + (at * 8)[:, :, None] + t, mask=inside[:, :, None], other=0)
            x_hi = tl.load(x_words + (at * 8)[:, :, None] + t + 4, mask=inside[:, :, None], other=0)
            x_scale = tl.load(x_scales + at, mask=inside, other=0.0)
        else:
            x_lo = tl.load(x_words + (at * 8)[:, :, None] + t)
            x_hi = tl.load(x_words + (at * 8)[:, :, None] + t + 4)
            x_scale = tl.load(x_scales + at)
        sum_lo = x_scale
        sum_hi = x_scale
        if MIN or OFFSET != 0:
            sum_lo, sum_hi = half_sums(x_lo, x_hi, x_scale, GROUP)
        if STEPS > 1:  # the last step asks for its own tile again, which is in the cache
            g = tl.minimum(step + 1, STEPS - 1) * NG + tl.arange(0, NG)
            na, nb, n0, n1, nd, nm, ns, nt = load_tile(
                words, high, d, m, sub_d, sub_m, rows, g, KG, BITS, SUPER, MIN, SUB, MASKED
            )
            if GATE is not None:
                va, vb, v0, v1, vd, vm, vs, vt = load_tile(
                    words, high, d, m, sub_d, sub_m, rows + N, g, KG, BITS, SUPER, MIN, SUB, MASKED
                )
        acc = add_tile(
            acc, wa, wb, h0, h1, dd, mm, sd, sm, x_lo, x_hi, x_scale, sum_lo, sum_hi,
            BITS, GROUP, OFFSET, MIN_SIGN, SUB,
        )  # fmt: skip
        if GATE is not None:
            up = add_tile(
                up, ua, ub, u0, u1, ud, um, us, ut, x_lo, x_hi, x_scale, sum_lo, sum_hi,
                BITS, GROUP, OFFSET, MIN_SIGN, SUB,
            )  # fmt: skip
        if STEPS > 1:
            wa, wb, h0, h1, dd, mm, sd, sm = na, nb, n0, n1, nd, nm, ns, nt
            if GATE is not None:
                ua, ub, u0, u1, ud, um, us, ut = va, vb, v0, v1, vd, vm, vs, vt
    y = tl.sum(acc, 2)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATE is not None:
        z = tl.sum(up, 2)
        if BIAS:
            z += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        y = gate_times_up(y, z, GATE)
    if RESIDUAL:
        y += added
    tl.store(out + where, y.to(out.dtype.element_ty), mask=store)
