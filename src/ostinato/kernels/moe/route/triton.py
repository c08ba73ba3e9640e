"""Router, choice of experts and, for several tokens, the picks sorted by expert.

Activations leave the router as int8: ``x_words`` [M, K/4], four in a word, and ``x_scales`` [M, K/4] in float32, one
for each word, with the norm's factor in them. The layout of threads follows from a tensor's shape, as in block_linear.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.triton import INTERPRETED, load_floats, quantize_quad, trigger, wait


@triton.jit
def load_fresh(pointer, inside):
    """One float32 each, -inf outside, read from the L2 cache, where any earlier kernel's writes are."""
    if INTERPRETED:
        return tl.load(pointer, mask=inside, other=float("-inf"))
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0xff800000; @p ld.relaxed.gpu.global.b32 $0, [$1]; }",
            "=&f,l,r", [pointer, inside.to(tl.int32)], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_keys(logits, E, EP: tl.constexpr, WARPS: tl.constexpr):
    """Integers in the order of the logits [E], each unique: the expert's complement stands in the lowest bits.

    int32 [EP / 32, WARPS, 32]: each warp has all of them, so that the choice needs no exchange between warps.
    """
    lane = tl.arange(0, 32)[None, None, :] + tl.arange(0, WARPS)[None, :, None] * 0
    expert = tl.arange(0, EP // 32)[:, None, None] * 32 + lane
    bits = load_fresh(logits + expert, expert < E).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(expert < E, (ordered & -EP) | (EP - 1 - expert), -2147483648)


@triton.jit
def largest(keys):
    """The largest key, once a warp: [WARPS]."""
    return tl.max(tl.max(keys, 0), 1)


@triton.jit
def without(keys, key):
    return tl.where(keys == key[None, :, None], -2147483648, keys)


@triton.jit
def expert_of(key, E, EP: tl.constexpr):
    """The expert of a key [WARPS] as one number; NaNs among the logits lead to some expert, never to none."""
    return tl.minimum(EP - 1 - (tl.max(key, 0) & (EP - 1)), E - 1)


@triton.jit
def choose_one(logits, pick, E, EP: tl.constexpr, WARPS: tl.constexpr):
    """The expert with the pick-th largest logit, from 0."""
    keys = load_keys(logits, E, EP, WARPS)
    key = largest(keys)
    for _ in range(pick):
        keys = without(keys, key)
        key = largest(keys)
    return expert_of(key, E, EP)


@triton.jit
def choose_all(
    logits, E, EP: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, SHARED: tl.constexpr,
    GATED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Two tuples of TOP_K (and one, with a shared expert) numbers: experts and their weights."""
    keys = load_keys(logits, E, EP, WARPS)
    experts = tl.tuple(())
    for i in tl.static_range(TOP_K):
        key = largest(keys)
        experts += (expert_of(key, E, EP),)
        if i + 1 < TOP_K:
            keys = without(keys, key)
    values = tl.tuple(())
    for i in tl.static_range(TOP_K):
        values += (load_fresh(logits + experts[i], experts[i] >= 0),)
    if NORMALIZE:
        total = 0.0
        for i in tl.static_range(TOP_K):
            total += tl.exp(values[i] - values[0])
    else:
        e = tl.arange(0, EP)
        total = tl.sum(tl.exp(load_fresh(logits + e, e < E) - values[0]), 0)
    weights = tl.tuple(())
    for i in tl.static_range(TOP_K):
        weights += (tl.exp(values[i] - values[0]) / total,)
    if SHARED:
        experts += (E,)
        if GATED:
            weights += (tl.sigmoid(tl.maximum(load_fresh(logits + E, E >= 0), -80.0)),)
        else:
            weights += (1.0,)
    return experts, weights


@triton.jit
def _router_kernel(
    h, norm, eps, router, gate, logits, x_words, x_scales, M, E, K: tl.constexpr,
    BN: tl.constexpr, NG: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits [M, E + 1], the shared gate's last. The last program of a row has that one and quantizes the row."""
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
        squares = (v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3) + (v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7)
        total = (v0 * w0 + v1 * w1 + v2 * w2 + v3 * w3) + (v4 * w4 + v5 * w5 + v6 * w6 + v7 * w7)
        root = tl.rsqrt(tl.sum(tl.sum(squares, 3), 2) / K + eps)
        flat_n = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
        y = tl.sum(tl.sum(total, 3), 2) * root
        tl.store(logits + flat * (E + 1) + flat_n, y, mask=(flat < M) & (flat_n < E))
    else:
        if GATED:
            u0, u1, u2, u3 = load_floats(gate + column, g < KG)
            u4, u5, u6, u7 = load_floats(gate + column + 16, g < KG)
        wait(PDL)
        v0, v1, v2, v3 = load_floats(h + row * K + column, inside)
        v4, v5, v6, v7 = load_floats(h + row * K + column + 16, inside)
        squares = (v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3) + (v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7)
        v0, v1, v2, v3 = v0 * p0, v1 * p1, v2 * p2, v3 * p3
        v4, v5, v6, v7 = v4 * p4, v5 * p5, v6 * p6, v7 * p7
        root = tl.rsqrt(tl.sum(tl.sum(squares, 3), 2) / K + eps)
        low = tl.maximum(tl.maximum(tl.abs(v0), tl.abs(v1)), tl.maximum(tl.abs(v2), tl.abs(v3)))
        upp = tl.maximum(tl.maximum(tl.abs(v4), tl.abs(v5)), tl.maximum(tl.abs(v6), tl.abs(v7)))
        at = row * (KG * 8) + g * 8 + j
        factor = root[:, :, None, None] * (1.0 / 127.0)
        tl.store(x_words + at, quantize_quad(v0, v1, v2, v3, 127.0 / tl.maximum(low, 1e-30)), mask=inside)
        tl.store(x_words + at + 4, quantize_quad(v4, v5, v6, v7, 127.0 / tl.maximum(upp, 1e-30)), mask=inside)
        tl.store(x_scales + at, low * factor, mask=inside)
        tl.store(x_scales + at + 4, upp * factor, mask=inside)
        if GATED:
            gated = (v0 * u0 + v1 * u1 + v2 * u2 + v3 * u3) + (v4 * u4 + v5 * u5 + v6 * u6 + v7 * u7)
            tl.store(logits + flat * (E + 1) + E, tl.sum(tl.sum(gated, 3), 2) * root, mask=flat < M)


@triton.jit
def _choose_kernel(
    logits, ids, weights, E, EP: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, SHARED: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts int32 and weights float32 [M, TOP_K + SHARED] of logits [M, E + 1]. One warp a token."""
    trigger(PDL)
    wait(PDL)
    token = tl.program_id(0)
    experts, found = choose_all(logits + token * (E + 1), E, EP, TOP_K, NORMALIZE, SHARED, GATED, 1)
    for i in tl.static_range(TOP_K + SHARED):
        tl.store(ids + token * (TOP_K + SHARED) + i, experts[i])
        tl.store(weights + token * (TOP_K + SHARED) + i, found[i])


@triton.jit
def _sort_kernel(
    ids, order, blocks, M, E, NUM_BLOCKS, EP: tl.constexpr, TOP_K: tl.constexpr, PICKS: tl.constexpr,
    TOKENS: tl.constexpr, MAX_BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Lists of the routed picks by expert, in one program: a thread has an expert and looks at all picks.

    ids: [M, PICKS]. order [M * TOP_K]: rows of ids (token * PICKS + number), sorted by expert. blocks [NUM_BLOCKS, 4]:
    expert, first and stop in order, of at most TOKENS picks; first = stop = 0 in those that are not in use.
    """
    trigger(PDL)
    wait(PDL)
    e = tl.arange(0, EP)
    count = tl.zeros((EP,), tl.int32)
    for token in range(M):
        for i in tl.static_range(TOP_K):
            count += (tl.load(ids + token * PICKS + i) == e).to(tl.int32)
    start = tl.cumsum(count, 0) - count
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
    for token in range(M):
        for i in tl.static_range(TOP_K):
            mine = tl.load(ids + token * PICKS + i) == e
            tl.store(order + start, token * PICKS + i, mask=mine)
            start += mine.to(tl.int32)
