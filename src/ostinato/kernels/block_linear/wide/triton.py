"""Block-quantized products for some rows of x and groups of 64 or 128 columns: int8, ``mma.m16n8k32``, wide loads.

The order of k inside a product is free as long as both operands have the same. Here a *span* is the 64 or 128 columns
of one scale of W, and the four threads of a row of an operand take a quarter of it each with one load of 8 or 16 bytes;
product s of the span multiplies what word s of each thread holds: the quads in its low nibbles, then those in its high
ones. All products of a span share a scale of W and one of x, so they are summed as integers and scaled once.

x is rounded by a kernel that stores it in this order: for each tile of 8 rows and each span the operands of the 32
threads of a warp, side by side, and with them each row's scale and the sum of its integers.

Tensors are [RT, TT, WARPS, 8, 4] as in ``batch``: tiles of 16 rows of W, tiles of 8 rows of x, the spans of each warp,
and the 32 threads (r, j) of a warp. A thread has rows r and r + 8 of W, by rows 2j and 2j + 1 of x in the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.batch.triton import mma_onto
from ostinato.kernels.triton import INTERPRETED, gate_times_up, load_halves, load_word, load_words, trigger, wait

# Sums start from the bits of this float, 1.5 * 2**23: read as a float they are then off by exactly so much.
FLOAT_BITS = tl.constexpr(0x4B400000)
FLOAT = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["M"])
def _round_kernel(
    x, stride_x, weight, eps, out, factors, M, K: tl.constexpr, SPAN: tl.constexpr, NS: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    KS: tl.constexpr = K // SPAN
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, NS)
    c = tl.arange(0, SPAN)[None, :]
    k = g[:, None] * SPAN + c
    inside = (g < KS)[:, None]
    if NORM:
        w = tl.load(weight + k, mask=inside, other=0.0)
    wait(PDL)
    value = tl.load(x + row * stride_x + k, mask=inside & (row < M), other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.sum(value * value, 1), 0) / K
        value *= w * tl.rsqrt(tl.maximum(mean + eps, 1e-30))
    largest = tl.max(tl.abs(value), 1)
    inverse = (127.0 / tl.maximum(largest, 1e-30))[:, None]
    rounded = ((value * inverse + FLOAT).to(tl.int32, bitcast=True) << 24) >> 24
    scale = largest * (1.0 / 127.0)
    if SPAN == 128:
        at = c // 16 % 2 * 512 + c // 32 * 16 + c % 16 + row % 8 * 64
    else:
        at = c // 32 * 32 + c % 16 // 8 * 16 + c % 32 // 16 * 8 + c % 8 + row % 8 * 64
        at = tl.max_contiguous(tl.multiple_of(at, (1, 8)), (1, 8))  # the compiler would store byte by byte
    span = row // 8 * KS + g
    tl.store(out + span[:, None] * (SPAN * 8) + at, rounded.to(tl.int8), mask=inside)
    tl.store(factors + span * 16 + row % 8 * 2, scale, mask=g < KS)
    tl.store(factors + span * 16 + row % 8 * 2 + 1, tl.sum(rounded, 1).to(tl.float32), mask=g < KS)


@triton.jit
def load_two(pointer, inside):
    """Two adjacent int32, zeros outside; pointers of 8-byte alignment. Like ``load_words``."""
    if INTERPRETED:
        return tl.load(pointer, mask=inside, other=0), tl.load(pointer + 1, mask=inside, other=0)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $3, 0;
            mov.b32 $0, 0; mov.b32 $1, 0;
            @p ld.global.v2.b32 {$0, $1}, [$2];
            }""",
            "=&r,=&r,l,r",
            [pointer, inside.to(tl.int32)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_span(words, high, row, span, j, K: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr):
    """What thread j loads of a span of a row: four words, or two; with 6 bits also two words of high bits."""
    inside = row + span + j >= 0
    if MASKED:
        inside = inside & (span < K // SPAN)
    if SPAN == 128:
        w0, w1, w2, w3 = load_words(words + (row * (K // 128) + span) * 16 + j * 4, inside)
        return w0, w1, w2, w3
    else:
        block = (row * (K // 64) + span) * 2 + j // 2
        w0, w1 = load_two(words + block * 4 + j % 2 * 2, inside)
        if BITS == 6:
            h0, h1 = load_two(high + block * 2, inside)
        else:
            h0, h1 = w0, w0
        return w0, w1, h0, h1


@triton.jit
def load_scales(d, m, row, span, K: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr, HAS_MIN: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """The bits of COUNT scales of a row, then of its minima (the scales again without)."""
    KS: tl.constexpr = K // SPAN
    at = row * KS + span
    inside = (row >= 0) & (span >= 0)
    if COUNT == 4 and KS % 4 == 0:
        if MASKED:
            inside = inside & (span < KS)
        found = load_halves(d + at, inside)
        if HAS_MIN:
            found += load_halves(m + at, inside)
        else:
            found += found
    else:
        found = ()
        for i in tl.static_range(COUNT):
            found += (load_word(d + at + i, inside & (span + i < KS)).to(tl.int16),)
        if HAS_MIN:
            for i in tl.static_range(COUNT):
                found += (load_word(m + at + i, inside & (span + i < KS)).to(tl.int16),)
        else:
            found += found
    return found


@triton.jit
def load_chunk(
    words, high, d, m, first, last, span, j, K: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr,
    COUNT: tl.constexpr, HAS_MIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """COUNT spans of rows ``first`` and of the rows 8 further, none beyond ``last``: words, then scales."""
    low = tl.minimum(first, last)
    upp = tl.minimum(first + 8, last)
    found = ()
    for i in tl.static_range(COUNT):
        found += load_span(words, high, low, span + i, j, K, BITS, SPAN, MASKED)
        found += load_span(words, high, upp, span + i, j, K, BITS, SPAN, MASKED)
    found += load_scales(d, m, low, span + j * 0, K, SPAN, COUNT, HAS_MIN, MASKED)
    found += load_scales(d, m, upp, span + j * 0, K, SPAN, COUNT, HAS_MIN, MASKED)
    return found


@triton.jit
def load_x(x, factors, eight, span, r, j, KS: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr):
    """Scale and sum of rows 2j and 2j + 1 of x, as bits, then its words: of the lower quads, then of the upper."""
    at = eight * KS + span
    inside = at >= 0
    if MASKED:
        inside = span + eight * 0 < KS
    found = load_words(factors + at * 16 + j * 4, inside)
    if SPAN == 128:
        found += load_words(x + at * 256 + (r * 4 + j) * 4, inside)
        found += load_words(x + at * 256 + 128 + (r * 4 + j) * 4, inside)
    else:
        found += load_words(x + at * 128 + (r * 4 + j) * 4, inside)
    return found


@triton.jit
def half_bits(bits):
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def multiply(acc, tile, i: tl.constexpr, j, x, at: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr,
             COUNT: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, SHAPE: tl.constexpr):  # fmt: skip
    """The four accumulators plus the products of span i of a chunk of W and span ``at`` of what ``load_x`` read."""
    PARTS: tl.constexpr = SPAN // 32
    FIRST: tl.constexpr = at * (4 + 2 * PARTS)
    start = tl.full(SHAPE, FLOAT_BITS, tl.int32)
    c = (start, start, start, start)
    for s in tl.static_range(PARTS):
        a0 = tile[i * 8 + s] & 0x0F0F0F0F
        a1 = tile[i * 8 + 4 + s] & 0x0F0F0F0F
        a2 = (tile[i * 8 + s] >> 4) & 0x0F0F0F0F
        a3 = (tile[i * 8 + 4 + s] >> 4) & 0x0F0F0F0F
        if BITS == 6:
            shift = j % 2 * 4 + 2 * s
            a0 |= ((tile[i * 8 + 2] >> shift) & 0x03030303) << 4
            a1 |= ((tile[i * 8 + 6] >> shift) & 0x03030303) << 4
            a2 |= ((tile[i * 8 + 3] >> shift) & 0x03030303) << 4
            a3 |= ((tile[i * 8 + 7] >> shift) & 0x03030303) << 4
        c = mma_onto(c, a0, a1, a2, a3, x[FIRST + 4 + s], x[FIRST + 4 + PARTS + s], SHAPE)
    s0, s1 = x[FIRST].to(tl.float32, bitcast=True), x[FIRST + 2].to(tl.float32, bitcast=True)
    t0, t1 = x[FIRST + 1].to(tl.float32, bitcast=True), x[FIRST + 3].to(tl.float32, bitcast=True)
    d0, d1 = half_bits(tile[COUNT * 8 + i]), half_bits(tile[COUNT * 10 + i])
    p0, p1 = c[0].to(tl.float32, bitcast=True) - FLOAT, c[1].to(tl.float32, bitcast=True) - FLOAT
    p2, p3 = c[2].to(tl.float32, bitcast=True) - FLOAT, c[3].to(tl.float32, bitcast=True) - FLOAT
    if MIN_SIGN != 0:
        m0, m1 = MIN_SIGN * half_bits(tile[COUNT * 9 + i]), MIN_SIGN * half_bits(tile[COUNT * 11 + i])
        if OFFSET != 0:
            m0 -= OFFSET * d0
            m1 -= OFFSET * d1
        p0, p1 = p0 * d0 + t0 * m0, p1 * d0 + t1 * m0
        p2, p3 = p2 * d1 + t0 * m1, p3 * d1 + t1 * m1
    else:
        p0, p1 = (p0 - OFFSET * t0) * d0, (p1 - OFFSET * t1) * d0
        p2, p3 = (p2 - OFFSET * t0) * d1, (p3 - OFFSET * t1) * d1
    return acc[0] + p0 * s0, acc[1] + p1 * s1, acc[2] + p2 * s0, acc[3] + p3 * s1


@triton.jit
def add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def over_warps(acc):
    """The accumulators' sums over the warps, exchanged together."""
    if INTERPRETED:
        return tl.sum(acc[0], 2), tl.sum(acc[1], 2), tl.sum(acc[2], 2), tl.sum(acc[3], 2)
    else:
        return tl.reduce((acc[0], acc[1], acc[2], acc[3]), 2, add_four)


@triton.jit(do_not_specialize=["M"])
def _wide_kernel(
    x, factors, words, high, d, m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, SPAN: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    RT: tl.constexpr, TT: tl.constexpr, COUNT: tl.constexpr, WARPS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x, factors: of ``_round_kernel``, as int32. d, m: the bits of the scales, int16."""
    trigger(PDL)
    KS: tl.constexpr = K // SPAN
    STEPS: tl.constexpr = (KS + COUNT * WARPS - 1) // (COUNT * WARPS)
    MASKED: tl.constexpr = STEPS * COUNT * WARPS != KS
    AHEAD: tl.constexpr = COUNT if COUNT * TT <= 4 else 1
    shape: tl.constexpr = (RT, TT, WARPS, 8, 4)
    zero = tl.zeros((1, 1, 1, 8, 4), tl.int32)  # added to an index, it keeps the threads of a warp in place
    r = tl.arange(0, 8)[None, None, None, :, None] + zero
    j = tl.arange(0, 4)[None, None, None, None, :] + zero
    warp = tl.arange(0, WARPS)[None, None, :, None, None] + zero
    n = tl.program_id(0) * (RT * 16) + tl.arange(0, RT)[:, None, None, None, None] * 16 + r
    eight = tl.program_id(1) * TT + tl.arange(0, TT)[None, :, None, None, None]
    eight = tl.minimum(eight, (M + 7) // 8 - 1) + zero  # a program's tiles beyond the last repeat it
    span = warp * COUNT
    tile = load_chunk(words, high, d, m, n, N - 1, span, j, K, BITS, SPAN, COUNT, MIN_SIGN != 0, MASKED)
    twin = tile
    if GATE is not None:
        twin = load_chunk(words, high, d, m, n + N, N * 2 - 1, span, j, K, BITS, SPAN, COUNT, MIN_SIGN != 0, MASKED)
    wait(PDL)
    acc = (tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32),
           tl.zeros(shape, tl.float32))  # fmt: skip
    up = acc
    for step in range(STEPS):
        span = (step * WARPS + warp) * COUNT
        if STEPS > 1:
            ahead = span + WARPS * COUNT  # spans of a step beyond the last read as zeros, without a load
            next_tile = load_chunk(words, high, d, m, n, N - 1, ahead, j, K, BITS, SPAN, COUNT, MIN_SIGN != 0, True)
            if GATE is not None:
                next_twin = load_chunk(
                    words, high, d, m, n + N, N * 2 - 1, ahead, j, K, BITS, SPAN, COUNT, MIN_SIGN != 0, True
                )
        for i in tl.static_range(COUNT):
            if i % AHEAD == 0:  # the loads of x for some spans at once, or each waits for its own
                rows_of_x = ()
                for later in tl.static_range(AHEAD):
                    rows_of_x += load_x(x, factors, eight, span + (i + later), r, j, KS, SPAN, MASKED)
            acc = multiply(acc, tile, i, j, rows_of_x, i % AHEAD, BITS, SPAN, COUNT, OFFSET, MIN_SIGN, shape)
            if GATE is not None:
                up = multiply(up, twin, i, j, rows_of_x, i % AHEAD, BITS, SPAN, COUNT, OFFSET, MIN_SIGN, shape)
        if STEPS > 1:
            tile = next_tile
            if GATE is not None:
                twin = next_twin
    flat_n = tl.program_id(0) * (RT * 16) + tl.arange(0, RT)[:, None, None, None] * 16
    flat_n += tl.arange(0, 8)[None, None, :, None]
    flat_token = tl.program_id(1) * (TT * 8) + tl.arange(0, TT)[None, :, None, None] * 8
    flat_token += 2 * tl.arange(0, 4)[None, None, None, :]
    sums = over_warps(acc)
    if GATE is not None:
        up_sums = over_warps(up)
    for part in tl.static_range(4):
        rows = flat_n + 8 * (part // 2)
        column = flat_token + part % 2
        store = (rows < N) & (column < M)
        where = column * N + rows
        y = sums[part]
        if BIAS:
            y += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        if GATE is not None:
            z = up_sums[part]
            if BIAS:
                z += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)
            y = gate_times_up(y, z, GATE)
        if RESIDUAL:
            y += tl.load(residual + where, mask=store, other=0.0)
        tl.store(out + where, y.to(out.dtype.element_ty), mask=store)
