"""Top-k, top-p and min-p: the kernel that collects the tokens that can pass, and the choice among those that do.

``_choose_candidate`` and ``_search_row`` are inlined into the kernel of ``finish``.

Sums that decide what top-p keeps are taken in fixed point, so no order of arrival changes a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.sample.noisy_values.triton import (
    _BIG,
    MIN_P,
    NUM_FLOATS,
    NUM_INTS,
    TOP_K,
    TOP_P,
    _gumbel,
    _is_filtered,
    _row_of,
    _values,
)
from ostinato.kernels.triton import trigger, wait


@triton.jit
def _mass(stats, b, NC, COLUMN: tl.constexpr, NCP: tl.constexpr):
    """Over the chunks of a row, from columns COLUMN and COLUMN + 1: the maxima, the maximum, the sum relative to it."""
    c = tl.arange(0, NCP)
    at = stats + (b * NC + c) * 6 + COLUMN
    maxima = tl.load(at, mask=c < NC, other=float("-inf"))
    sums = tl.load(at + 1, mask=c < NC, other=0.0)
    largest = tl.max(maxima, 0)
    return maxima, largest, tl.sum(sums * tl.exp(maxima - largest), 0)


@triton.jit
def _key(value):
    """int32 in the order of the float32 values."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 value of an int64 key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(value, largest):
    """exp(value - largest) in units of 2^-36."""
    return (tl.exp(value - largest) * 68719476736.0).to(tl.int64)


@triton.jit
def _target(mass, top_p):
    return (mass.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)


@triton.jit
def _select(keys, weights, target, low, high, SHIFT: tl.constexpr):
    """The largest key t for which (sum(weights[keys >= t]) >> SHIFT) >= target; low if there is none.

    int64 all; low ≤ answer < high. The lower 14 bits of a weight count tokens: once a single token lies between the
    bounds, the set is known. The middle is now that of the values, which ends soon, now that of the keys, which ends.
    """
    above = tl.zeros((), tl.int64)
    count = tl.sum(weights, 0) & 16383
    by_value = high > low
    while (high - low > 1) & (count - above > 1):
        middle = low + (high - low) // 2
        guess = _key(0.5 * _value(low) + 0.5 * _value(high)).to(tl.int64)
        middle = tl.where(by_value, tl.minimum(tl.maximum(guess, low + 1), high - 1), middle)
        by_value = not by_value
        here = tl.sum(tl.where(keys >= middle, weights, 0), 0)
        reached = (here >> SHIFT) >= target
        low = tl.where(reached, middle, low)
        count = tl.where(reached, here & 16383, count)
        high = tl.where(reached, high, middle)
        above = tl.where(reached, above, here & 16383)
    return low


@triton.jit
def _collect_kernel(
    logits,
    rows,
    floats,
    ints,
    logit_bias,
    token_counts,
    active,
    stats,
    parts,
    found,
    candidates,
    candidate_values,
    V,
    NC,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    NCP: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    trigger(PDL)
    c = tl.program_id(0)
    b = tl.program_id(1)
    row = _row_of(rows, b, ROWS)
    wait(PDL)
    if (tl.load(active + row) == 0) | (not _is_filtered(row, V, floats, ints)):
        return
    top_k = tl.load(ints + row * NUM_INTS + TOP_K)
    top_p = tl.load(floats + row * NUM_FLOATS + TOP_P)
    min_p = tl.load(floats + row * NUM_FLOATS + MIN_P)
    maxima, largest, total = _mass(stats, b, NC, 1, NCP)
    bound = float("-inf")
    limits_k = (top_k > 0) & (top_k < V)
    inside = tl.arange(0, NCP) < NC
    keys = tl.where(inside, _key(maxima), -2147483647 - 1).to(tl.int64)
    low = tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0)
    high = _key(largest).to(tl.int64) + 1
    # k chunks or parts of them have a value at least this large, so the k-th largest value is no smaller.
    if limits_k & (top_k <= NC):
        bound = _value(_select(keys, inside.to(tl.int64), top_k.to(tl.int64), low, high, 0))
    elif limits_k & (top_k <= NC * PARTS):
        i = tl.arange(0, NCP * PARTS)
        values = tl.load(parts + b * (NC * PARTS) + i, mask=i < NC * PARTS, other=float("-inf"))
        part_keys = tl.where(i < NC * PARTS, _key(values), -2147483647 - 1).to(tl.int64)
        low = tl.min(tl.where(i < NC * PARTS, part_keys, 0x7FFFFFFF), 0)
        bound = _value(_select(part_keys, (i < NC * PARTS).to(tl.int64), top_k.to(tl.int64), low, high, 0))
    if (top_p < 1.0) & (not limits_k):
        # Where the chunks' largest values alone reach p, the set ends no lower. (With top-k on, its whole set must
        # stay: p is a share of that set.) All tokens under the second bound's share together weigh less than 1 - p.
        weights = tl.where(inside, (_weight(maxima, largest) << 14) | 1, 0)
        target = _target((total.to(tl.float64) * 68719476736.0).to(tl.int64), top_p * 1.0001)
        if tl.sum(weights >> 14, 0) >= target:
            bound = _value(_select(keys, weights, target, low, high, 14))
        bound = tl.maximum(bound, largest + tl.log(tl.maximum(total * (1.0 - top_p) / V, 1e-37)) - 0.01)
    if (min_p > 0.0) & ((not limits_k) | (top_p >= 1.0)):
        bound = tl.maximum(bound, largest + tl.log(min_p) - 0.01)
    if tl.max(tl.where(tl.arange(0, NCP) == c, maxima, float("-inf")), 0) < bound:
        return
    tokens = c * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < V
    x = tl.load(logits + b.to(tl.int64) * V + tokens, mask=inside, other=float("-inf"))
    value = _values(x, tokens, inside, row, V, floats, ints, logit_bias, token_counts)
    keep = inside & (value >= bound)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    first = tl.atomic_add(found + b, tl.sum(keep.to(tl.int32), 0), sem="relaxed")
    place += first
    keep = keep & (place < CAPACITY)
    at = b.to(tl.int64) * CAPACITY + place
    tl.store(candidates + at, tokens, mask=keep)
    tl.store(candidate_values + at, value, mask=keep)


