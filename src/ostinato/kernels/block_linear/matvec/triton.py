"""Block-quantized products for few rows of x: int8 activations, dp4a, exact integer sums within a group.

Everything is a tensor [ROWS, R, W, NG] or one that broadcasts to it: rows of x, rows of W as R · W, groups of 32
columns. NG · W is the number of threads, so a thread holds whole groups: its quads are separate tensors, and nothing is
exchanged between threads but the sums over groups at the end. (Each warp quantizes all of x for itself; that is cheaper
than sharing it.)

In ``_resident_kernel`` each program quantizes its rows of x and keeps them in registers over TILES tiles of W, which
saves a kernel and its launch. Where x is too long for that, ``_streamed_kernel`` reads rows that were quantized before
and walks along the columns.
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
def load_tile(
    words, high, d, m, sub_d, sub_m, rows, g, KG: tl.constexpr, BITS: tl.constexpr, SUPER: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_SUB: tl.constexpr,
):  # fmt: skip
    """The raw planes of a tile: eight words (four for less than 8 bits), high bits, scales.

    rows: int32 [1, R, W, 1]. g: int32 [1, 1, 1, NG], the groups; those from KG on read as zeros.
    For groups of 16, sub_d and sub_m hold two int8 in an int16, one per half of 32 columns.
    What a kind does not have is the first word again, and unused.
    """
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
    over = rows * (KG * 32 // SUPER) + g // (SUPER // 32)
    dd = load_word(d + over, inside)
    mm, sd, sm = dd, h0, h0
    if HAS_MIN:
        mm = load_word(m + over, inside)
    if HAS_SUB:
        sd = load_word(sub_d + at, inside)
        if HAS_MIN:
            sm = load_word(sub_m + at, inside)
    return w0, w1, w2, w3, w4, w5, w6, w7, h0, h1, dd, mm, sd, sm


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
    first of them for groups of 32), [ROWS, 1, W, NG] each.
    """
    shape: tl.constexpr = (x[8].shape[0], tile[0].shape[1], tile[0].shape[2], tile[0].shape[3])
    zero = tl.zeros(shape, tl.int32)
    lower = zero
    upper = zero
    for t in tl.static_range(4):
        lower = dp4a(tl.broadcast_to(quad(tile, t, BITS), shape), tl.broadcast_to(x[t], shape), lower)
    if GROUP == 32:
        upper = lower
    for t in tl.static_range(4, 8):
        upper = dp4a(tl.broadcast_to(quad(tile, t, BITS), shape), tl.broadcast_to(x[t], shape), upper)
    scale, minimum = half(tile[10], tile[11], tile[12], tile[13], False, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
    if GROUP == 32:
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
        if GROUP == 32:
            lower = dp4a(w7, ones, dp4a(w6, ones, dp4a(w5, ones, dp4a(w4, ones, low)))).to(tl.float32) * scale
        else:
            lower = low.to(tl.float32) * scale
            up = dp4a(w7, ones, dp4a(w6, ones, dp4a(w5, ones, dp4a(w4, ones, tl.zeros_like(w0)))))
            upper = up.to(tl.float32) * scale
    return w0, w1, w2, w3, w4, w5, w6, w7, scale, lower, upper


@triton.jit
def load_group(pointer, inside):
    """32 adjacent floats as a tuple of float32 tensors."""
    a0, b0, c0, d0 = load_floats(pointer, inside)
    a1, b1, c1, d1 = load_floats(pointer + 4, inside)
    a2, b2, c2, d2 = load_floats(pointer + 8, inside)
    a3, b3, c3, d3 = load_floats(pointer + 12, inside)
    a4, b4, c4, d4 = load_floats(pointer + 16, inside)
    a5, b5, c5, d5 = load_floats(pointer + 20, inside)
    a6, b6, c6, d6 = load_floats(pointer + 24, inside)
    a7, b7, c7, d7 = load_floats(pointer + 28, inside)
    return (a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3,
            a4, b4, c4, d4, a5, b5, c5, d5, a6, b6, c6, d6, a7, b7, c7, d7)  # fmt: skip


@triton.jit
def quantized_quad(v, weight, t: tl.constexpr, inverse, NORM: tl.constexpr):
    """Quad t of a group of values (times the norm's weights) as a word of int8."""
    a, b, c, d = v[4 * t], v[4 * t + 1], v[4 * t + 2], v[4 * t + 3]
    if NORM:
        a *= weight[4 * t]
        b *= weight[4 * t + 1]
        c *= weight[4 * t + 2]
        d *= weight[4 * t + 3]
    return quantize_quad(a, b, c, d, inverse)


@triton.jit
def quantize(v, weight, NORM: tl.constexpr):
    """Eight words, the scale and the sum of squares of a group of 32 values, times the norm's weights where NORM.

    The root mean square only scales a row: rounding to int8 is the same without it, so it is applied at the end.
    """
    first = tl.zeros_like(v[0])
    second = tl.zeros_like(v[0])
    even = tl.zeros_like(v[0])
    odd = tl.zeros_like(v[0])
    for i in tl.static_range(16):
        if NORM:
            even += v[2 * i] * v[2 * i]
            odd += v[2 * i + 1] * v[2 * i + 1]
            first = tl.maximum(first, tl.abs(v[2 * i] * weight[2 * i]))
            second = tl.maximum(second, tl.abs(v[2 * i + 1] * weight[2 * i + 1]))
        else:
            first = tl.maximum(first, tl.abs(v[2 * i]))
            second = tl.maximum(second, tl.abs(v[2 * i + 1]))
    largest = tl.maximum(first, second)
    inverse = 127.0 / tl.maximum(largest, 1e-30)
    return (
        quantized_quad(v, weight, 0, inverse, NORM),
        quantized_quad(v, weight, 1, inverse, NORM),
        quantized_quad(v, weight, 2, inverse, NORM),
        quantized_quad(v, weight, 3, inverse, NORM),
        quantized_quad(v, weight, 4, inverse, NORM),
        quantized_quad(v, weight, 5, inverse, NORM),
        quantized_quad(v, weight, 6, inverse, NORM),
        quantized_quad(v, weight, 7, inverse, NORM),
        largest * (1.0 / 127.0),
        even + odd,
    )


@triton.jit
def _resident_kernel(
    x, stride_x, norm, eps, words, high, d, m, sub_d, sub_m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, NG: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    KG: tl.constexpr = K // 32
    BN: tl.constexpr = R * W
    SUB: tl.constexpr = GROUP != SUPER
    MIN: tl.constexpr = MIN_SIGN != 0
    g = tl.arange(0, NG)[None, None, None, :]
    local = tl.arange(0, R)[None, :, None, None] * W + tl.arange(0, W)[None, None, :, None]
    start = tl.program_id(0) * (BN * TILES)
    last = tl.minimum(start + BN * TILES, N) - 1
    rows = tl.minimum(start + local, last)
    tile = load_tile(words, high, d, m, sub_d, sub_m, rows, g, KG, BITS, SUPER, MIN, SUB)
    twin = tile
    if GATE is not None:
        twin = load_tile(words, high, d, m, sub_d, sub_m, rows + N, g, KG, BITS, SUPER, MIN, SUB)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None, None]
    lane = tl.arange(0, W)[None, None, :, None] * 0 + g  # [1, 1, W, NG], so that every warp loads x for itself
    weight = (lane,)
    if NORM:
        weight = load_group(norm + lane * 32, lane < KG)
    flat_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None]
    flat_local = tl.arange(0, R)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    wait(PDL)
    values = load_group(x + row * stride_x + lane * 32, (row < M) & (lane < KG))
    w0, w1, w2, w3, w4, w5, w6, w7, scale, squares = quantize(values, weight, NORM)
    quantized = with_sums(w0, w1, w2, w3, w4, w5, w6, w7, scale, GROUP, MIN or OFFSET != 0)
    for i in range(TILES):
        n = start + i * BN + flat_local
        store = (n < N) & (flat_row < M)
        where = flat_row * N + n
        if RESIDUAL:
            added = tl.load(residual + where, mask=store, other=0.0)
        if TILES > 1:  # the next tile's loads are under way while this one is multiplied
            rows = tl.minimum(start + (i + 1) * BN + local, last)
            next_tile = load_tile(words, high, d, m, sub_d, sub_m, rows, g, KG, BITS, SUPER, MIN, SUB)
            if GATE is not None:
                next_twin = load_tile(words, high, d, m, sub_d, sub_m, rows + N, g, KG, BITS, SUPER, MIN, SUB)
        y = tl.sum(products(tile, quantized, BITS, GROUP, OFFSET, MIN_SIGN, SUB), 3)
        if NORM:
            root = tl.rsqrt(tl.sum(squares, 3) / K + eps)
            y *= root
        if BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if GATE is not None:
            up = tl.sum(products(twin, quantized, BITS, GROUP, OFFSET, MIN_SIGN, SUB), 3)
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
    x_words, x_scales, words, high, d, m, sub_d, sub_m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr,
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
