"""Gate, up and down products of the chosen experts.

Tensors are [1, R, W, NG], as in block_linear's streamed kernel: a thread holds whole groups of 32 columns, 16 bytes of
a weight a load. Inputs are int8: words of four columns, and a float32 scale for SHARE of them. A scale for each word
would be more exact, but an instruction for every four weights counts: SHARE is 4 for x, R / 4 for what down reads.

For a token apart the kernels choose the experts themselves, in the first warp of each program: that costs less than a
kernel between the router and them. ``_gate_up_kernel`` and ``_gate_up_list_kernel`` let the next kernel start only
after their own wait: so what was written before them is there when the kernel for down starts, and that one reads the
choice and the weights of its experts while gate and up are still multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import load_quants, load_scales, load_tile
from ostinato.kernels.block_linear.rounded.triton import (
    add_all,
    half_dots,
    hand_on,
    load_row,
    load_rows,
    load_unsummed,
    mean_root,
    row_products,
    row_sums,
    scaled,
    sharers,
    with_row_sums,
)
from ostinato.kernels.lanes.triton import max_lanes, row_of, share, sum_lanes, sum_rows
from ostinato.kernels.moe.choice.triton import nth_largest
from ostinato.kernels.moe.route.triton import choose_all, fresh_root, load_fresh, sum_both
from ostinato.kernels.triton import fence, gate_times_up, int8_of, load_float, nothing, store_own, trigger, wait


@triton.jit
def expert_planes(words, high, d, m, sub_d, sub_m, first, K: tl.constexpr, BITS: tl.constexpr, SUPER: tl.constexpr):
    """The planes of a stack from row ``first``, int64, on."""
    KG: tl.constexpr = K // 32
    return (
        words + first * (KG * (8 if BITS == 8 else 4)), high + first * (KG * (2 if BITS == 6 else 1)),
        d + first * (K // SUPER), m + first * (K // SUPER), sub_d + first * KG, sub_m + first * KG,
    )  # fmt: skip


@triton.jit
def load_expert(
    words, high, d, m, sub_d, sub_m, first, rows, g, K: tl.constexpr, BITS: tl.constexpr, SUPER: tl.constexpr,
    HAS_MIN: tl.constexpr, HAS_SUB: tl.constexpr,
):  # fmt: skip
    """``load_tile`` of the rows ``first + rows``, where first, int64, is the expert's."""
    p = expert_planes(words, high, d, m, sub_d, sub_m, first, K, BITS, SUPER)
    return load_tile(p[0], p[1], p[2], p[3], p[4], p[5], rows, g, K // 32, BITS, SUPER, HAS_MIN, HAS_SUB)


@triton.jit
def store_row(y, words, scales, R: tl.constexpr):
    """R values as R / 4 words of int8 and their scale."""
    four = tl.reshape(y, (R // 4, 4))
    largest = tl.max(tl.max(tl.abs(four), 1), 0)
    bytes_ = (int8_of(four, largest) & 255) << (8 * tl.arange(0, 4)[None, :])
    tl.store(words + tl.arange(0, R // 4), tl.sum(bytes_, 1))
    tl.store(scales, largest * (1.0 / 127.0))


@triton.constexpr_function
def scales_before(count: int) -> int:
    """Where the scales of the shared expert stand behind ``count`` others: they are loaded by four."""
    return -(-count // 4) * 4


@triton.jit
def _gate_up_kernel(
    x_words, x_scales, roots, eps, logits, words, high, d, m, sub_d, sub_m, act, act_scales, E, K: tl.constexpr,
    F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    MIN_SIGN: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr,
    TOGETHER: tl.constexpr, NG: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, MANY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of one token, as int8 [TOP_K + shared, F]: R * SIDE of F values of TOGETHER picks a program.

    MANY: the second number of a program is its token's.

    SHARED: values of the shared expert a program, half as many as rows side by side or more; 0 without one. Its weights
    are loaded before the choice of the others is known.

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
    if MANY:
        token = tl.program_id(1).to(tl.int64)
        x_words += token * (K // 4)
        x_scales += token * (K // 16)
        roots += token
        logits += token * (E + 1)
        act += token * ((TOP_K + (SHARED > 0)) * F)
        act_scales += token * ((TOP_K + (SHARED > 0)) * (F // 4))
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
    planes = expert_planes(words, high, d, m, sub_d, sub_m, first, K, BITS, SUPER)
    tiles = nothing()
    for step in tl.static_range(STEPS):
        for i in tl.static_range(2):
            row = block * ROWS + side * R + i * F
            tiles += (load_rows(planes, row, 2 * F - 1, step * NG + g, R, KG, BITS, GROUP, SUPER, MIN),)
    fence()
    root = mean_root(roots, g, eps, K, PARTS, NG) if PARTS > 0 else tl.load(roots)
    S: tl.constexpr = sharers(GROUP, SUPER)
    KEPT: tl.constexpr = max(1, R // S)
    sums = nothing()
    both = nothing()
    for step in tl.static_range(STEPS):
        x = with_row_sums(xs[step], 4, GROUP, MIN or OFFSET != 0)
        more = nothing()
        for i in tl.static_range(OWN):
            y = row_products(of_shared[step * OWN + i], x, 4, BITS, GROUP, OFFSET, MIN_SIGN, SUB)
            more += (y if step == 0 else both[i] + y,)
        both = more
        of_both = row_sums(tiles[2 * step], x, R, 4, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
        of_both += row_sums(tiles[2 * step + 1], x, R, 4, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
        sums = of_both if step == 0 else add_all(sums, of_both, 2 * KEPT)
    gate, up = sum_rows(sums, KEPT, 2, S, NG)
    value = gate_times_up(gate * root, up * root, "silu")
    SPAN: tl.constexpr = SIDE * NG  # lanes that have values of one pick
    largest = max_lanes(tl.abs(value), 1, min(SPAN, 32))
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
            written += (sum_lanes(both[i], 1, NG), WARPS + i * W + w, g == 0)
        s = thread % max(SHARED, 1)
        places += (WARPS + s, WARPS + SHARED + s)
        found = share(written, places, 1 + OWN, MEET + 2, WARPS + max(2 * SHARED, 1))
        largest = found[0]
        for i in tl.static_range(1, MEET):
            largest = tl.maximum(largest, found[i])
        if SHARED > 0:
            of_one = gate_times_up(found[MEET] * root, found[MEET + 1] * root, "silu")
            most = max_lanes(tl.abs(of_one), 1, SHARED)
            column = tl.program_id(0) * SHARED + s
            inside = (thread < SHARED) & (column < F)
            store_own(act + TOP_K * F + column, int8_of(of_one, most), inside)
            last = scales_before(TOP_K * BLOCKS) + tl.program_id(0)
            store_own(act_scales + last + thread * 0, most * (1.0 / 127.0), inside & (thread == 0))
    at = (group * TOGETHER + pick) * BLOCKS + block
    store_own(act + at * ROWS + side * R + row_of(g, R, 1, NG), int8_of(value, largest), g < R)
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
def add_weighted(sums, more, weight, COUNT: tl.constexpr):
    """sums + weight * more, of tuples of COUNT tensors."""
    found = nothing()
    for i in tl.static_range(COUNT):
        found += (sums[i] + more[i] * weight,)
    return found


@triton.jit
def rows_of_one(
    loaded, x, which, kept, R: tl.constexpr, OWN: tl.constexpr, SHARE: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
):  # fmt: skip
    """``row_sums`` of R rows of which a thread has only OWN, those from which * OWN on; the others add nothing."""
    S: tl.constexpr = sharers(GROUP, SUPER)
    found = nothing()
    if S == 1:
        of_own = row_sums(loaded, x, OWN, SHARE, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
        for r in tl.static_range(R):
            found += (tl.where(which == r // OWN, of_own[r % OWN], 0.0),)
    else:
        of_own = nothing()
        for r in tl.static_range(OWN):
            lower, upper = half_dots(loaded[r], x, SHARE, BITS)
            of_own += (lower + upper,)
        dots = nothing()
        for r in tl.static_range(R):
            dots += (tl.where(which == r // OWN, of_own[r % OWN], 0.0),)
        dots = sum_rows(dots, R, 1, 1, S)
        of_x = x[8]
        if MIN_SIGN != 0 or OFFSET != 0:
            of_x = sum_lanes(x[8 + 8 // SHARE], 1, S)
        for i in tl.static_range(max(1, R // S)):
            has = tl.where(which == (kept + i) // OWN, of_x, 0.0)
            found += (scaled(dots[i], loaded[OWN + i], has, GROUP, OFFSET, MIN_SIGN),)
    return found


@triton.jit
def _down_kernel(
    act_words, act_scales, logits, words, high, d, m, sub_d, sub_m, h, out, next_norm, next_x, next_scale,
    squares, roots, eps, E, H, K: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr, SHARED: tl.constexpr, GATED: tl.constexpr, SHARE: tl.constexpr,
    SHARE_SHARED: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr, TOGETHER: tl.constexpr, NG: tl.constexpr,
    EARLY: tl.constexpr, HANDED: tl.constexpr, PARTS: tl.constexpr, MANY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = h + the weighted sum over all picks of one token, R * SIDE rows a program.

    R rows have NG lanes for each of TOGETHER picks side by side, all of them in one warp, so that the sum over picks
    needs no other. The shared expert, a pick too many, shares its rows out among these picks.
    HANDED: columns of which out * next_norm is stored as int8 with one scale, beside the sum of out² over them, so that
    the next product needs no kernel for its norm; 0 for none. PARTS, MANY: as in ``_gate_up_kernel``.
    """
    FG: tl.constexpr = F // 32
    INNER: tl.constexpr = (FG + NG - 1) // NG
    MIN: tl.constexpr = MIN_SIGN != 0
    SUMS: tl.constexpr = MIN or OFFSET != 0
    STEPS: tl.constexpr = (TOP_K + TOGETHER - 1) // TOGETHER
    OWN: tl.constexpr = R // TOGETHER  # rows of the shared expert in each thread
    w = tl.arange(0, SIDE * TOGETHER)[None, None, :, None]
    g = tl.arange(0, NG)[None, None, None, :] + w * 0
    which = w % TOGETHER + g * 0
    start = tl.program_id(0) * (R * SIDE)
    own = start + w // TOGETHER * R  # the first of a thread's rows
    if MANY:
        token = tl.program_id(1).to(tl.int64)
        act_words += token * ((TOP_K + SHARED) * (F // 4))
        act_scales += token * ((TOP_K + SHARED) * (F // 4))
        logits += token * (E + 1)
        h += token * H
        out += token * H
    if not EARLY:
        wait(PDL)
    root = fresh_root(roots, eps, K, PARTS) if PARTS > 0 else 1.0
    experts, weights = choose_all(logits, root, E, EP, TOP_K, NORMALIZE, SHARED, GATED)
    trigger(PDL)  # not before: the next kernel's weights would be on their way ahead of these experts'
    tiles = nothing()
    for step in tl.static_range(STEPS):
        if TOGETHER == 1:
            first = experts[step].to(tl.int64) * H
        else:
            first = one_of(experts, which, step * TOGETHER, TOGETHER, TOP_K - 1).to(tl.int64) * H
        planes = expert_planes(words, high, d, m, sub_d, sub_m, first, F, BITS, SUPER)
        for i in tl.static_range(INNER):
            tiles += (load_rows(planes, own, H - 1, i * NG + g, R, FG, BITS, GROUP, SUPER, MIN),)
    S: tl.constexpr = sharers(GROUP, SUPER)
    KEPT: tl.constexpr = max(1, R // S)
    kept = row_of(g, R, 1, S)  # the first of the rows that a lane has of each pick
    shared = nothing()
    if SHARED:
        planes = expert_planes(words, high, d, m, sub_d, sub_m, experts[TOP_K].to(tl.int64) * H, F, BITS, SUPER)
        for i in tl.static_range(INNER):
            if S == 1:
                row = own + which * OWN
                shared += (load_rows(planes, row, H - 1, i * NG + g, OWN, FG, BITS, GROUP, SUPER, MIN),)
            else:
                found = nothing()
                for r in tl.static_range(OWN):
                    row = tl.minimum(own + which * OWN + r, H - 1)
                    found += (load_quants(planes[0], planes[1], row, i * NG + g, FG, BITS),)
                for r in tl.static_range(KEPT):
                    row = tl.minimum(own + kept + r, H - 1)
                    found += (load_scales(planes[2], planes[3], row, i * NG + g, FG, SUPER, MIN),)
                shared += (found,)
    lane = which * NG + g  # of those of a thread's rows
    n = own + row_of(lane, R, 1, NG * TOGETHER)  # the lane's own, once the lanes have added what they have
    mine = (lane < R) & (n < H)
    before = load_fresh(h + tl.minimum(n, H - 1))
    if HANDED:
        gain = load_float(next_norm + n, n < H)
    if EARLY:
        wait(PDL)
    sums = nothing()
    for _ in tl.static_range(KEPT):
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
            found = row_sums(tiles[step * INNER + i], x, R, SHARE, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
            sums = add_weighted(sums, found, weight, KEPT)
    if SHARED:
        for i in tl.static_range(INNER):
            scales = act_scales + scales_before(TOP_K * (F // 4 // SHARE))
            x = load_row(act_words + TOP_K * (F // 4), scales, i * NG + g, FG, SHARE_SHARED, GROUP, SUMS)
            found = rows_of_one(shared[i], x, which, kept, R, OWN, SHARE_SHARED, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
            sums = add_weighted(sums, found, weights[TOP_K], KEPT)
    total = before + sum_rows(sums, KEPT, 1, S, NG * TOGETHER)[0]
    store_own(out + n, total, mine)
    if HANDED:
        THREADS: tl.constexpr = SIDE * TOGETHER * NG
        SPAN: tl.constexpr = NG * TOGETHER * HANDED // R
        hand_on(total, gain, n, mine, w * NG + g, SPAN, HANDED, THREADS, next_x, next_scale, squares, H)


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
            at = row * (F // R) + tl.program_id(0)
            store_row(gate_times_up(gate * root, up * root, "silu"), act_words + at * (R // 4), act_scales + at, R)
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
