"""Block-quantized products for some rows of x: int8 activations and the tensor cores' integer products.

The layout of ``words`` is that of the operands of ``mma.m16n8k32``: of a group of 32 columns, thread (row r, j) of a
warp holds quads j and j + 4, which are the low and the high nibbles of word j. So a word is loaded, masked and
multiplied in the same thread. Tensors are [RT, TT, WARPS, 8, 4]: tiles of 16 rows of W, tiles of 8 rows of x, one group
a warp, and the 32 threads of a warp. Which thread holds what follows from this shape: Triton spreads the last two axes
over a warp, and the one before them over the warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import load_pair
from ostinato.kernels.triton import INTERPRETED, dp4a, gate_times_up, load_word, trigger, wait


@triton.jit
def rows_times_rows(a, b, SHAPE: tl.constexpr):
    """Of [.., 8, 4] words of W and of x: int32 [.., 8, 8], the products of every row with every row."""
    wide: tl.constexpr = (SHAPE[0], SHAPE[1], SHAPE[2], 8, 8, 4)
    left = tl.broadcast_to(a[:, :, :, :, None, :], wide)
    return tl.sum(dp4a(left, tl.broadcast_to(b[:, :, :, None, :, :], wide), tl.zeros(wide, tl.int32)), 5)


@triton.jit
def mma_onto(c, a0, a1, a2, a3, b0, b1, SHAPE: tl.constexpr):
    """The four int32 sums ``c`` plus those over a group of 16 rows of W by 8 rows of x, a warp at a time.

    a0, a2: lower and upper quads of rows 0 … 7 of W; a1, a3: of rows 8 … 15. b0, b1: lower and upper quads of x.
    Thread (r, j) gets rows r and r + 8 of W by rows 2j and 2j + 1 of x: (r, 2j), (r, 2j + 1), (r + 8, 2j),
    (r + 8, 2j + 1).
    """
    a0 = tl.broadcast_to(a0, SHAPE)
    a1 = tl.broadcast_to(a1, SHAPE)
    a2 = tl.broadcast_to(a2, SHAPE)
    a3 = tl.broadcast_to(a3, SHAPE)
    b0 = tl.broadcast_to(b0, SHAPE)
    b1 = tl.broadcast_to(b1, SHAPE)
    if INTERPRETED:
        pairs: tl.constexpr = (SHAPE[0], SHAPE[1], SHAPE[2], 8, 4, 2)
        c0, c1 = tl.split(tl.reshape(rows_times_rows(a0, b0, SHAPE) + rows_times_rows(a2, b1, SHAPE), pairs))
        c2, c3 = tl.split(tl.reshape(rows_times_rows(a1, b0, SHAPE) + rows_times_rows(a3, b1, SHAPE), pairs))
        return c[0] + c0, c[1] + c1, c[2] + c2, c[3] + c3
    else:
        return tl.inline_asm_elementwise(
            """mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
            {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};""",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, SHAPE: tl.constexpr):
    """``mma_onto`` nothing."""
    zero = tl.zeros(SHAPE, tl.int32)
    return mma_onto((zero, zero, zero, zero), a0, a1, a2, a3, b0, b1, SHAPE)


@triton.jit
def add_products(acc, tile, b0, b1, s0, s1, lower, upper, GROUP: tl.constexpr, SUMS: tl.constexpr, SHAPE: tl.constexpr):
    """The four accumulators plus the products of a group.

    tile: ``load_pair`` of rows r, then of rows r + 8. s0, s1: the scales of rows 2j and 2j + 1 of x. lower, upper: the
    unscaled sums of each half of those two rows of x (of all 32 columns in ``lower`` for groups of 32 and more).
    """
    if GROUP >= 32:
        c0, c1, c2, c3 = mma(tile[0], tile[6], tile[1], tile[7], b0, b1, SHAPE)
        p0, p1 = c0.to(tl.float32) * tile[2], c1.to(tl.float32) * tile[2]
        p2, p3 = c2.to(tl.float32) * tile[8], c3.to(tl.float32) * tile[8]
    else:
        zero = tl.zeros_like(tile[0])
        c0, c1, c2, c3 = mma(tile[0], tile[6], zero, zero, b0, b1, SHAPE)
        e0, e1, e2, e3 = mma(zero, zero, tile[1], tile[7], b0, b1, SHAPE)
        p0 = c0.to(tl.float32) * tile[2] + e0.to(tl.float32) * tile[4]
        p1 = c1.to(tl.float32) * tile[2] + e1.to(tl.float32) * tile[4]
        p2 = c2.to(tl.float32) * tile[8] + e2.to(tl.float32) * tile[10]
        p3 = c3.to(tl.float32) * tile[8] + e3.to(tl.float32) * tile[10]
    if SUMS:
        p0 += lower[0] * tile[3]
        p1 += lower[1] * tile[3]
        p2 += lower[0] * tile[9]
        p3 += lower[1] * tile[9]
        if GROUP == 16:
            p0 += upper[0] * tile[5]
            p1 += upper[1] * tile[5]
            p2 += upper[0] * tile[11]
            p3 += upper[1] * tile[11]
    return acc[0] + p0 * s0, acc[1] + p1 * s1, acc[2] + p2 * s0, acc[3] + p3 * s1


@triton.jit
def load_both(
    words, high, d, m, sub_d, sub_m, first, last, g, j, KG: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
):  # fmt: skip
    """``load_pair`` of rows ``first`` and of the rows 8 further, none beyond ``last``."""
    a0, a2, s0, m0, t0, n0 = load_pair(
        words, high, d, m, sub_d, sub_m, tl.minimum(first, last), g, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN
    )
    a1, a3, s1, m1, t1, n1 = load_pair(
        words, high, d, m, sub_d, sub_m, tl.minimum(first + 8, last), g, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN
    )
    return a0, a2, s0, m0, t0, n0, a1, a3, s1, m1, t1, n1


@triton.jit
def _mma_kernel(
    x_words, x_scales, words, high, d, m, sub_d, sub_m, bias, residual, out, M, N, K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    RT: tl.constexpr, TT: tl.constexpr, WARPS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + WARPS - 1) // WARPS
    SUMS: tl.constexpr = MIN_SIGN != 0 or OFFSET != 0
    shape: tl.constexpr = (RT, TT, WARPS, 8, 4)
    of_x: tl.constexpr = (1, TT, WARPS, 8, 4)
    zero = tl.zeros((1, 1, 1, 8, 4), tl.int32)  # added to an index, it keeps the threads of a warp in place
    r = tl.arange(0, 8)[None, None, None, :, None] + zero
    j = tl.arange(0, 4)[None, None, None, None, :] + zero
    warp = tl.arange(0, WARPS)[None, None, :, None, None] + zero
    n = tl.program_id(0) * (RT * 16) + tl.arange(0, RT)[:, None, None, None, None] * 16 + r
    token = tl.program_id(1) * (TT * 8) + tl.arange(0, TT)[None, :, None, None, None] * 8
    tile = load_both(words, high, d, m, sub_d, sub_m, n, N - 1, warp, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
    twin = tile
    if GATE is not None:
        twin = load_both(
            words, high, d, m, sub_d, sub_m, n + N, N * 2 - 1, warp, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN
        )
    wait(PDL)
    acc = (tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32),
           tl.zeros(shape, tl.float32))  # fmt: skip
    up = acc
    for step in range(STEPS):
        g = step * WARPS + warp
        b_at = tl.minimum(token + r, M - 1) * KG + g
        inside = (token >= 0) & (r >= 0) & (g < KG)
        b0 = load_word(x_words + b_at * 8 + j, inside)
        b1 = load_word(x_words + b_at * 8 + j + 4, inside)
        s0 = load_word(x_scales + tl.minimum(token + 2 * j, M - 1) * KG + g, inside).to(tl.float32, bitcast=True)
        s1 = load_word(x_scales + tl.minimum(token + 2 * j + 1, M - 1) * KG + g, inside).to(tl.float32, bitcast=True)
        if STEPS > 1:  # groups of a step beyond the last read as zeros, without a load
            next_tile = load_both(
                words, high, d, m, sub_d, sub_m, n, N - 1, g + WARPS, j, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN
            )
            if GATE is not None:
                next_twin = load_both(
                    words, high, d, m, sub_d, sub_m, n + N, N * 2 - 1, g + WARPS, j, KG, BITS, GROUP, SUPER, OFFSET,
                    MIN_SIGN,
                )  # fmt: skip
        lower = (s0, s0)
        upper = lower
        if SUMS:  # a product with ones gives each thread the sums of its rows of x
            ones = tl.full(of_x, 0x01010101, tl.int32)
            none = tl.zeros(of_x, tl.int32)
            if GROUP >= 32:
                t0, t1, _, _ = mma(ones, ones, ones, ones, b0, b1, of_x)
            else:
                t0, t1, _, _ = mma(ones, ones, none, none, b0, b1, of_x)
                u0, u1, _, _ = mma(none, none, ones, ones, b0, b1, of_x)
                upper = (u0.to(tl.float32), u1.to(tl.float32))
            lower = (t0.to(tl.float32), t1.to(tl.float32))
        acc = add_products(acc, tile, b0, b1, s0, s1, lower, upper, GROUP, SUMS, shape)
        if GATE is not None:
            up = add_products(up, twin, b0, b1, s0, s1, lower, upper, GROUP, SUMS, shape)
        if STEPS > 1:
            tile = next_tile
            if GATE is not None:
                twin = next_twin
    flat_r = tl.arange(0, 8)[None, None, :, None]
    flat_n = tl.program_id(0) * (RT * 16) + tl.arange(0, RT)[:, None, None, None] * 16 + flat_r
    flat_token = tl.program_id(1) * (TT * 8) + tl.arange(0, TT)[None, :, None, None] * 8
    flat_token += 2 * tl.arange(0, 4)[None, None, None, :]
    for part in tl.static_range(4):
        rows = flat_n + 8 * (part // 2)
        column = flat_token + part % 2
        store = (rows < N) & (column < M)
        where = column * N + rows
        y = tl.sum(acc[part], 2)
        if BIAS:
            y += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        if GATE is not None:
            z = tl.sum(up[part], 2)
            if BIAS:
                z += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)
            y = gate_times_up(y, z, GATE)
        if RESIDUAL:
            y += tl.load(residual + where, mask=store, other=0.0)
        tl.store(out + where, y.to(out.dtype.element_ty), mask=store)
