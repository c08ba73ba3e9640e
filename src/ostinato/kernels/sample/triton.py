"""The sampler in three kernels: statistics of chunks of the vocabulary, candidates of filtered rows, and the choice.

1. ``_chunk_kernel``: per row and chunk the best noisy value, the largest value and the sums of exponentials.
2. ``_collect_kernel``: for rows with top-k, top-p or min-p, the tokens that can pass, by bounds from the chunks.
3. ``_finish_kernel``: per row the choice among chunks or candidates, and the step's bookkeeping.

Sums that decide what top-p keeps are taken in fixed point, so no order of arrival changes a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.launch import launch_options
from ostinato.kernels.sample import buffers as columns
from ostinato.kernels.sample.buffers import SampleBuffers
from ostinato.kernels.triton import trigger, wait

CAPACITY = 4096  # candidates of a row; a row with more is searched in full
SMALL = 512  # candidates that a short search takes
_STATS = 6  # best noisy value, largest value, its sum; largest logit, its sum; logit of the best

TEMPERATURE = tl.constexpr(columns.TEMPERATURE)
TOP_P = tl.constexpr(columns.TOP_P)
MIN_P = tl.constexpr(columns.MIN_P)
REPETITION = tl.constexpr(columns.REPETITION)
PRESENCE = tl.constexpr(columns.PRESENCE)
FREQUENCY = tl.constexpr(columns.FREQUENCY)
NUM_FLOATS = tl.constexpr(columns.NUM_FLOATS)
TOP_K = tl.constexpr(columns.TOP_K)
USE_COUNTS = tl.constexpr(columns.USE_COUNTS)
USE_BIAS = tl.constexpr(columns.USE_BIAS)
NUM_LOGPROBS = tl.constexpr(columns.NUM_LOGPROBS)
NUM_INTS = tl.constexpr(columns.NUM_INTS)
GREEDY_BELOW = tl.constexpr(columns.GREEDY_BELOW)
COUNT_MASK = tl.constexpr(columns.COUNT_MASK)
NO_TOKEN = tl.constexpr(columns.NO_TOKEN)
MAX_STOP_IDS = tl.constexpr(columns.MAX_STOP_IDS)
MAX_LOGPROBS = tl.constexpr(columns.MAX_LOGPROBS)
_BIG = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _log(x):
    """log of positive, normal float32 to one or two units in the last place, near 1 too, where lg2.approx is not.

    Cephes' logf: x = 2^e * m with m in [sqrt(1/2), sqrt(2)), a polynomial in m - 1.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 255) - 126
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # [1/2, 1)
    low = m < 0.70710678118654752
    e = tl.where(low, exponent - 1, exponent).to(tl.float32)
    f = tl.where(low, m + m, m) - 1.0
    z = f * f
    y = 7.0376836292e-2 * f - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    y = y * f * z + e * -2.12194440e-4 - 0.5 * z
    return f + y + e * 0.693359375


