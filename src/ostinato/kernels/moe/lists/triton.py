"""Gate, up and down products of lists of picks: four-bit weights in groups of 128, ``mma.m16n8k32`` over int8.

16 rows of W are one side of a product and up to eight picks of one expert the other. The order of columns inside a
product is free where both sides have it: thread (r, j) of a warp reads the whole j-th block of 32 columns of a group of
128, for rows r and r + 8, 16 bytes each, and product s of four takes word s of every thread's block: its low nibbles
are quad s and its high nibbles quad s + 4 of the columns. So a product's 32 columns come from four blocks of 32, but
from one group: weights share a scale, four products one integer sum, and 128 columns a multiplication by scales. For
that int8 inputs have one scale for 128 columns as well, and beside it the sum of the group, for the minimum.

Tensors are [RT, 1, WARPS, 8, 4], as in block_linear's batch kernel: tiles of 16 rows of W, and the 32 threads of each
warp. Loads have no masks, and stand at constant distances from a few pointers: a mask costs more than a load. Threads
of picks beyond a list's end load what the last pick does, and store nothing.

What follows from a kernel's own wait is said in experts/triton.py; it holds here too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.batch.triton import mma_onto
from ostinato.kernels.moe.experts.triton import block_span
from ostinato.kernels.moe.route.triton import load_fresh
from ostinato.kernels.triton import INTERPRETED, gate_times_up, nothing, trigger, wait


@triton.jit
def load_four(pointer):
    """Four adjacent int32, all of which are there: one instruction, where a mask costs six; see ``load_words``."""
    if INTERPRETED:
        return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [pointer],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_streamed(pointer):
    """``load_four`` of what is read once: it takes no room in the L1 cache, and the rest of its line comes along."""
    if INTERPRETED:
        return load_four(pointer)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [pointer],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_two(pointer):
    """Two adjacent float32; pointers of 8-byte alignment."""
    if INTERPRETED:
        return tl.load(pointer), tl.load(pointer + 1)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];", "=f,=f,l", [pointer],
            dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_bits(pointer):
    """The bits of one float16 as int32."""
    if INTERPRETED:
        return tl.load(pointer).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    else:
        return tl.inline_asm_elementwise(
            "ld.global.u16 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def load_scales(pointer, EVEN: tl.constexpr):
    """Two adjacent float16, the first in the lower bits of an int32, not yet converted: that would wait for them.

    EVEN: both are there, and aligned as a word; else the second is read alone, or missing.
    """
    if EVEN and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
        )
    elif EVEN:
        return load_bits(pointer) | (load_bits(pointer + 1) << 16)
    else:
        return load_bits(pointer)


@triton.jit
def scale_of(bits, UPPER: tl.constexpr):
    """One of the two of ``load_scales`` as float32."""
    if INTERPRETED:
        return ((bits >> 16) if UPPER else bits).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, upp; mov.b32 {low, upp}, $1; cvt.f32.f16 $0, "
            + ("upp" if UPPER else "low")
            + "; }",
            "=f,r", [bits], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def load_group(words, b, KT: tl.constexpr):
    """Eight words of group b, of a row and of the row 8 further."""
    w0, w1, w2, w3 = load_streamed(words + b * 16)
    w4, w5, w6, w7 = load_streamed(words + (8 * KT * 16 + b * 16))
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def load_pair_scales(d, m, b, KT: tl.constexpr):
    """Scales and minimums of group b, and of the next if KT is even: of a row and of the row 8 further."""
    return (
        load_scales(d + b, KT % 2 == 0),
        load_scales(m + b, KT % 2 == 0),
        load_scales(d + (8 * KT + b), KT % 2 == 0),
        load_scales(m + (8 * KT + b), KT % 2 == 0),
    )


@triton.jit
def load_inputs(words, scales0, scales1, b):
    """Group b of the int8 inputs: eight words of a row, then scale and sum of two."""
    w0, w1, w2, w3 = load_four(words + b * 32)
    w4, w5, w6, w7 = load_four(words + (b * 32 + 4))
    s0, t0 = load_two(scales0 + b * 2)
    s1, t1 = load_two(scales1 + b * 2)
    return w0, w1, w2, w3, w4, w5, w6, w7, s0, t0, s1, t1


@triton.jit
def add_group(acc, tile, scales, x, UPPER: tl.constexpr, SHAPE: tl.constexpr):
    """The four accumulators plus the products of a group: rows r, r, r + 8, r + 8 by picks 2j, 2j + 1, 2j, 2j + 1."""
    # The bits of 1.5 * 2**23: an integer adds to them as it does to that float, so that nothing is to be converted.
    start = tl.full(SHAPE, 0x4B400000, tl.int32)
    c = (start, start, start, start)
    for s in tl.static_range(4):
        a0, a2 = tile[s] & 0x0F0F0F0F, (tile[s] >> 4) & 0x0F0F0F0F
        a1, a3 = tile[4 + s] & 0x0F0F0F0F, (tile[4 + s] >> 4) & 0x0F0F0F0F
        c = mma_onto(c, a0, a1, a2, a3, x[s], x[4 + s], SHAPE)
    d0, m0 = scale_of(scales[0], UPPER), scale_of(scales[1], UPPER)
    d1, m1 = scale_of(scales[2], UPPER), scale_of(scales[3], UPPER)
    return (
        (c[0].to(tl.float32, bitcast=True) - 12582912.0) * (d0 * x[8]) + (m0 * x[9] + acc[0]),
        (c[1].to(tl.float32, bitcast=True) - 12582912.0) * (d0 * x[10]) + (m0 * x[11] + acc[1]),
        (c[2].to(tl.float32, bitcast=True) - 12582912.0) * (d1 * x[8]) + (m1 * x[9] + acc[2]),
        (c[3].to(tl.float32, bitcast=True) - 12582912.0) * (d1 * x[10]) + (m1 * x[11] + acc[3]),
    )


@triton.jit
def load_gate_up(words, d, m, b, F: tl.constexpr, KT: tl.constexpr, PAIR: tl.constexpr):
    """Groups b … b + PAIR - 1 of a row and of its twin F rows further: words of each, then scales."""
    found = nothing()
    found += (load_pair_scales(d, m, b, KT), load_pair_scales(d + F * KT, m + F * KT, b, KT))
    for i in tl.static_range(PAIR):
        found += (load_group(words, b + i, KT), load_group(words + F * KT * 16, b + i, KT))
    return found


@triton.jit
def flat(values):
    """[RT, WARPS, 8, 4] of [RT, 1, WARPS, 8, 4]."""
    return tl.sum(values, 1)


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
    F: tl.constexpr, PICKS: tl.constexpr, RT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of up to eight picks of one expert, 128 of F values a program.

    x_words: int32 [M, K / 4], x_scales: float32 [M, K / 128, 2], scale and scaled sum; act: int8 [M * PICKS, F] and
    act_scales [M * PICKS, F / 128, 2] likewise.
    """
    KT: tl.constexpr = K // 128
    PAIR: tl.constexpr = 2 - KT % 2  # groups whose scales are read together
    WARPS: tl.constexpr = 8 // RT
    shape: tl.constexpr = (RT, 1, WARPS, 8, 4)
    zero = tl.zeros((1, 1, WARPS, 8, 4), tl.int32)  # added to an index, it keeps threads in place
    r = tl.arange(0, 8)[None, None, None, :, None] + zero
    j = tl.arange(0, 4)[None, None, None, None, :] + zero
    warp = tl.arange(0, WARPS)[None, None, :, None, None] + zero
    tile = tl.arange(0, RT)[:, None, None, None, None]
    block = tl.program_id(1)
    rows = tl.program_id(0) * 128 + (tile * WARPS + warp) * 16 + r
    wait(PDL)
    trigger(PDL)
    expert, begin, stop = block_span(blocks, block, M, E, NUM_SHARED, 8)
    if stop > begin:
        first = expert.to(tl.int64) * (2 * F)
        tops = words + first * (KT * 16) + (rows * (KT * 16) + j * 4)
        at_d = d + first * KT + rows * KT
        at_m = m + first * KT + rows * KT
        tiles = load_gate_up(tops, at_d, at_m, 0, F, KT, PAIR)
        inputs = x_words + list_rows(order, block, begin, stop, r, NUM_SHARED, PICKS) // PICKS * (KT * 32) + j * 8
        scales0 = x_scales + list_rows(order, block, begin, stop, 2 * j, NUM_SHARED, PICKS) // PICKS * (KT * 2)
        scales1 = x_scales + list_rows(order, block, begin, stop, 2 * j + 1, NUM_SHARED, PICKS) // PICKS * (KT * 2)
        x = load_inputs(inputs, scales0, scales1, 0)
        nil = tl.zeros(shape, tl.float32)
        gate = (nil, nil, nil, nil)
        up = (nil, nil, nil, nil)
        # A loop of few groups, not unrolled as a whole: the compiler would load scales as late as it can.
        for b in range(0, KT - PAIR, PAIR):
            ahead = load_gate_up(tops, at_d, at_m, b + PAIR, F, KT, PAIR)
            for i in tl.static_range(PAIR):
                next_x = load_inputs(inputs, scales0, scales1, b + i + 1)
                gate = add_group(gate, tiles[2 + 2 * i], tiles[0], x, i == 1, shape)
                up = add_group(up, tiles[3 + 2 * i], tiles[1], x, i == 1, shape)
                x = next_x
            tiles = ahead
        for i in tl.static_range(PAIR):
            if i == 1:
                x = load_inputs(inputs, scales0, scales1, KT - 1)
            gate = add_group(gate, tiles[2 + 2 * i], tiles[0], x, i == 1, shape)
            up = add_group(up, tiles[3 + 2 * i], tiles[1], x, i == 1, shape)
        wide = tl.arange(0, 4)[None, None, None, :]
        f = (tl.arange(0, RT)[:, None, None, None] * WARPS + tl.arange(0, WARPS)[None, :, None, None]) * 16
        f += tl.program_id(0) * 128 + tl.arange(0, 8)[None, None, :, None]
        for side in tl.static_range(2):
            i = 2 * wide + side
            row = list_rows(order, block, begin, stop, i, NUM_SHARED, PICKS)
            root = tl.load(roots + row // PICKS)
            y = gate_times_up(flat(gate[side]) * root, flat(up[side]) * root, "silu")
            z = gate_times_up(flat(gate[2 + side]) * root, flat(up[2 + side]) * root, "silu")
            largest = tl.max(tl.max(tl.max(tl.maximum(tl.abs(y), tl.abs(z)), 2), 1), 0)[None, None, None, :]
            inverse = 127.0 / tl.maximum(largest, 1e-30)
            y = y * inverse + 12582912.0  # the rounded integer is in the low bits of the sum, in two's complement
            z = z * inverse + 12582912.0
            total = tl.sum(tl.sum(tl.sum((y - 12582912.0) + (z - 12582912.0), 2), 1), 0)[None, None, None, :]
            store = begin + i < stop
            tl.store(act + row * F + f, y.to(tl.int32, bitcast=True).to(tl.int8), mask=store)
            tl.store(act + row * F + f + 8, z.to(tl.int32, bitcast=True).to(tl.int8), mask=store)
            scale = largest * (1.0 / 127.0)
            place = act_scales + (row * (F // 128) + tl.program_id(0)) * 2
            tl.store(place, scale, mask=store)
            tl.store(place + 1, scale * total, mask=store)


@triton.jit(do_not_specialize=["M", "E", "NUM_SHARED"])
def _down_mma_kernel(
    act_words, act_scales, order, blocks, weights, words, d, m, parts, M, E, NUM_SHARED, H: tl.constexpr,
    F: tl.constexpr, PICKS: tl.constexpr, RT: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The weighted products of up to eight picks, RT * WARPS * 16 rows a program: float32 [M * PICKS, H]."""
    trigger(PDL)
    KT: tl.constexpr = F // 128
    PAIR: tl.constexpr = 2 - KT % 2
    shape: tl.constexpr = (RT, 1, WARPS, 8, 4)
    zero = tl.zeros((1, 1, WARPS, 8, 4), tl.int32)
    r = tl.arange(0, 8)[None, None, None, :, None] + zero
    j = tl.arange(0, 4)[None, None, None, None, :] + zero
    warp = tl.arange(0, WARPS)[None, None, :, None, None] + zero
    tile = tl.arange(0, RT)[:, None, None, None, None]
    block = tl.program_id(1)
    start = tl.program_id(0) * (RT * WARPS * 16)
    rows = tl.minimum(start + (tile * WARPS + warp) * 16, H - 16) + r  # H is a multiple of 128
    expert, begin, stop = block_span(blocks, block, M, E, NUM_SHARED, 8)
    if stop > begin:
        first = expert.to(tl.int64) * H
        tops = words + first * (KT * 16) + (rows * (KT * 16) + j * 4)
        at_d = d + first * KT + rows * KT
        at_m = m + first * KT + rows * KT
        tiles = nothing()
        scales = nothing()
        for b in tl.static_range(DEPTH):
            tiles += (load_group(tops, b, KT),)
            if b % PAIR == 0:
                scales += (load_pair_scales(at_d, at_m, b, KT),)
        inputs = act_words + list_rows(order, block, begin, stop, r, NUM_SHARED, PICKS) * (KT * 32) + j * 8
        scales0 = act_scales + list_rows(order, block, begin, stop, 2 * j, NUM_SHARED, PICKS) * (KT * 2)
        scales1 = act_scales + list_rows(order, block, begin, stop, 2 * j + 1, NUM_SHARED, PICKS) * (KT * 2)
        wait(PDL)
        x = load_inputs(inputs, scales0, scales1, 0)
        nil = tl.zeros(shape, tl.float32)
        acc = (nil, nil, nil, nil)
        for b in tl.static_range(KT):
            next_x = x
            if b + 1 < KT:
                next_x = load_inputs(inputs, scales0, scales1, b + 1)
            if b + DEPTH < KT:
                tiles += (load_group(tops, b + DEPTH, KT),)
                if (b + DEPTH) % PAIR == 0:
                    scales += (load_pair_scales(at_d, at_m, b + DEPTH, KT),)
            acc = add_group(acc, tiles[b], scales[b // PAIR], x, b % PAIR == 1, shape)
            x = next_x
        n = (tl.arange(0, RT)[:, None, None, None] * WARPS + tl.arange(0, WARPS)[None, :, None, None]) * 16
        n += start + tl.arange(0, 8)[None, None, :, None]
        for side in tl.static_range(2):
            i = 2 * tl.arange(0, 4)[None, None, None, :] + side
            at = list_rows(order, block, begin, stop, i, NUM_SHARED, PICKS)
            weight = tl.load(weights + at, cache_modifier=".cg")
            y = flat(acc[side]) * weight
            z = flat(acc[2 + side]) * weight
            store = begin + i < stop
            tl.store(parts + at * H + n, y, mask=store & (n < H))
            tl.store(parts + at * H + n + 8, z, mask=store & (n + 8 < H))
