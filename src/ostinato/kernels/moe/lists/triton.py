"""Gate, up and down products of lists of picks: four-bit weights in groups of 128, ``mma.m16n8k32`` over int8.

16 rows of W are one side of a product and up to eight picks of one expert the other. The order of columns inside a
product is free where both sides have it: thread (r, j) of a warp reads the whole j-th block of 32 columns of a group of
128, for rows r and r + 8, 16 bytes each, and product s of four takes word s of every thread's block: its low nibbles
are quad s and its high nibbles quad s + 4 of the columns. So a product's 32 columns come from four blocks of 32, but
from one group: weights share a scale, four products one integer sum, and 128 columns a multiplication by scales. For
that int8 inputs have one scale for 128 columns as well, and beside it the sum of the group, for the minimum.

Tensors are [RT, 1, WARPS, 8, 4], as in block_linear's batch kernel: tiles of 16 rows of W, and the 32 threads of each
warp. Of WARPS, KW split the columns and the others the rows.

What follows from a kernel's own wait is said in experts/triton.py; it holds here too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.batch.triton import mma
from ostinato.kernels.moe.experts.triton import block_span
from ostinato.kernels.moe.route.triton import load_fresh, nothing
from ostinato.kernels.triton import INTERPRETED, gate_times_up, load_words, trigger, wait


@triton.jit
def load_streamed(pointer, inside):
    """``load_words`` of what is read once: it takes no room in the L1 cache, and the rest of its line comes along."""
    if INTERPRETED:
        return load_words(pointer, inside)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $5, 0;
            mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
            @p ld.global.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];
            }""",
            "=&r,=&r,=&r,=&r,l,r",
            [pointer, inside.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_bits(pointer, inside):
    """The bits of one float16 each as int16, zeros outside: converted only where used, to wait for nothing here."""
    if INTERPRETED:
        return tl.load(pointer, mask=inside, other=0.0).to(tl.int16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b16 $0, 0; @p ld.global.b16 $0, [$1]; }",
            "=&h,l,r", [pointer, inside.to(tl.int32)], dtype=tl.int16, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_two(pointer, inside):
    """Two adjacent float32, zeros outside; pointers of 8-byte alignment."""
    if INTERPRETED:
        return tl.load(pointer, mask=inside, other=0.0), tl.load(pointer + 1, mask=inside, other=0.0)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $3, 0;
            mov.b32 $0, 0; mov.b32 $1, 0;
            @p ld.global.v2.b32 {$0, $1}, [$2];
            }""",
            "=&f,=&f,l,r",
            [pointer, inside.to(tl.int32)],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def add_mma(a0, a1, a2, a3, b0, b1, c, SHAPE: tl.constexpr):
    """The four sums c plus ``mma`` of the others."""
    if INTERPRETED:
        found = mma(a0, a1, a2, a3, b0, b1, SHAPE)
        return c[0] + found[0], c[1] + found[1], c[2] + found[2], c[3] + found[3]
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
            " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, tl.broadcast_to(b0, SHAPE), tl.broadcast_to(b1, SHAPE), c[0], c[1], c[2], c[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def load_group(words, d, m, rows, b, j, KT: tl.constexpr, ROWS: tl.constexpr):
    """Group b of rows and of the rows 8 further, none beyond ROWS: two times four words, then scale and minimum."""
    low = tl.minimum(rows, ROWS - 1)
    upp = tl.minimum(rows + 8, ROWS - 1)
    inside = b + low * 0 < KT
    w0, w1, w2, w3 = load_streamed(words + low * (KT * 16) + b * 16 + j * 4, inside)
    w4, w5, w6, w7 = load_streamed(words + upp * (KT * 16) + b * 16 + j * 4, inside)
    d0, m0 = load_bits(d + low * KT + b, inside), load_bits(m + low * KT + b, inside)
    d1, m1 = load_bits(d + upp * KT + b, inside), load_bits(m + upp * KT + b, inside)
    return w0, w1, w2, w3, w4, w5, w6, w7, d0, m0, d1, m1


@triton.jit
def load_inputs(words, scales, row, row0, row1, own, own0, own1, b, j, KT: tl.constexpr):
    """Group b of the int8 inputs: eight words of ``row``, then scale and sum of rows row0 and row1."""
    at = words + row * (KT * 32) + b * 32 + j * 8
    inside = own & (b < KT)
    w0, w1, w2, w3 = load_words(at, inside)
    w4, w5, w6, w7 = load_words(at + 4, inside)
    s0, t0 = load_two(scales + (row0 * KT + b) * 2, own0 & (b < KT))
    s1, t1 = load_two(scales + (row1 * KT + b) * 2, own1 & (b < KT))
    return w0, w1, w2, w3, w4, w5, w6, w7, s0, t0, s1, t1


@triton.jit
def float_of(bits):
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def add_group(acc, tile, x, SHAPE: tl.constexpr):
    """The four accumulators plus the products of a group: rows r, r, r + 8, r + 8 by picks 2j, 2j + 1, 2j, 2j + 1."""
    # The bits of 1.5 * 2**23: an integer adds to them as it does to that float, so that nothing is to be converted.
    start = tl.full(SHAPE, 0x4B400000, tl.int32)
    c = (start, start, start, start)
    for s in tl.static_range(4):
        a0, a2 = tile[s] & 0x0F0F0F0F, (tile[s] >> 4) & 0x0F0F0F0F
        a1, a3 = tile[4 + s] & 0x0F0F0F0F, (tile[4 + s] >> 4) & 0x0F0F0F0F
        c = add_mma(a0, a1, a2, a3, x[s], x[4 + s], c, SHAPE)
    d0, m0, d1, m1 = float_of(tile[8]), float_of(tile[9]), float_of(tile[10]), float_of(tile[11])
    p0 = (c[0].to(tl.float32, bitcast=True) - 12582912.0) * d0
    p1 = (c[1].to(tl.float32, bitcast=True) - 12582912.0) * d0
    p2 = (c[2].to(tl.float32, bitcast=True) - 12582912.0) * d1
    p3 = (c[3].to(tl.float32, bitcast=True) - 12582912.0) * d1
    return (
        acc[0] + (p0 * x[8] + m0 * x[9]),
        acc[1] + (p1 * x[10] + m0 * x[11]),
        acc[2] + (p2 * x[8] + m1 * x[9]),
        acc[3] + (p3 * x[10] + m1 * x[11]),
    )


@triton.jit
def joined(part, RT: tl.constexpr, KW: tl.constexpr, RW: tl.constexpr):
    """[RT, RW, 8, 4]: the sum over warps that split the columns."""
    return tl.sum(tl.reshape(part, (RT, KW, RW, 8, 4)), 1)


@triton.jit
def list_rows(order, block, begin, stop, i, NUM_SHARED, PICKS: tl.constexpr):
    """Rows token * PICKS + number of picks begin + i, the last one's beyond the list."""
    i = tl.minimum(begin + i, stop - 1)
    row = i * PICKS + PICKS - 1
    if block >= NUM_SHARED:
        row = load_fresh(order + i)
    return row


