"""What the kernels share: the values that a row's settings make of its logits, and the noise of each token.

All of it is inlined into the kernels of ``chunks``, ``filters`` and ``finish``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.sample import buffers as columns

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
