"""Router, choice of experts and, for several tokens, the picks sorted by expert.

Activations leave the router as int8: ``x_words`` [M, K/4], four in a word, ``x_scales`` float32 [M, K/16], one for
16 columns (or, WIDE, [M, K/128, 2], a scale and the scaled sum of 128), and ``roots`` float32 [M], by which the norm
scales a row. The layout of threads follows from a tensor's shape, as in block_linear.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.moe.choice.triton import largest
from ostinato.kernels.triton import INTERPRETED, dp4a, load_floats, nothing, quantize_quad, trigger, wait


@triton.jit
def load_fresh(pointer):
    """One float32 or int32 each, read from the L2 cache, where any earlier kernel's writes are."""
    if INTERPRETED:
        return tl.load(pointer)
    elif pointer.dtype.element_ty == tl.int32:
        return tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b32 $0, [$1];", "=f,l", [pointer], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def fresh_root(squares, eps, K: tl.constexpr, PARTS: tl.constexpr):
    """``mean_root`` of block_linear, for a kernel that may start before the one behind the squares' maker is done."""
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    square = tl.where(part < PARTS, load_fresh(squares + tl.minimum(part, PARTS - 1)), 0.0)
    return tl.rsqrt(tl.sum(square, 0) / K + eps)


@triton.jit
def choose_all(
    logits, root, E, EP: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, SHARED: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Two tuples of TOP_K (and one, with a shared expert) numbers: experts and their weights.

    root: what all logits have to be multiplied by, positive.
    """
    experts = largest(logits, E, EP, TOP_K)
    values = nothing()
    for i in tl.static_range(TOP_K):
        values += (load_fresh(logits + experts[i]) * root,)
    if NORMALIZE:
        total = 0.0
        for i in tl.static_range(TOP_K):
            total += tl.exp(values[i] - values[0])
    else:
        e = tl.arange(0, EP)
        total = tl.sum(tl.where(e < E, tl.exp(load_fresh(logits + tl.minimum(e, E - 1)) * root - values[0]), 0.0), 0)
    weights = nothing()
    for i in tl.static_range(TOP_K):
        weights += (tl.exp(values[i] - values[0]) / total,)
    if SHARED:
        experts += (E,)
        if GATED:
            weights += (tl.sigmoid(tl.maximum(load_fresh(logits + E) * root, -80.0)),)
        else:
            weights += (1.0,)
    return experts, weights


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
def sums_of_row(total, squares):
    """[ROWS, BN] of tensors [ROWS, BN, NG, 4] and [ROWS, 1, NG, 4]."""
    total, squares = sum_both(total, tl.broadcast_to(squares, total.shape), 3)
    return sum_both(total, squares, 2)


@triton.jit
def of_four_groups(values, MAXIMUM: tl.constexpr, ROWS: tl.constexpr, NG: tl.constexpr):
    """Of [ROWS, 1, NG]: the maximum or the sum of each four neighbours, in all four places."""
    four = tl.reshape(values, (ROWS, 1, NG // 4, 4))
    found = (tl.max(four, 3) if MAXIMUM else tl.sum(four, 3))[:, :, :, None]
    return tl.reshape(tl.broadcast_to(found, (ROWS, 1, NG // 4, 4)), (ROWS, 1, NG))


@triton.jit
def _router_kernel(
    h, norm, eps, router, gate, logits, x_words, x_scales, roots, M, E, K: tl.constexpr, BN: tl.constexpr,
    NG: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits [M, E + 1], the shared gate's last.

    The last program of a row has the gate, quantizes the row times ``norm`` and stores its 1 / root mean square.
    """
    trigger(PDL)
    KG: tl.constexpr = K // 32
    j = tl.arange(0, 4)[None, None, None, :]
    g = tl.arange(0, NG)[None, None, :, None] + j * 0
    j = j + g * 0
    column = g * 32 + j * 4
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None, None]
    inside = (row < M) & (g < KG)
    flat = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    p0, p1, p2, p3 = load_floats(norm + column, g < KG)
    p4, p5, p6, p7 = load_floats(norm + column + 16, g < KG)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        n = tl.program_id(0) * BN + tl.arange(0, BN)[None, :, None, None]
        of_expert = router + tl.minimum(n, E - 1) * K + column
        known = (n >= 0) & (g < KG)
        w0, w1, w2, w3 = load_floats(of_expert, known)
        w4, w5, w6, w7 = load_floats(of_expert + 16, known)
        w0, w1, w2, w3 = w0 * p0, w1 * p1, w2 * p2, w3 * p3
        w4, w5, w6, w7 = w4 * p4, w5 * p5, w6 * p6, w7 * p7
        wait(PDL)
        v0, v1, v2, v3 = load_floats(h + row * K + column, inside)
        v4, v5, v6, v7 = load_floats(h + row * K + column + 16, inside)
        y, mean = sums_of_row(
            (v0 * w0 + v1 * w1 + v2 * w2 + v3 * w3) + (v4 * w4 + v5 * w5 + v6 * w6 + v7 * w7),
            (v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3) + (v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7),
        )
        y *= tl.rsqrt(mean / K + eps)
        expert = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
        store = (flat < M) & (expert < E)
        tl.store(logits + flat * (E + 1) + expert, y, mask=store)
    else:
        zero = tl.zeros((1, 1, NG, 4), tl.float32)
        u0, u1, u2, u3 = zero, zero, zero, zero
        u4, u5, u6, u7 = zero, zero, zero, zero
        if GATED:
            u0, u1, u2, u3 = load_floats(gate + column, g < KG)
            u4, u5, u6, u7 = load_floats(gate + column + 16, g < KG)
        wait(PDL)  # before any store: this memory may have been another tensor's, which a kernel still reads
        v0, v1, v2, v3 = load_floats(h + row * K + column, inside)
        v4, v5, v6, v7 = load_floats(h + row * K + column + 16, inside)
        squares = (v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3) + (v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7)
        v0, v1, v2, v3 = v0 * p0, v1 * p1, v2 * p2, v3 * p3
        v4, v5, v6, v7 = v4 * p4, v5 * p5, v6 * p6, v7 * p7
        low = tl.maximum(tl.maximum(tl.abs(v0), tl.abs(v1)), tl.maximum(tl.abs(v2), tl.abs(v3)))
        upp = tl.maximum(tl.maximum(tl.abs(v4), tl.abs(v5)), tl.maximum(tl.abs(v6), tl.abs(v7)))
        if WIDE:
            low = of_four_groups(tl.max(tl.maximum(low, upp), 3), True, ROWS, NG)[:, :, :, None] + zero
            upp = low
        else:
            low = tl.max(low, 3)[:, :, :, None] + zero
            upp = tl.max(upp, 3)[:, :, :, None] + zero
        at = row * (KG * 8) + g * 8 + j
        lower = quantize_quad(v0, v1, v2, v3, 127.0 / tl.maximum(low, 1e-30))
        upper = quantize_quad(v4, v5, v6, v7, 127.0 / tl.maximum(upp, 1e-30))
        tl.store(x_words + at, lower, mask=inside)
        tl.store(x_words + at + 4, upper, mask=inside)
        if WIDE:
            ones = tl.full(lower.shape, 0x01010101, tl.int32)
            sums = dp4a(upper, ones, dp4a(lower, ones, tl.zeros(lower.shape, tl.int32)))
            sums = of_four_groups(tl.sum(sums, 3), False, ROWS, NG)[:, :, :, None] + j * 0
            place = x_scales + row * (KG // 2) + g // 4 * 2
            first = inside & (j == 0) & (g % 4 == 0)
            tl.store(place, low * (1.0 / 127.0), mask=first)
            tl.store(place + 1, low * (1.0 / 127.0) * sums.to(tl.float32), mask=first)
        else:
            tl.store(x_scales + row * (KG * 2) + g * 2, low * (1.0 / 127.0), mask=inside & (j == 0))
            tl.store(x_scales + row * (KG * 2) + g * 2 + 1, upp * (1.0 / 127.0), mask=inside & (j == 0))
        of_gate, of_row = sums_of_row(
            (v0 * u0 + v1 * u1 + v2 * u2 + v3 * u3) + (v4 * u4 + v5 * u5 + v6 * u6 + v7 * u7), squares
        )
        of_row = tl.rsqrt(of_row / K + eps)
        one = tl.zeros((1, 1), tl.int32)
        tl.store(roots + flat + one, of_row, mask=flat < M)
        tl.store(logits + flat * (E + 1) + E + one, of_gate * of_row, mask=flat < M)


@triton.jit
def _choose_kernel(
    logits, ids, weights, E, EP: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, SHARED: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts int32 and weights float32 [M, TOP_K + SHARED] of logits [M, E + 1]. One warp a token."""
    trigger(PDL)
    wait(PDL)
    token = tl.program_id(0)
    experts, found = choose_all(logits + token * (E + 1), 1.0, E, EP, TOP_K, NORMALIZE, SHARED, GATED)
    for i in tl.static_range(TOP_K + SHARED):
        tl.store(ids + token * (TOP_K + SHARED) + i, experts[i])
        tl.store(weights + token * (TOP_K + SHARED) + i, found[i])


@triton.jit
def _sort_kernel(
    ids, order, next_place, blocks, M, E, NUM_BLOCKS, EP: tl.constexpr, TOP_K: tl.constexpr, PICKS: tl.constexpr,
    PADDED: tl.constexpr, TOKENS: tl.constexpr, MAX_BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Lists of the routed picks by expert, in one program.

    ids: [M, PICKS]. order [M * TOP_K]: rows of ids (token * PICKS + number) by expert; those of one expert in any
    order, which no result depends on. blocks [NUM_BLOCKS, 4]: expert, first and stop in order, of at most TOKENS
    picks; first = stop = 0 in those that are not in use. next_place: [EP], scratch.
    """
    trigger(PDL)
    wait(PDL)
    e = tl.arange(0, EP)
    pick = tl.arange(0, PADDED)
    row = pick // TOP_K * PICKS + pick % TOP_K
    inside = pick < M * TOP_K
    chosen = tl.load(ids + row, mask=inside, other=0)
    count = tl.histogram(chosen, EP, mask=inside)
    start = tl.cumsum(count, 0) - count
    tl.store(next_place + e, start)
    tl.debug_barrier()
    place = tl.atomic_add(next_place + chosen, 1, mask=inside, sem="relaxed")
    tl.store(order + place, row, mask=inside)
    number = (count + TOKENS - 1) // TOKENS
    at = tl.cumsum(number, 0) - number
    for part in range(MAX_BLOCKS):
        entry = blocks + (at + part) * 4
        used = part < number
        tl.store(entry, e, mask=used)
        tl.store(entry + 1, start + part * TOKENS, mask=used)
        tl.store(entry + 2, start + tl.minimum((part + 1) * TOKENS, count), mask=used)
    total = tl.sum(number, 0)
    for base in range(0, NUM_BLOCKS, EP):
        unused = (base + e >= total) & (base + e < NUM_BLOCKS)
        tl.store(blocks + (base + e) * 4 + 1, 0, mask=unused)
        tl.store(blocks + (base + e) * 4 + 2, 0, mask=unused)
