"""The first kernel: per row and chunk the best noisy value, the largest value and the sums of exponentials.

A row that filters also gets the largest values of parts of a chunk, and its count of candidates is cleared.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.sample.noisy_values.triton import (
    GREEDY_BELOW,
    NUM_FLOATS,
    TEMPERATURE,
    _gumbel,
    _is_filtered,
    _row_of,
    _values,
)
from ostinato.kernels.triton import trigger, wait


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
    # At once, and not one after the other: each load that waits for another costs half a microsecond.
    is_active = tl.load(active + row)
    tokens = c * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < V
    x = tl.load(logits + b.to(tl.int64) * V + tokens, mask=inside, other=float("-inf"))
    temperature = tl.load(floats + row * NUM_FLOATS + TEMPERATURE)
    key = tl.load(seed + row)
    draws = tl.load(counter + row)
    is_filtered = _is_filtered(row, V, floats, ints)
    if is_active == 0:
        return
    value = _values(x, tokens, inside, row, V, floats, ints, logit_bias, token_counts)
    noisy = value
    if temperature >= GREEDY_BELOW:
        noisy = value + _gumbel(key, draws, tokens)
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
    if is_filtered:
        largest = tl.max(value, 0)
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(stats + at + 1, largest)
        tl.store(stats + at + 2, tl.sum(tl.exp(value - safe), 0))
        part = tl.max(tl.reshape(value, (PARTS, CHUNK // PARTS)), 1)
        tl.store(parts + (b * NC + c) * PARTS + tl.arange(0, PARTS), part)
        if c == 0:
            tl.store(found + b, 0)
