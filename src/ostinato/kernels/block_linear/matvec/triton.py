"""Block-quantized products for few rows of x: int8 activations, dp4a, exact integer sums within a group.

Two kernels, in both of which a thread's quads are separate tensors, loaded by itself in the layout in which they are
used: Triton would choose another for a tensor with an axis of words, and move it through shared memory.

``_resident_kernel``: each program quantizes its rows of x and keeps them in registers over TILES tiles of W, which
saves a kernel and its launch. Tensors are [ROWS, BN, NG, 4]: four threads hold a group of 32 columns, two quads each,
and the warps share the columns, so that x is read and quantized once a program, in whole cache lines.

``_streamed_kernel``: for longer x, which was quantized before. Tensors are [ROWS, R, W, NG]: a thread holds whole
groups, 16 bytes of W a load; NG · W is the number of threads, and a program's rows of W are R · W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.triton import (
    dp4a,
    gate_times_up,
    load_floats,
    load_word,
    load_words,
    quantize_quad,
    trigger,
    wait,
)


@triton.jit
def load_quants(words, high, rows, g, KG: tl.constexpr, BITS: tl.constexpr):
    """The raw quants of a tile: eight words (four for less than 8 bits) and two of high bits, as in ``load_tile``."""
    at = rows * KG + g
    inside = (rows >= 0) & (g < KG)
    per: tl.constexpr = 8 if BITS == 8 else 4
    w0, w1, w2, w3 = load_words(words + at * per, inside)
    w4, w5, w6, w7 = w0, w1, w2, w3
    h0, h1 = w0, w0
    if BITS == 8:
        w4, w5, w6, w7 = load_words(words + at * per + 4, inside)
    if BITS == 5:
        h0 = load_word(high + at, inside)
    if BITS == 6:
        h0 = load_word(high + at * 2, inside)
        h1 = load_word(high + at * 2 + 1, inside)
    return w0, w1, w2, w3, w4, w5, w6, w7, h0, h1


@triton.jit
def load_scales(d, m, rows, g, KG: tl.constexpr, SUPER: tl.constexpr, HAS_MIN: tl.constexpr):
    """The scales of a tile and its minima, or the scales again."""
    inside = (rows >= 0) & (g < KG)
    over = rows * (KG * 32 // SUPER) + g // (SUPER // 32)
    dd = load_word(d + over, inside)
    mm = dd
    if HAS_MIN:
        mm = load_word(m + over, inside)
    return dd, mm


@triton.jit
def load_tile(
    words, high, d, m, sub_d, sub_m, rows, g, KG: tl.constexpr, BITS: tl.constexpr, SUPER: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_SUB: tl.constexpr,
):  # fmt: skip
    """The raw planes of a tile: eight words (four for less than 8 bits), high bits, scales.

    rows: int32 [1, R, W, 1]. g: int32 [1, 1, 1, NG], the groups; those from KG on read as zeros.
    For groups of 16, sub_d and sub_m hold two int8 in an int16, one per half of 32 columns.
    What a kind does not have is the first word again, and unused.
    """
    quants = load_quants(words, high, rows, g, KG, BITS)
    dd, mm = load_scales(d, m, rows, g, KG, SUPER, HAS_MIN)
    sd, sm = quants[8], quants[8]
    if HAS_SUB:
        inside = (rows >= 0) & (g < KG)
        sd = load_word(sub_d + rows * KG + g, inside)
        if HAS_MIN:
            sm = load_word(sub_m + rows * KG + g, inside)
    return quants + (dd, mm, sd, sm)  # noqa: RUF005


@triton.jit
def quad(tile, t: tl.constexpr, BITS: tl.constexpr):
    """The four bytes of quad t (0 … 7) of each group."""
    if BITS == 8:
        return tile[t]
    else:
        word = tile[t % 4] & 0x0F0F0F0F if t < 4 else (tile[t % 4] >> 4) & 0x0F0F0F0F
        if BITS == 5:
            word |= ((tile[8] >> t) & 0x01010101) << 4
        if BITS == 6:
            word |= ((tile[8 + t // 4] >> (2 * (t % 4))) & 0x03030303) << 4
        return word


@triton.jit
def half(dd, mm, sd, sm, UPPER: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
         HAS_SUB: tl.constexpr):  # fmt: skip
    """Scale, and minimum - offset * scale, of one half of each group of 32, in float32.

    sd, sm: int32; for groups of 16 the low byte belongs to the lower half, the bits above it to the upper.
    """
    scale = dd
    minimum = MIN_SIGN * mm
    if HAS_SUB:
        if GROUP == 16:
            scale *= (sd >> 8 if UPPER else (sd << 24) >> 24).to(tl.float32)
            if MIN_SIGN != 0:
                minimum *= (sm >> 8 if UPPER else (sm << 24) >> 24).to(tl.float32)
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
def products(tile, x, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
             HAS_SUB: tl.constexpr):  # fmt: skip
    """The products of a tile with rows of x, float32 [ROWS, R, W, NG], group by group.

    x: a tuple of eight words, the scale, and the scaled sums of the lower and the upper half (of the whole group in the
    first of them for groups of 32 and more), [ROWS, 1, W, NG] each.
    """
    shape: tl.constexpr = (x[8].shape[0], tile[0].shape[1], tile[0].shape[2], tile[0].shape[3])
    zero = tl.zeros(shape, tl.int32)
    lower = zero
    upper = zero
    for t in tl.static_range(4):
        lower = dp4a(tl.broadcast_to(quad(tile, t, BITS), shape), tl.broadcast_to(x[t], shape), lower)
    if GROUP >= 32:
        upper = lower
    for t in tl.static_range(4, 8):
        upper = dp4a(tl.broadcast_to(quad(tile, t, BITS), shape), tl.broadcast_to(x[t], shape), upper)
    scale, minimum = half(tile[10], tile[11], tile[12], tile[13], False, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
    if GROUP >= 32:
        total = upper.to(tl.float32) * (scale * x[8])
        if MIN_SIGN != 0 or OFFSET != 0:
            total += minimum * x[9]
    else:
        scale_up, minimum_up = half(tile[10], tile[11], tile[12], tile[13], True, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
        total = (lower.to(tl.float32) * scale + upper.to(tl.float32) * scale_up) * x[8]
        total += minimum * x[9] + minimum_up * x[10]
    return total


@triton.jit
def with_sums(w0, w1, w2, w3, w4, w5, w6, w7, scale, GROUP: tl.constexpr, NEEDED: tl.constexpr):
    """Quantized rows of x as ``products`` takes them."""
    lower = scale
    upper = scale
    if NEEDED:
        ones = tl.full(w0.shape, 0x01010101, tl.int32)
        low = dp4a(w3, ones, dp4a(w2, ones, dp4a(w1, ones, dp4a(w0, ones, tl.zeros_like(w0)))))
        if GROUP >= 32:
            lower = dp4a(w7, ones, dp4a(w6, ones, dp4a(w5, ones, dp4a(w4, ones, low)))).to(tl.float32) * scale
        else:
            lower = low.to(tl.float32) * scale
            up = dp4a(w7, ones, dp4a(w6, ones, dp4a(w5, ones, dp4a(w4, ones, tl.zeros_like(w0)))))
            upper = up.to(tl.float32) * scale
    return w0, w1, w2, w3, w4, w5, w6, w7, scale, lower, upper


@triton.jit
def load_pair(
    words, high, d, m, sub_d, sub_m, rows, g, j, KG: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
):  # fmt: skip
    """Quads j and j + 4 of groups g of rows, with the scale and the minimum of each: [1, BN, NG, 4].

    rows: int32 [1, BN, 1, 1]. g: [1, 1, NG, 4]. j: [1, 1, NG, 4], 0 … 3. Groups from KG on read as zeros.
    """
    SUB: tl.constexpr = GROUP != SUPER
    at = rows * KG + g
    inside = (rows >= 0) & (g < KG)
    if BITS == 8:
        lower = load_word(words + at * 8 + j, inside)
        upper = load_word(words + at * 8 + j + 4, inside)
    else:
        word = load_word(words + at * 4 + j, inside)
        lower = word & 0x0F0F0F0F
        upper = (word >> 4) & 0x0F0F0F0F
        if BITS == 5:
            bits = load_word(high + at, inside)
            lower |= ((bits >> j) & 0x01010101) << 4
            upper |= ((bits >> (j + 4)) & 0x01010101) << 4
        if BITS == 6:
            lower |= ((load_word(high + at * 2, inside) >> (2 * j)) & 0x03030303) << 4
            upper |= ((load_word(high + at * 2 + 1, inside) >> (2 * j)) & 0x03030303) << 4
    over = rows * (KG * 32 // SUPER) + g // (SUPER // 32)
    dd = load_word(d + over, inside)
    mm, sd, sm = dd, at, at
    if MIN_SIGN != 0:
        mm = load_word(m + over, inside)
    if SUB:
        sd = load_word(sub_d + at, inside)
        if MIN_SIGN != 0:
            sm = load_word(sub_m + at, inside)
    scale, minimum = half(dd, mm, sd, sm, False, GROUP, OFFSET, MIN_SIGN, SUB)
    if GROUP >= 32:
        return lower, upper, scale, minimum, scale, minimum
    else:
        scale_up, minimum_up = half(dd, mm, sd, sm, True, GROUP, OFFSET, MIN_SIGN, SUB)
        return lower, upper, scale, minimum, scale_up, minimum_up


@triton.jit
def pair_sums(
    tile, x_lower, x_upper, scale_lower, scale_upper, sum_lower, sum_upper, GROUP: tl.constexpr, SUMS: tl.constexpr
):
    """The sums over all columns of a tile's products: float32 [ROWS, BN]. Each quad of x has a scale of its own."""
    shape: tl.constexpr = (x_lower.shape[0], tile[0].shape[1], tile[0].shape[2], 4)
    zero = tl.zeros(shape, tl.int32)
    first = dp4a(tl.broadcast_to(tile[0], shape), tl.broadcast_to(x_lower, shape), zero).to(tl.float32) * scale_lower
    second = dp4a(tl.broadcast_to(tile[1], shape), tl.broadcast_to(x_upper, shape), zero).to(tl.float32) * scale_upper
    if GROUP >= 32:
        total = (first + second) * tile[2]
        if SUMS:
            total += tile[3] * (sum_lower + sum_upper)
    else:
        total = first * tile[2] + second * tile[4]
        if SUMS:
            total += tile[3] * sum_lower + tile[5] * sum_upper
    return tl.sum(tl.sum(total, 3), 2)


