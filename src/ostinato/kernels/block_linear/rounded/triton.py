"""Products with rows that are int8 already, a few columns to a scale: dp4a, exact integer sums within a scale.

Tensors are [1, R, W, NG], as in ``_streamed_kernel``: a thread holds whole groups of 32 columns, 16 bytes of a weight
a load. ``load_row`` and ``row_products`` take a scale for 4, 8 or 16 columns; the experts' kernels use all three.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import half, load_tile, quad
from ostinato.kernels.triton import INTERPRETED, dp4a, load_float, load_floats, load_words, nothing, trigger, wait


@triton.jit
def load_row(words, scales, g, KG: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr):
    """A row of int8 inputs: eight words, 8 / SHARE scales, and the sums of the lower and the upper half of each group.

    words, scales: the row's. g: [1, 1, W, NG], the groups. SHARE: words that share a scale, 1, 2 or 4. For groups of 32
    and more the whole sum is in the first.
    """
    return with_row_sums(load_unsummed(words, scales, g, KG, SHARE), SHARE, GROUP, SUMS)


@triton.jit
def load_unsummed(words, scales, g, KG: tl.constexpr, SHARE: tl.constexpr):
    """The words and scales of ``load_row``, for whoever has other work until they are there."""
    inside = g < KG
    w0, w1, w2, w3 = load_words(words + g * 8, inside)
    w4, w5, w6, w7 = load_words(words + g * 8 + 4, inside)
    x = nothing() + (w0, w1, w2, w3, w4, w5, w6, w7)  # noqa: RUF005
    if SHARE == 4:
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
        for part in tl.static_range(4 // SHARE):
            low = tl.full(x[0].shape, 0x4B400000, tl.int32)
            upp = low
            for t in tl.static_range(SHARE):
                low = dp4a(x[part * SHARE + t], ones, low)
                upp = dp4a(x[4 + part * SHARE + t], ones, upp)
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
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    shifted = normed * (127.0 / tl.maximum(largest, 1e-30))[:, None] + 12582912.0
    rounded = shifted.to(tl.int32, bitcast=True)
    tl.store(x + column, ((rounded << 24) >> 24).to(tl.int8), mask=column < N)
    tl.store(scale + group, largest * (1.0 / 127.0), mask=group < N // SHARE)
    tl.store(squares + group, tl.sum(row * row, 1), mask=group < N // SHARE)


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
def row_products(tile, x, SHARE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
                 MIN_SIGN: tl.constexpr, HAS_SUB: tl.constexpr):  # fmt: skip
    """The products of a tile with a row of ``load_row``, group by group: float32 [1, R, W, NG]."""
    shape: tl.constexpr = tile[0].shape
    lower = tl.zeros(shape, tl.float32)
    upper = lower
    for part in tl.static_range(4 // SHARE):
        low = tl.full(shape, 0x4B400000, tl.int32)
        upp = low
        for t in tl.static_range(SHARE):
            low = dp4a(quad(tile, part * SHARE + t, BITS), tl.broadcast_to(x[part * SHARE + t], shape), low)
            of_upper = tl.broadcast_to(x[4 + part * SHARE + t], shape)
            if BITS == 4:  # high nibbles where they are: 16 times the product, without a shift
                upp = dp4a_high(tile[part * SHARE + t] & -252645136, of_upper, upp)
            else:
                upp = dp4a(quad(tile, 4 + part * SHARE + t, BITS), of_upper, upp)
        lower += from_bits(low) * x[8 + part]
        upper += from_bits(upp) * (x[8 + 4 // SHARE + part] * (0.0625 if BITS == 4 else 1.0))
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


@triton.jit
def _store_beside(
    first, h, norm, beside, logits, squares, eps, COUNT, K: tl.constexpr, TOGETHER: tl.constexpr, NG: tl.constexpr,
    PARTS: tl.constexpr, PARTS_UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products first … first + TOGETHER - 1 of rms_norm(h, norm, eps) and rows of ``beside``, of floats.

    Tensors are [TOGETHER, NG, 4]: a thread has quads of columns of each row.
    """
    j = tl.arange(0, 4)[None, None, :]
    g = tl.arange(0, NG)[None, :, None] + j * 0
    j = j + g * 0
    n = tl.minimum(first + tl.arange(0, TOGETHER), COUNT - 1)[:, None, None]
    weights = nothing()
    for i in tl.static_range(2):
        at = g * 32 + i * 16 + j * 4
        p0, p1, p2, p3 = load_floats(norm + at, at < K)
        r0, r1, r2, r3 = load_floats(beside + n * K + at, (n >= 0) & (at < K))
        weights += (r0 * p0, r1 * p1, r2 * p2, r3 * p3)
    wait(PDL)
    part = tl.arange(0, PARTS_UP)
    square = tl.load(squares + part, mask=part < PARTS, other=0.0)
    total = tl.zeros((TOGETHER, NG, 4), tl.float32)
    for i in tl.static_range(2):
        at = g * 32 + i * 16 + j * 4
        h0, h1, h2, h3 = load_floats(h + at, at < K)
        total += (h0 * weights[4 * i] + h1 * weights[4 * i + 1]) + (h2 * weights[4 * i + 2] + h3 * weights[4 * i + 3])
    which = first + tl.arange(0, TOGETHER)
    y = tl.sum(tl.sum(total, 2), 1) * tl.rsqrt(tl.sum(square, 0) / K + eps)
    tl.store(logits + which, y, mask=which < COUNT)