@triton.jit(do_not_specialize=["M", "E", "NUM_SHARED"])
def _gate_up_mma_kernel(
    x_words, x_scales, roots, order, blocks, words, d, m, act, act_scales, M, E, NUM_SHARED, K: tl.constexpr,
    F: tl.constexpr, PICKS: tl.constexpr, RT: tl.constexpr, KW: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of up to eight picks of one expert, 128 of F values a program.

    x_words: int32 [M, K / 4], x_scales: float32 [M, K / 128, 2], scale and scaled sum; act: int8 [M * PICKS, F] and
    act_scales [M * PICKS, F / 128, 2] likewise.
    """
    KT: tl.constexpr = K // 128
    RW: tl.constexpr = 8 // RT
    WARPS: tl.constexpr = RW * KW
    STEPS: tl.constexpr = (KT + KW - 1) // KW
    shape: tl.constexpr = (RT, 1, WARPS, 8, 4)
    zero = tl.zeros((1, 1, WARPS, 8, 4), tl.int32)  # added to an index, it keeps threads in place
    r = tl.arange(0, 8)[None, None, None, :, None] + zero
    j = tl.arange(0, 4)[None, None, None, None, :] + zero
    warp = tl.arange(0, WARPS)[None, None, :, None, None] + zero
    tile = tl.arange(0, RT)[:, None, None, None, None]
    block = tl.program_id(1)
    b = warp // RW * STEPS
    rows = tl.program_id(0) * 128 + (tile * RW + warp % RW) * 16 + r
    wait(PDL)
    trigger(PDL)
    expert, begin, stop = block_span(blocks, block, M, E, NUM_SHARED, 8)
    if stop > begin:
        first = expert.to(tl.int64) * (2 * F)
        words += first * (KT * 16)
        d += first * KT
        m += first * KT
        tiles = nothing()
        for i in tl.static_range(DEPTH):
            tiles += (
                load_group(words, d, m, rows, b + i, j, KT, 2 * F),
                load_group(words, d, m, rows + F, b + i, j, KT, 2 * F),
            )
        token = list_rows(order, block, begin, stop, r, NUM_SHARED, PICKS) // PICKS
        token0 = list_rows(order, block, begin, stop, 2 * j, NUM_SHARED, PICKS) // PICKS
        token1 = list_rows(order, block, begin, stop, 2 * j + 1, NUM_SHARED, PICKS) // PICKS
        own = begin + r < stop
        own0 = begin + 2 * j < stop
        own1 = begin + 2 * j + 1 < stop
        x = load_inputs(x_words, x_scales, token, token0, token1, own, own0, own1, b, j, KT)
        nil = tl.zeros(shape, tl.float32)
        gate = (nil, nil, nil, nil)
        up = (nil, nil, nil, nil)
        for step in range(0, STEPS, DEPTH):
            ahead = nothing()
            for i in tl.static_range(DEPTH):
                # Groups that belong to the next warps are loaded at the end too, in vain: as many as DEPTH.
                at = b + step + i + 1
                next_x = load_inputs(x_words, x_scales, token, token0, token1, own, own0, own1, at, j, KT)
                here = tl.where(step + DEPTH + i < STEPS, b + step + DEPTH + i, KT)
                ahead += (
                    load_group(words, d, m, rows, here, j, KT, 2 * F),
                    load_group(words, d, m, rows + F, here, j, KT, 2 * F),
                )
                gate = add_group(gate, tiles[2 * i], x, shape)
                up = add_group(up, tiles[2 * i + 1], x, shape)
                x = next_x
            tiles = ahead
        wide = tl.arange(0, 4)[None, None, None, :]
        f = (tl.arange(0, RT)[:, None, None, None] * RW + tl.arange(0, RW)[None, :, None, None]) * 16
        f += tl.program_id(0) * 128 + tl.arange(0, 8)[None, None, :, None]
        for side in tl.static_range(2):
            i = 2 * wide + side
            row = list_rows(order, block, begin, stop, i, NUM_SHARED, PICKS)
            root = tl.load(roots + row // PICKS)
            y = gate_times_up(joined(gate[side], RT, KW, RW) * root, joined(up[side], RT, KW, RW) * root, "silu")
            z = gate_times_up(
                joined(gate[2 + side], RT, KW, RW) * root, joined(up[2 + side], RT, KW, RW) * root, "silu"
            )
            largest = tl.max(tl.max(tl.max(tl.maximum(tl.abs(y), tl.abs(z)), 2), 1), 0)[None, None, None, :]
            inverse = 127.0 / tl.maximum(largest, 1e-30)
            y = y * inverse + 12582912.0  # the rounded integer is in the low bits of the sum, in two's complement
            z = z * inverse + 12582912.0
            total = tl.sum(tl.sum(tl.sum((y - 12582912.0) + (z - 12582912.0), 2), 1), 0)[None, None, None, :]
            store = begin + i < stop
            tl.store(act + row * F + f, y.to(tl.int32, bitcast=True).to(tl.int8), mask=store & (f < F))
            tl.store(act + row * F + f + 8, z.to(tl.int32, bitcast=True).to(tl.int8), mask=store & (f + 8 < F))
            scale = largest * (1.0 / 127.0)
            place = act_scales + (row * (F // 128) + tl.program_id(0)) * 2
            tl.store(place, scale, mask=store)
            tl.store(place + 1, scale * total, mask=store)


@triton.jit(do_not_specialize=["M", "E", "NUM_SHARED"])
def _down_mma_kernel(
    act_words, act_scales, order, blocks, weights, words, d, m, parts, M, E, NUM_SHARED, H: tl.constexpr,
    F: tl.constexpr, PICKS: tl.constexpr, RT: tl.constexpr, RW: tl.constexpr, KW: tl.constexpr, DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The weighted products of up to eight picks, RT * RW * 16 rows a program: float32 [M * PICKS, H]."""
    trigger(PDL)
    KT: tl.constexpr = F // 128
    WARPS: tl.constexpr = RW * KW
    STEPS: tl.constexpr = (KT + KW - 1) // KW
    shape: tl.constexpr = (RT, 1, WARPS, 8, 4)
    zero = tl.zeros((1, 1, WARPS, 8, 4), tl.int32)
    r = tl.arange(0, 8)[None, None, None, :, None] + zero
    j = tl.arange(0, 4)[None, None, None, None, :] + zero
    warp = tl.arange(0, WARPS)[None, None, :, None, None] + zero
    tile = tl.arange(0, RT)[:, None, None, None, None]
    block = tl.program_id(1)
    b = warp // RW * STEPS
    rows = tl.program_id(0) * (RT * RW * 16) + (tile * RW + warp % RW) * 16 + r
    expert, begin, stop = block_span(blocks, block, M, E, NUM_SHARED, 8)
    if stop > begin:
        first = expert.to(tl.int64) * H
        words += first * (KT * 16)
        d += first * KT
        m += first * KT
        tiles = nothing()
        for i in tl.static_range(DEPTH):
            tiles += (load_group(words, d, m, rows, b + i, j, KT, H),)
        row = list_rows(order, block, begin, stop, r, NUM_SHARED, PICKS)
        row0 = list_rows(order, block, begin, stop, 2 * j, NUM_SHARED, PICKS)
        row1 = list_rows(order, block, begin, stop, 2 * j + 1, NUM_SHARED, PICKS)
        own = begin + r < stop
        own0 = begin + 2 * j < stop
        own1 = begin + 2 * j + 1 < stop
        wait(PDL)
        x = load_inputs(act_words, act_scales, row, row0, row1, own, own0, own1, b, j, KT)
        nil = tl.zeros(shape, tl.float32)
        acc = (nil, nil, nil, nil)
        for step in range(0, STEPS, DEPTH):
            ahead = nothing()
            for i in tl.static_range(DEPTH):
                at = b + step + i + 1
                next_x = load_inputs(act_words, act_scales, row, row0, row1, own, own0, own1, at, j, KT)
                if STEPS > DEPTH:
                    here = tl.where(step + DEPTH + i < STEPS, b + step + DEPTH + i, KT)
                    ahead += (load_group(words, d, m, rows, here, j, KT, H),)
                acc = add_group(acc, tiles[i], x, shape)
                x = next_x
            if STEPS > DEPTH:
                tiles = ahead
        n = (tl.arange(0, RT)[:, None, None, None] * RW + tl.arange(0, RW)[None, :, None, None]) * 16
        n += tl.program_id(0) * (RT * RW * 16) + tl.arange(0, 8)[None, None, :, None]
        for side in tl.static_range(2):
            i = 2 * tl.arange(0, 4)[None, None, None, :] + side
            at = list_rows(order, block, begin, stop, i, NUM_SHARED, PICKS)
            weight = tl.load(weights + at, cache_modifier=".cg")
            y = joined(acc[side], RT, KW, RW) * weight
            z = joined(acc[2 + side], RT, KW, RW) * weight
            store = begin + i < stop
            tl.store(parts + at * H + n, y, mask=store & (n < H))
            tl.store(parts + at * H + n + 8, z, mask=store & (n + 8 < H))