@triton.jit
def head_norm(squares, row, g, inside, K: tl.constexpr, HEADS: tl.constexpr, eps):
    """What the norm of their head scales groups g of x by, where whoever made x left that out."""
    q0, q1, q2, q3 = load_floats(squares + row * (4 * HEADS) + g // (K // 32 // HEADS) * 4, inside)
    return tl.rsqrt((q0 + q1 + q2 + q3) / (K // HEADS) + eps)


@triton.jit
def _resident_kernel(
    x, stride_x, norm, eps, words, high, d, m, sub_d, sub_m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    BN: tl.constexpr, NG: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    KG: tl.constexpr = K // 32
    SUMS: tl.constexpr = MIN_SIGN != 0 or OFFSET != 0
    j = tl.arange(0, 4)[None, None, None, :]
    g = tl.arange(0, NG)[None, None, :, None] + j * 0
    j = j + g * 0
    start = tl.program_id(0) * (BN * TILES)
    last = tl.minimum(start + BN * TILES, N) - 1
    local = tl.arange(0, BN)[None, :, None, None]
    rows = tl.minimum(start + local, last)
    tile = load_pair(words, high, d, m, sub_d, sub_m, rows, g, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
    twin = tile
    if GATE is not None:
        twin = load_pair(words, high, d, m, sub_d, sub_m, rows + N, g, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None, None]
    column = g * 32 + j * 4
    if NORM:
        p0, p1, p2, p3 = load_floats(norm + column, g < KG)
        p4, p5, p6, p7 = load_floats(norm + column + 16, g < KG)
    wait(PDL)
    inside = (row < M) & (g < KG)
    v0, v1, v2, v3 = load_floats(x + row * stride_x + column, inside)
    v4, v5, v6, v7 = load_floats(x + row * stride_x + column + 16, inside)
    if NORM:
        # The root mean square only scales a row: rounding to int8 is the same without it, so it is applied at the end.
        squares = (v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3) + (v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7)
        v0, v1, v2, v3 = v0 * p0, v1 * p1, v2 * p2, v3 * p3
        v4, v5, v6, v7 = v4 * p4, v5 * p5, v6 * p6, v7 * p7
    # A thread holds whole quads, so a scale for each costs no exchange between threads and halves the error of int8.
    low = tl.maximum(tl.maximum(tl.abs(v0), tl.abs(v1)), tl.maximum(tl.abs(v2), tl.abs(v3)))
    upp = tl.maximum(tl.maximum(tl.abs(v4), tl.abs(v5)), tl.maximum(tl.abs(v6), tl.abs(v7)))
    x_lower = quantize_quad(v0, v1, v2, v3, 127.0 / tl.maximum(low, 1e-30))
    x_upper = quantize_quad(v4, v5, v6, v7, 127.0 / tl.maximum(upp, 1e-30))
    scale_lower = low * (1.0 / 127.0)
    scale_upper = upp * (1.0 / 127.0)
    sum_lower = scale_lower
    sum_upper = scale_upper
    if SUMS:
        ones = tl.full(x_lower.shape, 0x01010101, tl.int32)
        sum_lower = dp4a(x_lower, ones, tl.zeros_like(x_lower)).to(tl.float32) * scale_lower
        sum_upper = dp4a(x_upper, ones, tl.zeros_like(x_upper)).to(tl.float32) * scale_upper
    flat = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    for i in range(TILES):
        n = start + i * BN + tl.arange(0, BN)[None, :]
        store = (n < N) & (flat < M)
        where = flat * N + n
        if RESIDUAL:
            added = tl.load(residual + where, mask=store, other=0.0)
        if TILES > 1:  # the next tile's loads are under way while this one is multiplied
            rows = tl.minimum(start + (i + 1) * BN + local, last)
            next_tile = load_pair(words, high, d, m, sub_d, sub_m, rows, g, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
            if GATE is not None:
                next_twin = load_pair(
                    words, high, d, m, sub_d, sub_m, rows + N, g, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN
                )
        y = pair_sums(tile, x_lower, x_upper, scale_lower, scale_upper, sum_lower, sum_upper, GROUP, SUMS)
        if NORM:
            root = tl.rsqrt(tl.sum(tl.sum(squares, 3), 2) / K + eps)
            y *= root
        if BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if GATE is not None:
            up = pair_sums(twin, x_lower, x_upper, scale_lower, scale_upper, sum_lower, sum_upper, GROUP, SUMS)
            if NORM:
                up *= root
            if BIAS:
                up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
            y = gate_times_up(y, up, GATE)
        if RESIDUAL:
            y += added
        tl.store(out + where, y.to(out.dtype.element_ty), mask=store)
        if TILES > 1:
            tile = next_tile
            if GATE is not None:
                twin = next_twin


@triton.jit
def _streamed_kernel(
    x_words, x_scales, squares, eps, words, high, d, m, sub_d, sub_m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + NG - 1) // NG
    SUB: tl.constexpr = GROUP != SUPER
    MIN: tl.constexpr = MIN_SIGN != 0
    start = tl.program_id(0) * (R * W)
    rows = tl.minimum(start + tl.arange(0, R)[None, :, None, None] * W + tl.arange(0, W)[None, None, :, None], N - 1)
    n = start + tl.arange(0, R)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    flat_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None]
    store = (n < N) & (flat_row < M)
    where = flat_row * N + n
    row = tl.minimum(tl.program_id(1) * ROWS + tl.arange(0, ROWS), M - 1)[:, None, None, None]
    g = tl.arange(0, NG)[None, None, None, :]
    lane = tl.arange(0, W)[None, None, :, None] * 0 + g
    tile = load_tile(words, high, d, m, sub_d, sub_m, rows, g, KG, BITS, SUPER, MIN, SUB)
    twin = tile
    if GATE is not None:
        twin = load_tile(words, high, d, m, sub_d, sub_m, rows + N, g, KG, BITS, SUPER, MIN, SUB)
    wait(PDL)
    if RESIDUAL:
        added = tl.load(residual + where, mask=store, other=0.0)
    acc = tl.zeros((ROWS, R, W, NG), tl.float32)
    up = acc
    for step in range(STEPS):
        at = row * KG + step * NG + lane
        inside = (row >= 0) & (step * NG + lane < KG)
        w0, w1, w2, w3 = load_words(x_words + at * 8, inside)
        w4, w5, w6, w7 = load_words(x_words + at * 8 + 4, inside)
        scale = load_word(x_scales + at, inside).to(tl.float32, bitcast=True)
        if HEADS > 0:
            scale *= head_norm(squares, row, step * NG + lane, inside, K, HEADS, eps)
        if STEPS > 1:  # groups of a step beyond the last read as zeros, without a load
            ahead = (step + 1) * NG + g
            next_tile = load_tile(words, high, d, m, sub_d, sub_m, rows, ahead, KG, BITS, SUPER, MIN, SUB)
            if GATE is not None:
                next_twin = load_tile(words, high, d, m, sub_d, sub_m, rows + N, ahead, KG, BITS, SUPER, MIN, SUB)
        quantized = with_sums(w0, w1, w2, w3, w4, w5, w6, w7, scale, GROUP, MIN or OFFSET != 0)
        acc += products(tile, quantized, BITS, GROUP, OFFSET, MIN_SIGN, SUB)
        if GATE is not None:
            up += products(twin, quantized, BITS, GROUP, OFFSET, MIN_SIGN, SUB)
        if STEPS > 1:
            tile = next_tile
            if GATE is not None:
                twin = next_twin
    y = tl.sum(acc, 3)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if GATE is not None:
        z = tl.sum(up, 3)
        if BIAS:
            z += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = gate_times_up(y, z, GATE)
    if RESIDUAL:
        y += added
    tl.store(out + where, y.to(out.dtype.element_ty), mask=store)
