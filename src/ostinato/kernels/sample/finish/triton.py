"""The last kernel: per row the choice among chunks or candidates, its log-probs, and the step's bookkeeping."""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.sample.filters.triton import _choose_candidate, _mass, _search_row
from ostinato.kernels.sample.noisy_values.triton import (
    _BIG,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    MIN_P,
    NO_TOKEN,
    NUM_FLOATS,
    NUM_INTS,
    NUM_LOGPROBS,
    TOP_K,
    TOP_P,
    USE_COUNTS,
    _is_filtered,
    _row_of,
)
from ostinato.kernels.triton import trigger, wait


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
    # At once, and not one after the other: each load that waits for another costs half a microsecond.
    now = tl.load(step + row)
    is_active = tl.load(active + row)
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
    is_filtered = _is_filtered(row, V, floats, ints)
    wanted = tl.load(ints + row * NUM_INTS + NUM_LOGPROBS)
    uses_counts = tl.load(ints + row * NUM_INTS + USE_COUNTS)
    tl.store(step + row, now + 1)
    stamp = (now + 1).to(tl.int64) << 32
    entry = ring + ((now % RING).to(tl.int64) * S + row) * 2
    if is_active == 0:
        tl.store(sampled + row, -1)
        tl.store(entry, stamp | NO_TOKEN)
        tl.store(entry + 1, stamp)
        return

    largest_logit = tl.max(maxima, 0)
    normalizer = largest_logit + tl.log(tl.sum(sums * tl.exp(maxima - largest_logit), 0))
    if is_filtered:
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
    if wanted > 0:
        top_entry = top_ring + ((now % RING).to(tl.int64) * S + row) * MAX_LOGPROBS * 2
        _top_logprobs(logits, b, V, stats, normalizer, wanted, top_entry, stamp, NC, NCP, CHUNK)

    tl.store(next_tokens + row, token)
    tl.store(positions + row, position + 1)
    tl.store(counter + row, draws + 1)
    if uses_counts != 0:
        count_at = token_counts + row.to(tl.int64) * V + token
        tl.store(count_at, tl.load(count_at) + 1)
    tl.store(remaining + row, remaining_now)
    stopped = (remaining_now <= 0) | (tl.max((stops == token).to(tl.int32), 0) != 0)
    tl.store(active + row, tl.where(stopped, 0, 1))
