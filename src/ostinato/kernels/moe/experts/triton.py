"""Gate, up and down products of the chosen experts.

Tensors are [1, R, W, NG], as in block_linear's streamed kernel: a thread holds whole groups of 32 columns, 16 bytes of
a weight a load. Inputs are int8 with a scale for every four columns: ``words`` and ``scales``, [.., K/4] each.

For one token the kernels choose the experts themselves, each warp for itself: that costs less than a kernel between the
router and them. ``_gate_up_kernel`` and ``_gate_up_list_kernel`` let the next kernel start only after their own wait:
so what was written before them is there when the kernel for down starts, and that one reads the choice and the weights
of its experts while gate and up are still multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import half, load_tile, quad
from ostinato.kernels.moe.route.triton import choose_all, choose_one
from ostinato.kernels.triton import INTERPRETED, dp4a, gate_times_up, load_floats, load_words, trigger, wait


@triton.jit
def load_expert(
    words, high, d, m, sub_d, sub_m, first, rows, g, K: tl.constexpr, BITS: tl.constexpr, SUPER: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_SUB: tl.constexpr,
):  # fmt: skip
    """``load_tile`` of the rows ``first + rows``, where first, int64, is the expert's."""
    KG: tl.constexpr = K // 32
    return load_tile(
        words + first * (KG * (8 if BITS == 8 else 4)), high + first * (KG * (2 if BITS == 6 else 1)),
        d + first * (K // SUPER), m + first * (K // SUPER), sub_d + first * KG, sub_m + first * KG,
        rows, g, KG, BITS, SUPER, HAS_MIN, HAS_SUB,
    )  # fmt: skip


@triton.jit
def load_quads(words, scales, g, KG: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr):
    """A row of int8 inputs: eight words, their scales, and the sums of the lower and the upper half of each group.

    words, scales: the row's. g: [1, 1, W, NG], the groups. For groups of 32 and more the whole sum is in the first.
    """
    inside = g < KG
    w0, w1, w2, w3 = load_words(words + g * 8, inside)
    w4, w5, w6, w7 = load_words(words + g * 8 + 4, inside)
    s0, s1, s2, s3 = load_floats(scales + g * 8, inside)
    s4, s5, s6, s7 = load_floats(scales + g * 8 + 4, inside)
    lower = s0
    upper = s4
    if SUMS:
        lower = byte_sum(w0) * s0 + byte_sum(w1) * s1 + byte_sum(w2) * s2 + byte_sum(w3) * s3
        upper = byte_sum(w4) * s4 + byte_sum(w5) * s5 + byte_sum(w6) * s6 + byte_sum(w7) * s7
        if GROUP >= 32:
            lower += upper
    return w0, w1, w2, w3, w4, w5, w6, w7, s0, s1, s2, s3, s4, s5, s6, s7, lower, upper


@triton.jit
def dot_float(a, b):
    """The dot product of the four signed bytes of each word in float32.

    The sum starts at the bits of 1.5 * 2**23, to which an integer adds as it does to a float: cheaper than converting.
    """
    start = tl.full(a.shape, 0x4B400000, tl.int32)
    return dp4a(a, b, start).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def byte_sum(w):
    return dot_float(w, tl.full(w.shape, 0x01010101, tl.int32))


@triton.jit
def quad_products(tile, x, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
                  HAS_SUB: tl.constexpr):  # fmt: skip
    """The products of a tile with a row of ``load_quads``, group by group: float32 [1, R, W, NG]."""
    shape: tl.constexpr = tile[0].shape
    lower = tl.zeros(shape, tl.float32)
    upper = lower
    for t in tl.static_range(4):
        lower += dot_float(quad(tile, t, BITS), tl.broadcast_to(x[t], shape)) * x[8 + t]
        upper += dot_float(quad(tile, t + 4, BITS), tl.broadcast_to(x[t + 4], shape)) * x[12 + t]
    scale, minimum = half(tile[10], tile[11], tile[12], tile[13], False, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
    if GROUP >= 32:
        total = (lower + upper) * scale
        if MIN_SIGN != 0 or OFFSET != 0:
            total += minimum * x[16]
    else:
        scale_up, minimum_up = half(tile[10], tile[11], tile[12], tile[13], True, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
        total = lower * scale + upper * scale_up
        if MIN_SIGN != 0 or OFFSET != 0:
            total += minimum * x[16] + minimum_up * x[17]
    return total


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_both(a, b, AXIS: tl.constexpr):
    """Both sums in one exchange between threads."""
    if INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_both)


@triton.jit
def store_quads(y, words, scales, R: tl.constexpr):
    """R values as R / 4 words of int8 and their scales."""
    four = tl.reshape(y, (R // 4, 4))
    largest = tl.max(tl.abs(four), 1)
    scaled = four * (127.0 / tl.maximum(largest, 1e-30))[:, None]
    lane = tl.arange(0, 4)[None, :]
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    bytes_ = ((scaled + 12582912.0).to(tl.int32, bitcast=True) & 255) << (8 * lane)
    at = tl.arange(0, R // 4)
    tl.store(words + at, tl.sum(bytes_, 1))
    tl.store(scales + at, largest * (1.0 / 127.0))


@triton.jit
def _gate_up_kernel(
    x_words, x_scales, logits, words, high, d, m, sub_d, sub_m, act_words, act_scales, E, K: tl.constexpr,
    F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    MIN_SIGN: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, R: tl.constexpr, NG: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of one token: R of F values of one pick a program, as int8 [TOP_K + shared, F]."""
    KG: tl.constexpr = K // 32
    MIN: tl.constexpr = MIN_SIGN != 0
    SUB: tl.constexpr = GROUP != SUPER
    pick = tl.program_id(1)
    g = tl.arange(0, NG)[None, None, None, :]
    rows = tl.program_id(0) * R + tl.arange(0, R)[None, :, None, None]
    expert = E
    if pick < TOP_K:  # the shared expert is known without the router, and its weights come early
        wait(PDL)
        expert = choose_one(logits, pick, E, EP, WARPS)
    first = expert.to(tl.int64) * (2 * F)
    tile = load_expert(words, high, d, m, sub_d, sub_m, first, rows, g, K, BITS, SUPER, MIN, SUB)
    twin = load_expert(words, high, d, m, sub_d, sub_m, first, rows + F, g, K, BITS, SUPER, MIN, SUB)
    wait(PDL)
    trigger(PDL)
    x = load_quads(x_words, x_scales, g, KG, GROUP, MIN or OFFSET != 0)
    gate, up = sum_both(
        quad_products(tile, x, BITS, GROUP, OFFSET, MIN_SIGN, SUB),
        quad_products(twin, x, BITS, GROUP, OFFSET, MIN_SIGN, SUB),
        3,
    )
    at = pick * (F // 4) + tl.program_id(0) * (R // 4)
    store_quads(gate_times_up(gate, up, "silu"), act_words + at, act_scales + at, R)


@triton.jit
def _down_kernel(
    act_words, act_scales, logits, words, high, d, m, sub_d, sub_m, h, out, E, H, F: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    EP: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, SHARED: tl.constexpr, GATED: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, NG: tl.constexpr, WARPS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = h + the weighted sum over all picks of one token, R * W rows a program."""
    trigger(PDL)
    FG: tl.constexpr = F // 32
    MIN: tl.constexpr = MIN_SIGN != 0
    SUB: tl.constexpr = GROUP != SUPER
    g = tl.arange(0, NG)[None, None, None, :] + tl.arange(0, W)[None, None, :, None] * 0
    start = tl.program_id(0) * (R * W)
    rows = start + tl.arange(0, R)[None, :, None, None] * W + tl.arange(0, W)[None, None, :, None]
    rows = tl.minimum(rows, H - 1)
    if not EARLY:
        wait(PDL)
    experts, weights = choose_all(logits, E, EP, TOP_K, NORMALIZE, SHARED, GATED, WARPS)
    tiles = tl.tuple(())
    for p in tl.static_range(TOP_K + SHARED):
        first = experts[p].to(tl.int64) * H
        tiles += (load_expert(words, high, d, m, sub_d, sub_m, first, rows, g, F, BITS, SUPER, MIN, SUB),)
    if EARLY:
        wait(PDL)
    n = start + tl.arange(0, R)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    added = tl.load(h + n, mask=n < H, other=0.0)
    acc = tl.zeros((1, R, W, NG), tl.float32)
    for p in tl.static_range(TOP_K + SHARED):
        at = p * (F // 4)
        x = load_quads(act_words + at, act_scales + at, g, FG, GROUP, MIN or OFFSET != 0)
        acc += quad_products(tiles[p], x, BITS, GROUP, OFFSET, MIN_SIGN, SUB) * weights[p]
    tl.store(out + n, added + tl.sum(acc, 3), mask=n < H)


@triton.jit
def block_span(blocks, block, M, E, NUM_SHARED, TOKENS: tl.constexpr):
    """Expert, first and stop of a block; the first NUM_SHARED blocks are the shared expert's, over all tokens."""
    expert = E
    first = block * TOKENS
    stop = tl.minimum(first + TOKENS, M)
    if block >= NUM_SHARED:
        entry = blocks + (block - NUM_SHARED) * 4
        first = tl.load(entry + 1, cache_modifier=".cg")
        stop = tl.load(entry + 2, cache_modifier=".cg")
        if stop > first:
            expert = tl.load(entry, cache_modifier=".cg")
    return expert, first, stop


@triton.jit
def block_row(order, block, i, NUM_SHARED, PICKS: tl.constexpr):
    """The row token * PICKS + number of the i-th pick."""
    row = i * PICKS + PICKS - 1
    if block >= NUM_SHARED:
        row = tl.load(order + i, cache_modifier=".cg")
    return row


@triton.jit
def _gate_up_list_kernel(
    x_words, x_scales, order, blocks, words, high, d, m, sub_d, sub_m, act_words, act_scales, M, E, NUM_SHARED,
    K: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr,
    OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, PICKS: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr,
    NG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a block of picks of one expert, R of F values a program, as int8 [M * PICKS, F]."""
    KG: tl.constexpr = K // 32
    MIN: tl.constexpr = MIN_SIGN != 0
    SUB: tl.constexpr = GROUP != SUPER
    block = tl.program_id(1)
    g = tl.arange(0, NG)[None, None, None, :]
    rows = tl.program_id(0) * R + tl.arange(0, R)[None, :, None, None]
    wait(PDL)
    trigger(PDL)
    expert, begin, stop = block_span(blocks, block, M, E, NUM_SHARED, TOKENS)
    if stop > begin:
        first = expert.to(tl.int64) * (2 * F)
        tile = load_expert(words, high, d, m, sub_d, sub_m, first, rows, g, K, BITS, SUPER, MIN, SUB)
        twin = load_expert(words, high, d, m, sub_d, sub_m, first, rows + F, g, K, BITS, SUPER, MIN, SUB)
        for i in range(begin, stop):
            row = block_row(order, block, i, NUM_SHARED, PICKS)
            token = row // PICKS * (K // 4)
            x = load_quads(x_words + token, x_scales + token, g, KG, GROUP, MIN or OFFSET != 0)
            gate, up = sum_both(
                quad_products(tile, x, BITS, GROUP, OFFSET, MIN_SIGN, SUB),
                quad_products(twin, x, BITS, GROUP, OFFSET, MIN_SIGN, SUB),
                3,
            )
            at = row * (F // 4) + tl.program_id(0) * (R // 4)
            store_quads(gate_times_up(gate, up, "silu"), act_words + at, act_scales + at, R)


@triton.jit
def _down_list_kernel(
    act_words, act_scales, order, blocks, weights, words, high, d, m, sub_d, sub_m, parts, M, E, NUM_SHARED, H,
    F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    MIN_SIGN: tl.constexpr, PICKS: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    NG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weighted products of a block of picks, R * W rows a program: float32 [M * PICKS, H]."""
    trigger(PDL)
    FG: tl.constexpr = F // 32
    MIN: tl.constexpr = MIN_SIGN != 0
    SUB: tl.constexpr = GROUP != SUPER
    block = tl.program_id(1)
    g = tl.arange(0, NG)[None, None, None, :] + tl.arange(0, W)[None, None, :, None] * 0
    start = tl.program_id(0) * (R * W)
    rows = start + tl.arange(0, R)[None, :, None, None] * W + tl.arange(0, W)[None, None, :, None]
    rows = tl.minimum(rows, H - 1)
    n = start + tl.arange(0, R)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    expert, begin, stop = block_span(blocks, block, M, E, NUM_SHARED, TOKENS)
    if stop > begin:
        first = expert.to(tl.int64) * H
        tile = load_expert(words, high, d, m, sub_d, sub_m, first, rows, g, F, BITS, SUPER, MIN, SUB)
        wait(PDL)
        for i in range(begin, stop):
            row = block_row(order, block, i, NUM_SHARED, PICKS)
            at = row * (F // 4)
            x = load_quads(act_words + at, act_scales + at, g, FG, GROUP, MIN or OFFSET != 0)
            y = tl.sum(quad_products(tile, x, BITS, GROUP, OFFSET, MIN_SIGN, SUB), 3)
            tl.store(parts + row * H + n, y * tl.load(weights + row, cache_modifier=".cg"), mask=n < H)


@triton.jit
def _combine_kernel(
    h, parts, out, H, PICKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = h + the sum of each token's parts, in their order."""
    trigger(PDL)
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    total = tl.load(h + token * H + n, mask=n < H, other=0.0)
    for p in tl.static_range(PICKS):
        total += tl.load(parts + (token * PICKS + p) * H + n, mask=n < H, other=0.0)
    tl.store(out + token * H + n, total, mask=n < H)
