"""Gate, up and down products of the chosen experts.

Tensors are [1, R, W, NG], as in block_linear's streamed kernel: a thread holds whole groups of 32 columns, 16 bytes of
a weight a load. Inputs are int8: words of four columns, and a float32 scale for SHARE of them. A scale for each word
would be more exact, but an instruction for every four weights counts: SHARE is 4 for x, R / 4 for what down reads.

For one token the kernels choose the experts themselves, each warp for itself: that costs less than a kernel between the
router and them. ``_gate_up_kernel`` and ``_gate_up_list_kernel`` let the next kernel start only after their own wait:
so what was written before them is there when the kernel for down starts, and that one reads the choice and the weights
of its experts while gate and up are still multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import load_tile
from ostinato.kernels.block_linear.rounded.triton import (
    hand_on,
    load_row,
    load_unsummed,
    mean_root,
    row_products,
    with_row_sums,
)
from ostinato.kernels.lanes.triton import max_lanes, share, sum_lanes, sum_rows
from ostinato.kernels.moe.choice.triton import nth_largest
from ostinato.kernels.moe.route.triton import choose_all, load_fresh, load_squares, root_of, sum_both
from ostinato.kernels.triton import fence, gate_times_up, load_float, nothing, store_own, trigger, wait


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
def int8_of(y, largest):
    """y as integers of the scale ``largest`` / 127, in the lowest byte of an int32."""
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    return (y * (127.0 / tl.maximum(largest, 1e-30)) + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def store_rows(y, words, scales):
    """[G, R] values as R / 4 words of int8 and one scale a group. words, scales: pointers [G] to a group's."""
    G: tl.constexpr = y.shape[0]
    R: tl.constexpr = y.shape[1]
    four = tl.reshape(y, (G, R // 4, 4))
    largest = tl.max(tl.max(tl.abs(four), 2), 1)
    inverse = (127.0 / tl.maximum(largest, 1e-30))[:, None, None]
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    rounded = (four * inverse + 12582912.0).to(tl.int32, bitcast=True)
    bytes_ = (rounded & 255) << (8 * tl.arange(0, 4)[None, None, :])
    tl.store(words[:, None] + tl.arange(0, R // 4)[None, :], tl.sum(bytes_, 2))
    tl.store(scales, largest * (1.0 / 127.0))


@triton.jit
def _gate_up_kernel(
    x_words, x_scales, roots, eps, logits, words, high, d, m, sub_d, sub_m, act, act_scales, E, K: tl.constexpr,
    F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    MIN_SIGN: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr,
    TOGETHER: tl.constexpr, NG: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of one token, as int8 [TOP_K + shared, F]: R * SIDE of F values of TOGETHER picks a program.

    SHARED: values of the shared expert a program, half as many as rows side by side or more; 0 without one. Its weights
    are loaded before the choice of the others is known. Programs have a multiprocessor each, if the GPU has so many:
    with one program a pick and some rows they went where there was room, up to eight to one.

    PARTS: 0 where ``roots`` is 1 / the row's root mean square; else the parts there of its sum of squares.

    A warp's lanes belong to one row of one pick or more; the warps meet once, for the largest values of all rows that
    share a scale and for the sums of the shared expert, whose gate and up lie in different warps.
    """
    KG: tl.constexpr = K // 32
    MIN: tl.constexpr = MIN_SIGN != 0
    SUB: tl.constexpr = GROUP != SUPER
    STEPS: tl.constexpr = (KG + NG - 1) // NG
    ROWS: tl.constexpr = R * SIDE
    W: tl.constexpr = SIDE * TOGETHER
    BLOCKS: tl.constexpr = F // ROWS
    OWN: tl.constexpr = 2 * SHARED // W  # rows of the shared expert in each thread
    w = tl.arange(0, W)[None, None, :, None]
    g = tl.arange(0, NG)[None, None, None, :] + w * 0
    w += g * 0
    block = tl.program_id(0) % BLOCKS
    group = tl.program_id(0) // BLOCKS
    of_shared = nothing()
    if SHARED > 0:
        first = (tl.program_id(0) * 0 + E).to(tl.int64) * (2 * F)
        for step in tl.static_range(STEPS):
            for i in tl.static_range(OWN):
                s = i * W + w
                row = tl.program_id(0) * SHARED + s % SHARED
                row = tl.where(row < F, row + s // SHARED * F, -1)  # gate before up; nothing is loaded for rows below 0
                of_shared += (
                    load_expert(words, high, d, m, sub_d, sub_m, first, row, step * NG + g, K, BITS, SUPER, MIN, SUB),
                )
    wait(PDL)
    trigger(PDL)
    xs = nothing()  # before the choice: behind the weights they would be the last to come
    for step in tl.static_range(STEPS):
        xs += (load_unsummed(x_words, x_scales, step * NG + g, KG, 4),)
    side = w % SIDE
    pick = w // SIDE
    first = nth_largest(logits, group * TOGETHER + pick, E, EP, TOP_K).to(tl.int64) * (2 * F)
    tiles = nothing()
    for step in tl.static_range(STEPS):
        for i in tl.static_range(2 * R):  # gate and up by turns
            row = block * ROWS + side * R + i // 2 + i % 2 * F
            at = step * NG + g
            tiles += (load_expert(words, high, d, m, sub_d, sub_m, first, row, at, K, BITS, SUPER, MIN, SUB),)
    fence()
    root = mean_root(roots, g, eps, K, PARTS, NG) if PARTS > 0 else tl.load(roots)
    sums = nothing()
    both = nothing()
    for step in tl.static_range(STEPS):
        x = with_row_sums(xs[step], 4, GROUP, MIN or OFFSET != 0)
        more = nothing()
        for i in tl.static_range(OWN):
            y = row_products(of_shared[step * OWN + i], x, 4, BITS, GROUP, OFFSET, MIN_SIGN, SUB)
            more += (y if step == 0 else both[i] + y,)
        both = more
        more = nothing()
        for i in tl.static_range(2 * R):
            tile = tiles[step * 2 * R + i // R + i % R * 2]  # all of gate, then all of up
            y = row_products(tile, x, 4, BITS, GROUP, OFFSET, MIN_SIGN, SUB)
            more += (y if step == 0 else sums[i] + y,)
        sums = more
    gate, up = sum_rows(sums, R, 2, NG, 1)
    value = gate_times_up(gate * root, up * root, "silu")
    LANES: tl.constexpr = NG // R  # that have the same value
    SPAN: tl.constexpr = SIDE * NG  # that have values of one pick
    largest = max_lanes(tl.abs(value), min(SPAN, 32), LANES)
    WARPS: tl.constexpr = max(1, W * NG // 32)
    MEET: tl.constexpr = max(1, SPAN // 32)
    thread = w * NG + g
    if SHARED > 0 or WARPS > 1:
        warp = thread // 32
        written = nothing() + (largest, warp, thread % 32 == 0)  # noqa: RUF005
        places = nothing()
        for i in tl.static_range(MEET):
            places += (warp // MEET * MEET + i,)
        for i in tl.static_range(OWN):
            written += (sum_lanes(both[i], NG, 1), WARPS + i * W + w, g == 0)
        s = thread % max(SHARED, 1)
        places += (WARPS + s, WARPS + SHARED + s)
        found = share(written, places, 1 + OWN, MEET + 2, WARPS + max(2 * SHARED, 1))
        largest = found[0]
        for i in tl.static_range(1, MEET):
            largest = tl.maximum(largest, found[i])
        if SHARED > 0:
            of_one = gate_times_up(found[MEET] * root, found[MEET + 1] * root, "silu")
            most = max_lanes(tl.abs(of_one), SHARED, 1)
            column = tl.program_id(0) * SHARED + s
            inside = (thread < SHARED) & (column < F)
            store_own(act + TOP_K * F + column, int8_of(of_one, most), inside)
            last = TOP_K * BLOCKS + tl.program_id(0)
            store_own(act_scales + last + thread * 0, most * (1.0 / 127.0), inside & (thread == 0))
    at = (group * TOGETHER + pick) * BLOCKS + block
    store_own(act + at * ROWS + side * R + g // LANES, int8_of(value, largest), g % LANES == 0)
    store_own(act_scales + at, largest * (1.0 / 127.0), thread % SPAN == 0)


@triton.jit
def one_of(values, which, FIRST: tl.constexpr, COUNT: tl.constexpr, LAST: tl.constexpr):
    """values[FIRST + which] of a tuple of numbers, for which < COUNT a tensor; the last one's beyond LAST."""
    found = values[FIRST] + which * 0
    for i in tl.static_range(1, COUNT):
        if FIRST + i <= LAST:
            found = tl.where(which == i, values[FIRST + i], found)
    return found


@triton.jit
def _down_kernel(
    act_words, act_scales, logits, words, high, d, m, sub_d, sub_m, h, out, next_norm, next_x, next_scale,
    squares, roots, eps, E, H, K: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr, SHARED: tl.constexpr, GATED: tl.constexpr, SHARE: tl.constexpr,
    SHARE_SHARED: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr, TOGETHER: tl.constexpr, NG: tl.constexpr,
    EARLY: tl.constexpr, HANDED: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = h + the weighted sum over all picks of one token, R * SIDE rows a program.

    A row has NG lanes for each of TOGETHER picks side by side, all of them in one warp, so that the sum over picks
    needs no other. The shared expert, a pick too many, shares its rows out among these picks.
    HANDED: columns of which out * next_norm is stored as int8 with one scale, beside the sum of out² over them, so that
    the next product needs no kernel for its norm; 0 for none. PARTS: as in ``_gate_up_kernel``.
    """
    trigger(PDL)
    FG: tl.constexpr = F // 32
    INNER: tl.constexpr = (FG + NG - 1) // NG
    MIN: tl.constexpr = MIN_SIGN != 0
    SUB: tl.constexpr = GROUP != SUPER
    SUMS: tl.constexpr = MIN or OFFSET != 0
    STEPS: tl.constexpr = (TOP_K + TOGETHER - 1) // TOGETHER
    OWN: tl.constexpr = R // TOGETHER  # rows of the shared expert in each thread
    w = tl.arange(0, SIDE * TOGETHER)[None, None, :, None]
    g = tl.arange(0, NG)[None, None, None, :] + w * 0
    which = w % TOGETHER + g * 0
    start = tl.program_id(0) * (R * SIDE)
    own = start + w // TOGETHER * R  # the first of a thread's rows
    if not EARLY:
        wait(PDL)
    root = root_of(load_squares(roots, PARTS), eps, K, PARTS) if PARTS > 0 else 1.0
    experts, weights = choose_all(logits, root, E, EP, TOP_K, NORMALIZE, SHARED, GATED)
    tiles = nothing()
    for step in tl.static_range(STEPS):
        if TOGETHER == 1:
            first = experts[step].to(tl.int64) * H
        else:
            first = one_of(experts, which, step * TOGETHER, TOGETHER, TOP_K - 1).to(tl.int64) * H
        for i in tl.static_range(INNER):
            for r in tl.static_range(R):
                row = tl.minimum(own + r, H - 1)
                tiles += (
                    load_expert(words, high, d, m, sub_d, sub_m, first, row, i * NG + g, F, BITS, SUPER, MIN, SUB),
                )
    shared = nothing()
    if SHARED:
        first = experts[TOP_K].to(tl.int64) * H
        for i in tl.static_range(INNER):
            for r in tl.static_range(OWN):
                row = tl.minimum(own + which * OWN + r, H - 1)
                shared += (
                    load_expert(words, high, d, m, sub_d, sub_m, first, row, i * NG + g, F, BITS, SUPER, MIN, SUB),
                )
    LANES: tl.constexpr = NG * TOGETHER // R  # that have the same row, once the lanes have added what they have
    thread = w * NG + g
    n = start + thread // LANES
    mine = (thread % LANES == 0) & (n < H)
    before = load_fresh(h + tl.minimum(n, H - 1))
    if HANDED:
        gain = load_float(next_norm + n, n < H)
    if EARLY:
        wait(PDL)
    sums = nothing()
    for _ in tl.static_range(R):
        sums += (g * 0.0,)
    for step in tl.static_range(STEPS):
        if TOGETHER == 1:
            pick = which + step
            weight = weights[step]
        else:
            pick = step * TOGETHER + which
            weight = tl.where(pick < TOP_K, one_of(weights, which, step * TOGETHER, TOGETHER, TOP_K - 1), 0.0)
            pick = tl.minimum(pick, TOP_K - 1)
        for i in tl.static_range(INNER):
            scales = act_scales + pick * (F // 4 // SHARE)
            x = load_row(act_words + pick * (F // 4), scales, i * NG + g, FG, SHARE, GROUP, SUMS)
            more = nothing()
            for r in tl.static_range(R):
                tile = tiles[(step * INNER + i) * R + r]
                more += (sums[r] + row_products(tile, x, SHARE, BITS, GROUP, OFFSET, MIN_SIGN, SUB) * weight,)
            sums = more
    if SHARED:
        for i in tl.static_range(INNER):
            scales = act_scales + TOP_K * (F // 4 // SHARE)
            x = load_row(act_words + TOP_K * (F // 4), scales, i * NG + g, FG, SHARE_SHARED, GROUP, SUMS)
            of_own = nothing()
            for r in tl.static_range(OWN):
                tile = shared[i * OWN + r]
                of_own += (row_products(tile, x, SHARE_SHARED, BITS, GROUP, OFFSET, MIN_SIGN, SUB) * weights[TOP_K],)
            more = nothing()
            for r in tl.static_range(R):
                more += (sums[r] + tl.where(which == r // OWN, of_own[r % OWN], 0.0),)
            sums = more
    total = before + sum_rows(sums, R, 1, NG * TOGETHER, 1)[0]
    store_own(out + n, total, mine)
    if HANDED:
        THREADS: tl.constexpr = SIDE * TOGETHER * NG
        hand_on(total, gain, start, thread, LANES, HANDED, THREADS, next_x, next_scale, squares, H)


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
        expert = tl.load(entry, cache_modifier=".cg")
    return expert, first, stop


@triton.jit
def block_row(order, block, i, stop, NUM_SHARED, PICKS: tl.constexpr):
    """The row token * PICKS + number of the i-th pick, the last one's beyond it."""
    i = tl.minimum(i, stop - 1)
    row = i * PICKS + PICKS - 1
    if block >= NUM_SHARED:
        row = tl.load(order + i, cache_modifier=".cg")
    return row


@triton.jit
def _gate_up_list_kernel(
    x_words, x_scales, roots, order, blocks, words, high, d, m, sub_d, sub_m, act_words, act_scales, M, E, NUM_SHARED,
    K: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr,
    OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, PICKS: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr,
    NG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a block of picks of one expert, R of F values a program, as int8 [M * PICKS, F]."""
    KG: tl.constexpr = K // 32
    MIN: tl.constexpr = MIN_SIGN != 0
    SUB: tl.constexpr = GROUP != SUPER
    SUMS: tl.constexpr = MIN or OFFSET != 0
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
        row = block_row(order, block, begin, stop, NUM_SHARED, PICKS)
        ahead = block_row(order, block, begin + 1, stop, NUM_SHARED, PICKS)
        token = row // PICKS
        root = tl.load(roots + token)
        x = load_row(x_words + token * (K // 4), x_scales + token * (K // 16), g, KG, 4, GROUP, SUMS)
        for i in range(begin, stop):  # inputs are loaded one pick ahead, their places two
            token = ahead // PICKS
            next_root = tl.load(roots + token)
            next_x = load_row(x_words + token * (K // 4), x_scales + token * (K // 16), g, KG, 4, GROUP, SUMS)
            next_ahead = block_row(order, block, i + 2, stop, NUM_SHARED, PICKS)
            gate, up = sum_both(
                row_products(tile, x, 4, BITS, GROUP, OFFSET, MIN_SIGN, SUB),
                row_products(twin, x, 4, BITS, GROUP, OFFSET, MIN_SIGN, SUB),
                3,
            )
            at = row * (F // R) + tl.program_id(0) + tl.arange(0, 1)
            act = tl.reshape(gate_times_up(gate * root, up * root, "silu"), (1, R))
            store_rows(act, act_words + at * (R // 4), act_scales + at)
            row = ahead
            ahead = next_ahead
            root = next_root
            x = next_x


@triton.jit
def _down_list_kernel(
    act_words, act_scales, order, blocks, weights, words, high, d, m, sub_d, sub_m, parts, M, E, NUM_SHARED, H,
    F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    MIN_SIGN: tl.constexpr, PICKS: tl.constexpr, TOKENS: tl.constexpr, SHARE: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, NG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weighted products of a block of picks, R * W rows a program: float32 [M * PICKS, H]."""
    trigger(PDL)
    FG: tl.constexpr = F // 32
    MIN: tl.constexpr = MIN_SIGN != 0
    SUB: tl.constexpr = GROUP != SUPER
    SUMS: tl.constexpr = MIN or OFFSET != 0
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
        row = block_row(order, block, begin, stop, NUM_SHARED, PICKS)
        ahead = block_row(order, block, begin + 1, stop, NUM_SHARED, PICKS)
        wait(PDL)
        x = load_row(act_words + row * (F // 4), act_scales + row * (F // 4 // SHARE), g, FG, SHARE, GROUP, SUMS)
        for i in range(begin, stop):
            words_at = act_words + ahead * (F // 4)
            next_x = load_row(words_at, act_scales + ahead * (F // 4 // SHARE), g, FG, SHARE, GROUP, SUMS)
            next_ahead = block_row(order, block, i + 2, stop, NUM_SHARED, PICKS)
            y = tl.sum(row_products(tile, x, SHARE, BITS, GROUP, OFFSET, MIN_SIGN, SUB), 3)
            tl.store(parts + row * H + n, y * tl.load(weights + row, cache_modifier=".cg"), mask=n < H)
            row = ahead
            ahead = next_ahead
            x = next_x


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
