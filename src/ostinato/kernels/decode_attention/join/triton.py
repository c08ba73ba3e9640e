"""The second kernel of decode attention: a row's partial results joined, gated and, if wanted, rounded to int8."""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.triton import trigger, wait

NO_SCORE = tl.constexpr(-1e30)  # finite, so that a tile without any position leaves no NaN


@triton.jit
def extent(
    position, FIRST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    WINDOW: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Of one row: the first position, the end of the cached ones, where tiles begin, and the number of partial results.

    PARTS > SPLITS: the new token makes one by itself.
    """
    stop = position if FUSED else position + 1  # the new key and value come from registers when fused
    start = 0
    if WINDOW > 0:
        start = tl.maximum(position - WINDOW + 1, 0)
    begin = start // BLOCK * BLOCK
    own = PARTS - SPLITS
    return start, stop, begin, tl.minimum(tl.maximum(tl.cdiv(stop - begin, FIRST), 1 - own), SPLITS) + own


@triton.jit
def sigmoid_at(gate, at, mask, GATED: tl.constexpr):
    """The sigmoid of what ``gate`` holds at the places ``at``; 1 where there is no gate."""
    if GATED:
        z = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        return tl.sigmoid(tl.maximum(z, -80.0))  # below that exp(-z) overflows
    else:
        return 1.0


@triton.jit
def _join_kernel(
    out,
    q,
    partial,
    stats,
    positions,
    scale_of_out,
    HQ: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    FUSED: tl.constexpr,
    PREFETCH: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Join COLUMNS columns of the partial results of one query head; one warp, or two where there are many.

    The gates stand in the last HQ heads of the WIDTH elements of a row of q. ROUNDED: to int8, with a scale for every
    32 columns; rows without a position get zeros.
    """
    trigger(PDL)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(2) * HQ + tl.program_id(1)
    if not PREFETCH:
        wait(PDL)
    position = tl.load(positions + tl.program_id(2))
    _, _, _, parts = extent(position, FIRST, BLOCK, SPLITS, PARTS, WINDOW, FUSED)
    if ROUNDED:
        parts = tl.where(position >= 0, parts, 0)
    OWN: tl.constexpr = PARTS > SPLITS
    if PREFETCH:
        wait(PDL)
    if ROUNDED or OWN or parts > 1:
        gate = sigmoid_at(
            q + (tl.program_id(2).to(tl.int64) + 1) * WIDTH - HQ * D, tl.program_id(1) * D + d, d < D, GATED
        )
        base = row.to(tl.int64) * PARTS
        if OWN:  # the new token's part stands behind those of all tiles
            there = parts > 0
            largest = tl.load(stats + 2 * base + SPLITS, mask=there, other=NO_SCORE)
            total = tl.full((), 1.0, tl.float32)
            acc = tl.load(partial + (base + SPLITS) * DP + d, mask=there & (d < D), other=0.0)
        else:
            largest = tl.full((), NO_SCORE, tl.float32)
            total = tl.zeros((), tl.float32)
            acc = tl.zeros((COLUMNS,), tl.float32)
        for begin in range(0, parts - OWN, CHUNK):
            s = begin + tl.arange(0, CHUNK)
            written = s < parts - OWN
            m = tl.load(stats + 2 * base + s, mask=written, other=NO_SCORE)
            l = tl.load(stats + 2 * base + PARTS + s, mask=written, other=0.0)
            inside = written[:, None] & (d < D)[None, :]  # what pads a head to a power of two, nobody wrote
            part = tl.load(partial + (base + s)[:, None] * DP + d[None, :], mask=inside, other=0.0)
            new = tl.maximum(largest, tl.max(m, 0))
            old = tl.exp2(largest - new)
            weight = tl.exp2(m - new)
            total = total * old + tl.sum(l * weight, 0)
            acc = acc * old + tl.sum(part * weight[:, None], 0)
            largest = new
        if ROUNDED:
            total = tl.where(parts > 0, total, 1.0)
        joined = acc / total * gate
        if ROUNDED:
            groups = tl.reshape(tl.where((d < D) & (parts > 0), joined, 0.0), (COLUMNS // 32, 32))
            largest = tl.max(tl.abs(groups), 1)
            # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
            whole = (groups * (127.0 / tl.maximum(largest, 1e-30))[:, None] + 12582912.0).to(tl.int32, bitcast=True)
            group = tl.program_id(0) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
            column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
            tl.store(out + row.to(tl.int64) * D + column, ((whole << 24) >> 24).to(tl.int8), mask=column < D)
            tl.store(scale_of_out + row * (D // 32) + group, largest * (1.0 / 127.0), mask=group < D // 32)
        else:
            tl.store(out + row.to(tl.int64) * D + d, joined, mask=d < D)