@triton.jit
def _rounded_kernel(
    x_words, x_scales, squares, eps, words, high, d, m, sub_d, sub_m, residual, out, h, norm, beside, logits, COUNT, N,
    K: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, NG: tl.constexpr, PARTS: tl.constexpr, PARTS_UP: tl.constexpr,
    RESIDUAL: tl.constexpr, TOGETHER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of x with a scale for 16 columns by R * W rows of a weight.

    PARTS: the sum of that many ``squares`` of a row is of all K columns, and the root mean square divides the products
    (it only scales a row); 0 for none. PARTS_UP: the power of two from there. TOGETHER: programs behind those of the
    weight have so many rows of ``beside`` each, if there are any; 0 where there never are.
    """
    trigger(PDL)
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + NG - 1) // NG
    SUB: tl.constexpr = GROUP != SUPER
    MIN: tl.constexpr = MIN_SIGN != 0
    start = tl.program_id(0) * (R * W)
    if TOGETHER > 0:  # noqa: SIM102  # known to the compiler, unlike what follows
        if start >= N:
            first = (tl.program_id(0) - (N + R * W - 1) // (R * W)) * TOGETHER
            _store_beside(
                first, h, norm, beside, logits, squares, eps, COUNT, K, TOGETHER, triton.next_power_of_2(KG), PARTS,
                PARTS_UP, PDL,
            )  # fmt: skip
            return
    token = tl.program_id(1)
    rows = tl.minimum(start + tl.arange(0, R)[None, :, None, None] * W + tl.arange(0, W)[None, None, :, None], N - 1)
    n = start + tl.arange(0, R)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    where = token * N + n
    g = tl.arange(0, NG)[None, None, None, :]
    lane = tl.arange(0, W)[None, None, :, None] * 0 + g
    x_words += token * (K // 4)
    x_scales += token * (K // 16)
    tiles = nothing()  # all of them: one loaded a step ahead would come from memory after the wait
    for step in tl.static_range(STEPS):
        tiles += (load_tile(words, high, d, m, sub_d, sub_m, rows, step * NG + g, KG, BITS, SUPER, MIN, SUB),)
    wait(PDL)
    if RESIDUAL:
        added = tl.load(residual + where, mask=n < N, other=0.0)
    if PARTS > 0:
        part = tl.arange(0, PARTS_UP)
        square = tl.load(squares + token * PARTS + part, mask=part < PARTS, other=0.0)
    acc = tl.zeros((1, R, W, NG), tl.float32)
    for step in tl.static_range(STEPS):
        x = load_row(x_words, x_scales, step * NG + lane, KG, 4, GROUP, MIN or OFFSET != 0)
        acc += row_products(tiles[step], x, 4, BITS, GROUP, OFFSET, MIN_SIGN, SUB)
    y = tl.sum(acc, 3)
    if PARTS > 0:
        y *= tl.rsqrt(tl.sum(square, 0) / K + eps)
    if RESIDUAL:
        y += added
    tl.store(out + where, y.to(out.dtype.element_ty), mask=n < N)