@triton.jit
def _choose_candidate(
    candidates, candidate_values, count, seed, draw, largest, total, top_k, top_p, min_p, V, SIZE: tl.constexpr
):
    """The token of the largest noisy value among what the filters keep of ``count`` ≤ SIZE candidates."""
    i = tl.arange(0, SIZE)
    inside = i < count
    value = tl.load(candidate_values + i, mask=inside, other=float("-inf"))
    tokens = tl.load(candidates + i, mask=inside, other=0)
    noisy = value + _gumbel(seed, draw, tokens)
    keys = tl.where(inside, _key(value), -2147483647 - 1).to(tl.int64)
    low = tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0)
    high = tl.max(keys, 0) + 1
    limits_k = (top_k > 0) & (top_k < V)
    if limits_k:
        low = _select(keys, inside.to(tl.int64), top_k.to(tl.int64), low, high, 0)
    if top_p < 1.0:
        weights = tl.where(inside & (keys >= low), _weight(value, largest), 0)
        mass = (total.to(tl.float64) * 68719476736.0).to(tl.int64)
        if limits_k:
            mass = tl.sum(weights, 0)
        packed = tl.where(inside & (keys >= low), (weights << 14) | 1, 0)
        low = _select(keys, packed, _target(mass, top_p), low, high, 14)
    keep = inside & (keys >= low)
    if min_p > 0.0:
        keep = keep & (value >= largest + tl.log(min_p))
    top = tl.max(tl.where(keep, noisy, float("-inf")), 0)
    return tl.min(tl.where(keep & (noisy == top), tokens, _BIG), 0)


@triton.jit
def _row_sum(
    logits, b, row, V, floats, ints, logit_bias, token_counts, largest, least, threshold, MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Over a whole row: the mass (MASS) or number of the tokens whose keys reach ``threshold`` and ``least``."""
    acc = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, V, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        inside = tokens < V
        x = tl.load(logits + b.to(tl.int64) * V + tokens, mask=inside, other=float("-inf"))
        value = _values(x, tokens, inside, row, V, floats, ints, logit_bias, token_counts)
        keys = _key(value).to(tl.int64)
        keep = inside & (keys >= threshold) & (keys >= least)
        if MASS:
            acc += tl.where(keep, _weight(value, largest), 0)
        else:
            acc += keep.to(tl.int64)
    return tl.sum(acc, 0)


@triton.jit
def _search_row(
    logits, b, row, V, floats, ints, seed, logit_bias, token_counts, counter, largest, total, top_k, top_p, min_p,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``_choose_candidate`` over a whole row in memory: slow, for rows with more candidates than scratch holds."""
    low = tl.full((), -2147483648, tl.int64)
    high = _key(largest).to(tl.int64) + 1
    if (top_k > 0) & (top_k < V):
        end = high
        while end - low > 1:
            middle = low + (end - low) // 2
            reached = _row_sum(
                logits, b, row, V, floats, ints, logit_bias, token_counts, largest, low, middle, False, BLOCK
            )
            low = tl.where(reached >= top_k, middle, low)
            end = tl.where(reached >= top_k, end, middle)
    if top_p < 1.0:
        mass = (total.to(tl.float64) * 68719476736.0).to(tl.int64)
        if (top_k > 0) & (top_k < V):
            mass = _row_sum(logits, b, row, V, floats, ints, logit_bias, token_counts, largest, low, low, True, BLOCK)
        target = _target(mass, top_p)
        end = high
        while end - low > 1:
            middle = low + (end - low) // 2
            reached = _row_sum(
                logits, b, row, V, floats, ints, logit_bias, token_counts, largest, low, middle, True, BLOCK
            )
            low = tl.where(reached >= target, middle, low)
            end = tl.where(reached >= target, end, middle)
    top = float("-inf")
    token = 0
    for first in range(0, V, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        inside = tokens < V
        x = tl.load(logits + b.to(tl.int64) * V + tokens, mask=inside, other=float("-inf"))
        value = _values(x, tokens, inside, row, V, floats, ints, logit_bias, token_counts)
        keep = inside & (_key(value).to(tl.int64) >= low)
        if min_p > 0.0:
            keep = keep & (value >= largest + tl.log(min_p))
        noisy = tl.where(keep, value + _gumbel(tl.load(seed + row), tl.load(counter + row), tokens), float("-inf"))
        here, place = tl.max(noisy, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.where(here > top, first + place, token)
        top = tl.maximum(top, here)
    return token
