"""Products with rows that are int8 already, a few columns to a scale: dp4a, exact integer sums within a scale.

Tensors are [1, R, W, NG], as in ``_streamed_kernel``: a thread holds whole groups of 32 columns, 16 bytes of a weight
a load. ``load_row`` and ``row_products`` take a scale for 4, 8, 16 or 32 columns. For one token they are R tensors
[1, 1, W, NG], one element a thread, whose sums ``kernels.lanes`` makes without a barrier. Where two or four lanes share
a group of 64 or 128 columns, they add their products first and share out the rows: then each has the scales of its own
rows to load and to apply, and of no other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import half, load_quants, load_scales, load_tile, quad
from ostinato.kernels.lanes.triton import max_lanes, row_of, share, sum_lanes, sum_rows
from ostinato.kernels.triton import (
    INTERPRETED,
    dp4a,
    int8_of,
    load_float,
    load_floats,
    load_words,
    nothing,
    store_own,
    trigger,
    wait,
)


@triton.jit
def load_row(words, scales, g, KG: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr):
    """A row of int8 inputs: eight words, 8 / SHARE scales, and the sums of the lower and the upper half of each group.

    words, scales: the row's. g: [1, 1, W, NG], the groups. SHARE: words that share a scale, 1, 2, 4 or 8. For groups of
    32 and more the whole sum is in the first.
    """
    return with_row_sums(load_unsummed(words, scales, g, KG, SHARE), SHARE, GROUP, SUMS)


@triton.jit
def load_unsummed(words, scales, g, KG: tl.constexpr, SHARE: tl.constexpr):
    """The words and scales of ``load_row``, for whoever has other work until they are there."""
    inside = g < KG
    w0, w1, w2, w3 = load_words(words + g * 8, inside)
    w4, w5, w6, w7 = load_words(words + g * 8 + 4, inside)
    x = nothing() + (w0, w1, w2, w3, w4, w5, w6, w7)  # noqa: RUF005
    if SHARE == 8:
        x += (load_float(scales + g, inside),)
    elif SHARE == 4:
        s0 = load_float(scales + g * 2, inside)
        s1 = load_float(scales + g * 2 + 1, inside)
        x += (s0, s1)
    elif SHARE == 2:
        s0, s1, s2, s3 = load_floats(scales + g * 4, inside)
        x += (s0, s1, s2, s3)
    else:
        s0, s1, s2, s3 = load_floats(scales + g * 8, inside)
        s4, s5, s6, s7 = load_floats(scales + g * 8 + 4, inside)
        x += (s0, s1, s2, s3, s4, s5, s6, s7)
    return x


@triton.jit
def with_row_sums(x, SHARE: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr):
    """``load_row`` of what ``load_unsummed`` has loaded."""
    lower = x[8]
    upper = lower
    if SUMS:
        ones = tl.full(x[0].shape, 0x01010101, tl.int32)
        lower = tl.zeros(x[0].shape, tl.float32)
        upper = lower
        ALIKE: tl.constexpr = min(SHARE, 4)
        for part in tl.static_range(4 // ALIKE):
            low = tl.full(x[0].shape, 0x4B400000, tl.int32)
            upp = low
            for t in tl.static_range(ALIKE):
                low = dp4a(x[part * ALIKE + t], ones, low)
                upp = dp4a(x[4 + part * ALIKE + t], ones, upp)
            lower += from_bits(low) * x[8 + part]
            upper += from_bits(upp) * x[8 + 4 // SHARE + part]
        if GROUP >= 32:
            lower += upper
    return x + (lower, upper)  # noqa: RUF005


@triton.jit
def store_handed(row, gain, group, x, scale, squares, N):
    """Round a row times the gain of the norm behind it: int8 with one scale for the columns of a group.

    row, gain: float32 [G, columns], of groups ``group`` [G] of a row of N. squares: the sums of row² over each group,
    from which the next product takes the root mean square.
    """
    SHARE: tl.constexpr = row.shape[1]
    column = group[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    normed = row * gain
    largest = tl.max(tl.abs(normed), 1)
    rounded = int8_of(normed, largest[:, None])
    tl.store(x + column, ((rounded << 24) >> 24).to(tl.int8), mask=column < N)
    tl.store(scale + group, largest * (1.0 / 127.0), mask=group < N // SHARE)
    tl.store(squares + group, tl.sum(row * row, 1), mask=group < N // SHARE)


@triton.jit
def hand_on(
    total, gain, column, mine, thread, SPAN: tl.constexpr, SHARE: tl.constexpr, THREADS: tl.constexpr, x, scale,
    squares, N,
):  # fmt: skip
    """``store_handed`` of a value, its gain and its column in each thread; SPAN threads in turn have SHARE columns.

    mine: one of the threads that have the same column, if it is below N. thread: its number, of THREADS.
    """
    WITHIN: tl.constexpr = min(SPAN, 32)
    normed = total * gain
    largest = max_lanes(tl.abs(normed), 1, WITHIN)
    square = sum_lanes(tl.where(mine, total * total, 0.0), 1, WITHIN)
    if SPAN > 32:
        MEET: tl.constexpr = SPAN // 32
        WARPS: tl.constexpr = THREADS // 32
        warp = thread // 32
        first = thread % 32 == 0
        base = warp // MEET * MEET
        places = nothing()
        for i in tl.static_range(MEET):
            places += (base + i,)
        for i in tl.static_range(MEET):
            places += (base + (WARPS + i),)
        found = share((largest, warp, first, square, warp + WARPS, first), places, 2, 2 * MEET, 2 * WARPS)
        largest = found[0]
        square = found[MEET]
        for i in tl.static_range(1, MEET):
            largest = tl.maximum(largest, found[i])
            square += found[MEET + i]
    store_own(x + column, int8_of(normed, largest), mine)
    leads = mine & (column % SHARE == 0)
    store_own(scale + column // SHARE, largest * (1.0 / 127.0), leads)
    store_own(squares + column // SHARE, square, leads)


@triton.jit
def mean_root(squares, g, eps, K: tl.constexpr, PARTS: tl.constexpr, NG: tl.constexpr):
    """1 / the root mean square of a row of K, of whose sum of squares there are PARTS parts, in every lane.

    g: the lane's number of NG. Each warp adds all parts itself: that takes no barrier.
    """
    total = g * 0.0
    if PARTS % 4 == 0:
        for i in tl.static_range((PARTS + 4 * NG - 1) // (4 * NG)):
            part = (i * NG + g) * 4
            q0, q1, q2, q3 = load_floats(squares + part, part < PARTS)
            total += (q0 + q1) + (q2 + q3)
    else:
        for i in tl.static_range((PARTS + NG - 1) // NG):
            total += load_float(squares + i * NG + g, i * NG + g < PARTS)
    return tl.rsqrt(sum_lanes(total, 1, NG) / K + eps)


@triton.jit
def from_bits(total):
    """An integer sum that was started at 0x4B400000, in float32.

    Those are the bits of 1.5 * 2**23, to which an integer adds as it does to a float: cheaper than converting.
    """
    return total.to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def dp4a_high(a, b, c):
    """c + the dot product of the four *unsigned* bytes of a, multiples of 16, and the signed bytes of b."""
    if INTERPRETED:
        return c + 16 * (dp4a((a >> 4) & 0x0F0F0F0F, b, tl.zeros_like(c)))
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def half_dots(tile, x, SHARE: tl.constexpr, BITS: tl.constexpr):
    """The products of a tile's quants with a row of ``load_row``, of the lower and the upper half of each group."""
    shape: tl.constexpr = tile[0].shape
    lower = tl.zeros(shape, tl.float32)
    upper = lower
    ALIKE: tl.constexpr = min(SHARE, 4)
    for part in tl.static_range(4 // ALIKE):
        low = tl.full(shape, 0x4B400000, tl.int32)
        upp = low
        for t in tl.static_range(ALIKE):
            low = dp4a(quad(tile, part * ALIKE + t, BITS), tl.broadcast_to(x[part * ALIKE + t], shape), low)
            of_upper = tl.broadcast_to(x[4 + part * ALIKE + t], shape)
            if BITS == 4:  # high nibbles where they are: 16 times the product, without a shift
                upp = dp4a_high(tile[part * ALIKE + t] & -252645136, of_upper, upp)
            else:
                upp = dp4a(quad(tile, 4 + part * ALIKE + t, BITS), of_upper, upp)
        lower += from_bits(low) * x[8 + part]
        upper += from_bits(upp) * (x[8 + 4 // SHARE + part] * (0.0625 if BITS == 4 else 1.0))
    return lower, upper


@triton.jit
def row_products(tile, x, SHARE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
                 MIN_SIGN: tl.constexpr, HAS_SUB: tl.constexpr):  # fmt: skip
    """The products of a tile with a row of ``load_row``, group by group: float32 [1, R, W, NG]."""
    lower, upper = half_dots(tile, x, SHARE, BITS)
    scale, minimum = half(tile[10], tile[11], tile[12], tile[13], False, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
    if GROUP >= 32:
        total = (lower + upper) * scale
        if MIN_SIGN != 0 or OFFSET != 0:
            total += minimum * x[8 + 8 // SHARE]
    else:
        scale_up, minimum_up = half(tile[10], tile[11], tile[12], tile[13], True, GROUP, OFFSET, MIN_SIGN, HAS_SUB)
        total = lower * scale + upper * scale_up
        if MIN_SIGN != 0 or OFFSET != 0:
            total += minimum * x[8 + 8 // SHARE] + minimum_up * x[9 + 8 // SHARE]
    return total


@triton.constexpr_function
def sharers(group: int, super_group: int) -> int:
    """Lanes that share a group, and its scales, where each has 32 columns."""
    return group // 32 if group == super_group and group > 32 else 1


@triton.jit
def load_rows(
    planes, row, last, g, R: tl.constexpr, KG: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, HAS_MIN: tl.constexpr,
):  # fmt: skip
    """What ``row_sums`` multiplies of a weight's rows row … row + R - 1, or ``last`` again beyond it.

    planes: of the weight, six pointers. row, g: int32 [1, 1, W, NG].
    """
    S: tl.constexpr = sharers(GROUP, SUPER)
    found = nothing()
    if S == 1:
        for r in tl.static_range(R):
            rows = tl.minimum(row + r, last)
            found += (
                load_tile(
                    planes[0], planes[1], planes[2], planes[3], planes[4], planes[5], rows, g, KG, BITS, SUPER, HAS_MIN,
                    GROUP != SUPER,
                ),
            )  # fmt: skip
    else:
        for r in tl.static_range(R):
            found += (load_quants(planes[0], planes[1], tl.minimum(row + r, last), g, KG, BITS),)
        own = row + row_of(g, R, 1, S)
        for i in tl.static_range(max(1, R // S)):
            found += (load_scales(planes[2], planes[3], tl.minimum(own + i, last), g, KG, SUPER, HAS_MIN),)
    return found


@triton.jit
def row_sums(
    loaded, x, R: tl.constexpr, SHARE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr,
    OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
):  # fmt: skip
    """The products of what ``load_rows`` found with a row of ``load_row``, added over the lanes that share a group.

    Returns those that a lane keeps: ``row_of`` (g, R, 1, sharers) and the ones that follow it, R / sharers or one.
    """
    S: tl.constexpr = sharers(GROUP, SUPER)
    found = nothing()
    if S == 1:
        for r in tl.static_range(R):
            found += (row_products(loaded[r], x, SHARE, BITS, GROUP, OFFSET, MIN_SIGN, GROUP != SUPER),)
    else:
        for r in tl.static_range(R):
            lower, upper = half_dots(loaded[r], x, SHARE, BITS)
            found += (lower + upper,)
        of_x = x[8]
        if MIN_SIGN != 0 or OFFSET != 0:
            of_x = sum_lanes(x[8 + 8 // SHARE], 1, S)
        dots = sum_rows(found, R, 1, 1, S)
        found = nothing()
        for i in tl.static_range(max(1, R // S)):
            found += (scaled(dots[i], loaded[R + i], of_x, GROUP, OFFSET, MIN_SIGN),)
    return found


@triton.jit
def scaled(dots, scales, of_x, GROUP: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr):
    """Sums of products over a group times its scale, with its minimum times the sum ``of_x`` of the row.

    scales: of ``load_scales``.
    """
    dd, mm = scales
    scale, minimum = half(dd, mm, dd, mm, False, GROUP, OFFSET, MIN_SIGN, False)
    total = dots * scale
    if MIN_SIGN != 0 or OFFSET != 0:
        total += minimum * of_x
    return total


@triton.jit
def add_all(sums, more, COUNT: tl.constexpr):
    """Two tuples of COUNT tensors, added."""
    found = nothing()
    for i in tl.static_range(COUNT):
        found += (sums[i] + more[i],)
    return found


@triton.jit
def _store_beside(
    first, h, norm, beside, logits, squares, eps, COUNT, K: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Products first … first + WARPS - 1 of rms_norm(h, norm, eps) and rows of ``beside``, of floats: one a warp."""
    STEPS: tl.constexpr = (K + 127) // 128
    AHEAD: tl.constexpr = min(STEPS, 16)  # what registers hold
    lane = tl.arange(0, 32)[None, :]
    which = first + tl.arange(0, WARPS)[:, None]
    row = tl.minimum(which, COUNT - 1) * K
    lane += row * 0
    weights = nothing()
    for i in tl.static_range(AHEAD):
        at = i * 128 + lane * 4
        p0, p1, p2, p3 = load_floats(norm + at, at < K)
        r0, r1, r2, r3 = load_floats(beside + row + at, at < K)
        weights += (r0 * p0, r1 * p1, r2 * p2, r3 * p3)
    wait(PDL)
    root = mean_root(squares, lane, eps, K, PARTS, 32)
    total = lane * 0.0
    for i in tl.static_range(STEPS):
        at = i * 128 + lane * 4
        h0, h1, h2, h3 = load_floats(h + at, at < K)
        if i < AHEAD:
            w0, w1, w2, w3 = weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3]
        else:
            p0, p1, p2, p3 = load_floats(norm + at, at < K)
            r0, r1, r2, r3 = load_floats(beside + row + at, at < K)
            w0, w1, w2, w3 = r0 * p0, r1 * p1, r2 * p2, r3 * p3
        total += (h0 * w0 + h1 * w1) + (h2 * w2 + h3 * w3)
    store_own(logits + which + lane * 0, sum_lanes(total, 1, 32) * root, (which < COUNT) & (lane == 0))


@triton.jit
def _rounded_kernel(
    x_words, x_scales, squares, eps, words, high, d, m, sub_d, sub_m, residual, out, h, norm, beside, logits, COUNT, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    MIN_SIGN: tl.constexpr, R: tl.constexpr, W: tl.constexpr, NG: tl.constexpr, PARTS: tl.constexpr,
    RESIDUAL: tl.constexpr, BESIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of x with a scale for 16 columns by R * W rows of a weight, each in NG lanes.

    PARTS: the sum of that many ``squares`` of a row is of all K columns, and the root mean square divides the products
    (it only scales a row); 0 for none. BESIDE: programs before those of the weight have rows of ``beside``, if any.
    """
    trigger(PDL)
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + NG - 1) // NG
    MIN: tl.constexpr = MIN_SIGN != 0
    program = tl.program_id(0)
    if BESIDE:
        WARPS: tl.constexpr = W * NG // 32
        others = (COUNT + WARPS - 1) // WARPS
        if program < others:  # the first to start, since they have the most to load
            _store_beside(program * WARPS, h, norm, beside, logits, squares, eps, COUNT, K, WARPS, PARTS, PDL)
            return
        program -= others
    start = program * (R * W)
    token = tl.program_id(1)
    w = tl.arange(0, W)[None, None, :, None]
    g = tl.arange(0, NG)[None, None, None, :] + w * 0
    x_words += token * (K // 4)
    x_scales += token * (K // 16)
    planes = nothing() + (words, high, d, m, sub_d, sub_m)  # noqa: RUF005
    tiles = nothing()  # all of them: one loaded a step ahead would come from memory after the wait
    for step in tl.static_range(STEPS):
        tiles += (load_rows(planes, start + w * R, N - 1, step * NG + g, R, KG, BITS, GROUP, SUPER, MIN),)
    n = start + w * R + row_of(g, R, 1, NG)  # the lane's own, once the lanes have added what they have
    where = token * N + n
    mine = (g < R) & (n < N)
    wait(PDL)
    if RESIDUAL:
        added = load_float(residual + where, mine)
    if PARTS > 0:
        root = mean_root(squares + token * PARTS, g, eps, K, PARTS, NG)
    S: tl.constexpr = sharers(GROUP, SUPER)
    KEPT: tl.constexpr = max(1, R // S)
    sums = nothing()
    for step in tl.static_range(STEPS):
        x = load_row(x_words, x_scales, step * NG + g, KG, 4, GROUP, MIN or OFFSET != 0)
        more = row_sums(tiles[step], x, R, 4, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
        sums = more if step == 0 else add_all(sums, more, KEPT)
    y = sum_rows(sums, KEPT, 1, S, NG)[0]
    if PARTS > 0:
        y *= root
    if RESIDUAL:
        y += added
    store_own(out + where, y, mine)