@triton.jit
def _gumbel(seed, draw, tokens):
    """Noise of ``tokens`` as in noise.py."""
    zero = tl.zeros_like(tokens)
    word, _, _, _ = tl.philox(seed, tokens, zero + draw, zero, zero)
    w = ((word.to(tl.uint32, bitcast=True) >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-7
    return -_log(-_log(1.0 - w))


@triton.jit
def _values(x, tokens, inside, row, V, floats, ints, logit_bias, token_counts):
    """Logits x after bias, penalties and temperature; the logits themselves where the row is greedy."""
    if tl.load(ints + row * NUM_INTS + USE_BIAS) != 0:
        x += tl.load(logit_bias + row.to(tl.int64) * V + tokens, mask=inside, other=0.0)
    if tl.load(ints + row * NUM_INTS + USE_COUNTS) != 0:
        count = tl.load(token_counts + row.to(tl.int64) * V + tokens, mask=inside, other=0)
        repetition = tl.load(floats + row * NUM_FLOATS + REPETITION)
        generated = (count & COUNT_MASK).to(tl.float32)
        x = tl.where(count != 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x -= tl.load(floats + row * NUM_FLOATS + FREQUENCY) * generated
        x -= tl.load(floats + row * NUM_FLOATS + PRESENCE) * (generated > 0).to(tl.float32)
    temperature = tl.load(floats + row * NUM_FLOATS + TEMPERATURE)
    return x / tl.where(temperature < GREEDY_BELOW, 1.0, temperature)


@triton.jit
def _is_filtered(row, V, floats, ints):
    top_k = tl.load(ints + row * NUM_INTS + TOP_K)
    some = (top_k > 0) & (top_k < V)
    some = some | (tl.load(floats + row * NUM_FLOATS + TOP_P) < 1.0)
    some = some | (tl.load(floats + row * NUM_FLOATS + MIN_P) > 0.0)
    return some & (tl.load(floats + row * NUM_FLOATS + TEMPERATURE) >= GREEDY_BELOW)


@triton.jit
def _row_of(rows, b, ROWS: tl.constexpr):
    row = b
    if ROWS:
        row = tl.load(rows + b)
    return row


@triton.jit
def _chunk_kernel(
    logits,
    rows,
    floats,
    ints,
    seed,
    logit_bias,
    token_counts,
    counter,
    active,
    best,
    stats,
    parts,
    found,
    V,
    NC,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    trigger(PDL)
    c = tl.program_id(0)
    b = tl.program_id(1)
    row = _row_of(rows, b, ROWS)
    wait(PDL)
    if tl.load(active + row) == 0:
        return
    tokens = c * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < V
    x = tl.load(logits + b.to(tl.int64) * V + tokens, mask=inside, other=float("-inf"))
    value = _values(x, tokens, inside, row, V, floats, ints, logit_bias, token_counts)
    noisy = value
    if tl.load(floats + row * NUM_FLOATS + TEMPERATURE) >= GREEDY_BELOW:
        noisy = value + _gumbel(tl.load(seed + row), tl.load(counter + row), tokens)
    top, place = tl.max(noisy, 0, return_indices=True, return_indices_tie_break_left=True)
    largest_logit = tl.max(x, 0)
    safe = tl.where(largest_logit == float("-inf"), 0.0, largest_logit)  # -inf - -inf is no number
    total = tl.sum(tl.exp(x - safe), 0)
    at = b * NC + c
    tl.store(best + at, c * CHUNK + place)
    at *= 6
    tl.store(stats + at, top)
    tl.store(stats + at + 3, largest_logit)
    tl.store(stats + at + 4, total)
    tl.store(stats + at + 5, tl.sum(tl.where(tl.arange(0, CHUNK) == place, x, 0.0), 0))
    if _is_filtered(row, V, floats, ints):
        largest = tl.max(value, 0)
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(stats + at + 1, largest)
        tl.store(stats + at + 2, tl.sum(tl.exp(value - safe), 0))
        part = tl.max(tl.reshape(value, (PARTS, CHUNK // PARTS)), 1)
        tl.store(parts + (b * NC + c) * PARTS + tl.arange(0, PARTS), part)
        if c == 0:
            tl.store(found + b, 0)


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


@triton.jit
def _bits(value):
    """The bits of a float32 as the lower half of an int64."""
    return value.to(tl.int32, bitcast=True).to(tl.int64) & NO_TOKEN


@triton.jit
def _top_logprobs(logits, b, V, stats, normalizer, wanted, entry, stamp, NC, NCP: tl.constexpr, CHUNK: tl.constexpr):
    """The ``wanted`` largest logits in order, ties by index: each time from the chunk that holds the largest left."""
    c = tl.arange(0, NCP)
    left = tl.load(stats + (b * NC + c) * 6 + 3, mask=c < NC, other=float("-inf"))
    last_value = float("inf")
    last_token = -1
    for i in range(wanted):
        value, chunk = tl.max(left, 0, return_indices=True, return_indices_tie_break_left=True)
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + b.to(tl.int64) * V + tokens, mask=tokens < V, other=float("-inf"))
        fresh = (x < last_value) | ((x == last_value) & (tokens > last_token))
        token = tl.min(tl.where(fresh & (x == value), tokens, _BIG), 0)
        tl.store(entry + 2 * i, stamp | token.to(tl.int64))
        tl.store(entry + 2 * i + 1, stamp | _bits(value - normalizer))
        later = (x < value) | ((x == value) & (tokens > token))
        left = tl.where(c == chunk, tl.max(tl.where(later, x, float("-inf")), 0), left)
        last_value = value
        last_token = token


@triton.jit
def _finish_kernel(
    logits,
    rows,
    floats,
    ints,
    seed,
    stop_ids,
    logit_bias,
    counter,
    token_counts,
    next_tokens,
    positions,
    remaining,
    active,
    step,
    sampled,
    logprob,
    ring,
    top_ring,
    best,
    stats,
    found,
    candidates,
    candidate_values,
    V,
    NC,
    S,
    RING: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NCP: tl.constexpr,
    SMALL: tl.constexpr,
    CAPACITY: tl.constexpr,
    SEARCH: tl.constexpr,
    PDL: tl.constexpr,
):
    trigger(PDL)
    b = tl.program_id(0)
    row = _row_of(rows, b, ROWS)
    wait(PDL)
    now = tl.load(step + row)
    is_active = tl.load(active + row)
    tl.store(step + row, now + 1)
    stamp = (now + 1).to(tl.int64) << 32
    entry = ring + ((now % RING).to(tl.int64) * S + row) * 2
    if is_active == 0:
        tl.store(sampled + row, -1)
        tl.store(entry, stamp | NO_TOKEN)
        tl.store(entry + 1, stamp)
        return

    c = tl.arange(0, NCP)
    at = stats + (b * NC + c) * 6
    noisy = tl.load(at, mask=c < NC, other=float("-inf"))
    places = tl.load(best + b * NC + c, mask=c < NC, other=0)
    maxima = tl.load(at + 3, mask=c < NC, other=float("-inf"))
    sums = tl.load(at + 4, mask=c < NC, other=0.0)
    of_best = tl.load(at + 5, mask=c < NC, other=0.0)
    remaining_now = tl.load(remaining + row) - 1
    stops = tl.load(stop_ids + row * MAX_STOP_IDS + tl.arange(0, MAX_STOP_IDS))
    position = tl.load(positions + row)
    draws = tl.load(counter + row)
    largest_logit = tl.max(maxima, 0)
    normalizer = largest_logit + tl.log(tl.sum(sums * tl.exp(maxima - largest_logit), 0))
    if _is_filtered(row, V, floats, ints):
        top_k = tl.load(ints + row * NUM_INTS + TOP_K)
        top_p = tl.load(floats + row * NUM_FLOATS + TOP_P)
        min_p = tl.load(floats + row * NUM_FLOATS + MIN_P)
        _maxima, largest, total = _mass(stats, b, NC, 1, NCP)
        count = tl.load(found + b)
        mine = candidates + b.to(tl.int64) * CAPACITY
        values = candidate_values + b.to(tl.int64) * CAPACITY
        key = tl.load(seed + row)
        if count <= SMALL:
            token = _choose_candidate(mine, values, count, key, draws, largest, total, top_k, top_p, min_p, V, SMALL)
        elif count <= CAPACITY:
            token = _choose_candidate(mine, values, count, key, draws, largest, total, top_k, top_p, min_p, V, CAPACITY)
        else:
            token = _search_row(
                logits, b, row, V, floats, ints, seed, logit_bias, token_counts, counter, largest, total, top_k,
                top_p, min_p, SEARCH,
            )  # fmt: skip
        chosen = tl.load(logits + b.to(tl.int64) * V + token)
    else:
        _noisy, chunk = tl.max(noisy, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.sum(tl.where(c == chunk, places, 0), 0)
        chosen = tl.sum(tl.where(c == chunk, of_best, 0.0), 0)
    value = chosen - normalizer
    tl.store(entry, stamp | token.to(tl.int64))
    tl.store(entry + 1, stamp | _bits(value))
    tl.store(sampled + row, token)
    tl.store(logprob + row, value)
    wanted = tl.load(ints + row * NUM_INTS + NUM_LOGPROBS)
    if wanted > 0:
        top_entry = top_ring + ((now % RING).to(tl.int64) * S + row) * MAX_LOGPROBS * 2
        _top_logprobs(logits, b, V, stats, normalizer, wanted, top_entry, stamp, NC, NCP, CHUNK)

    tl.store(next_tokens + row, token)
    tl.store(positions + row, position + 1)
    tl.store(counter + row, draws + 1)
    if tl.load(ints + row * NUM_INTS + USE_COUNTS) != 0:
        count_at = token_counts + row.to(tl.int64) * V + token
        tl.store(count_at, tl.load(count_at) + 1)
    tl.store(remaining + row, remaining_now)
    stopped = (remaining_now <= 0) | (tl.max((stops == token).to(tl.int32), 0) != 0)
    tl.store(active + row, tl.where(stopped, 0, 1))


def sample_step(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    *tensors: torch.Tensor,
    chunk: int | None = None,
    capacity: int = CAPACITY,
    small: int = SMALL,
) -> None:
    """Launch the three kernels; arguments as for ``ostinato.kernels.sample.sample_step``, tensors those of buffers."""
    s = SampleBuffers(*tensors)
    batch, vocab = logits.shape
    if chunk is None:
        chunk = 512 if vocab <= 65536 and batch < 8 else 1024
    chunks = triton.cdiv(vocab, chunk)
    padded = triton.next_power_of_2(chunks)
    parts_per_chunk = 16  # whose largest values give the bound of a k larger than the number of chunks
    while parts_per_chunk * chunks < 1024 and parts_per_chunk < chunk // 16:
        parts_per_chunk *= 2

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    best = scratch(batch, chunks)
    stats = scratch(batch, chunks, _STATS, dtype=torch.float32)
    parts = scratch(batch, chunks * parts_per_chunk, dtype=torch.float32)
    found = scratch(batch)
    candidates = scratch(batch, capacity)
    candidate_values = scratch(batch, capacity, dtype=torch.float32)
    by_row = {"ROWS": rows is not None, "CHUNK": chunk, **launch_options(logits.device)}
    rows = s.tokens if rows is None else rows  # not read where ROWS is off
    _chunk_kernel[(chunks, batch)](
        logits, rows, s.floats, s.ints, s.seed, s.logit_bias, s.token_counts, s.counter, s.active,
        best, stats, parts, found, vocab, chunks, PARTS=parts_per_chunk, num_warps=4, **by_row,
    )  # fmt: skip
    _collect_kernel[(chunks, batch)](
        logits, rows, s.floats, s.ints, s.logit_bias, s.token_counts, s.active, stats, parts, found, candidates,
        candidate_values, vocab, chunks, PARTS=parts_per_chunk, NCP=padded, CAPACITY=capacity, num_warps=4, **by_row,
    )  # fmt: skip
    _finish_kernel[(batch,)](
        logits, rows, s.floats, s.ints, s.seed, s.stop_ids, s.logit_bias, s.counter, s.token_counts, s.tokens,
        s.positions, s.remaining, s.active, s.step, s.sampled, s.logprob, s.ring, s.top_ring,
        best, stats, found, candidates, candidate_values, vocab, chunks, s.max_batch, RING=s.ring.shape[0], NCP=padded,
        SMALL=small, CAPACITY=capacity, SEARCH=2048, num_warps=8, **by_row,
    )  # fmt: skip
