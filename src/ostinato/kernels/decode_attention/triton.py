"""Decode attention: each program attends one kv head's queries to every SPLITS-th tile of positions.

A program that alone covers its row writes the result; else partial results go to scratch, and either the last program
to arrive joins them (counters) or a second kernel does. Programs beyond the row's real length leave at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.launch import launch_options, num_multiprocessors
from ostinato.kernels.rope.triton import rotation
from ostinato.kernels.triton import trigger, wait

LOG2_E = 1.4426950408889634
_NO_SCORE = tl.constexpr(-1e30)  # finite, so that a tile without any position leaves no NaN


@triton.jit
def _extent(position, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, FUSED: tl.constexpr):
    """Of one row: the first position, the end of the cached ones, the first tile, and how many programs have work."""
    stop = position if FUSED else position + 1  # the new key and value come from registers when fused
    start = 0
    if WINDOW > 0:
        start = tl.maximum(position - WINDOW + 1, 0)
    first = start // BLOCK
    tiles = tl.maximum(tl.cdiv(stop, BLOCK) - first, 0)
    return start, stop, first, tiles, tl.minimum(tl.maximum(tiles, 1), SPLITS)


@triton.jit
def _tile_rows(row_pages, head, first, stop, HKV: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """int64 rows of a cache [pages, HKV, PAGE] for positions first … first + BLOCK - 1; BLOCK divides first."""
    n = first + tl.arange(0, BLOCK)
    if PAGE % BLOCK == 0:
        page = tl.load(row_pages + first // PAGE).to(tl.int64)
        return (page * HKV + head) * PAGE + (first % PAGE + tl.arange(0, BLOCK))
    else:  # noqa: RET505 (a branch not taken must not be compiled)
        page = tl.load(row_pages + n // PAGE, mask=n < stop, other=0).to(tl.int64)
        return (page * HKV + head) * PAGE + n % PAGE


@triton.jit
def _capped(scores, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2, after the cap where there is one; they come in natural units then."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0)) * 1.4426950408889634
    return scores


@triton.jit
def _head_vector(source, norm, eps, d, partner, cosine, sine, inside, D: tl.constexpr, NORM: tl.constexpr):
    """Heads at ``source`` [.., 1, 1] after norm and rotation, float32; d, partner, cosine, sine [1, 1, DP]."""
    x = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 2) / D + eps)[:, :, None]
        x *= inverse * tl.load(norm + d, mask=d < D, other=0.0)
        y *= inverse * tl.load(norm + partner, mask=d < D, other=0.0)
    return x * cosine + y * sine


@triton.jit
def _join(
    partial,
    stats,
    out,
    pair,
    active,
    target,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Join the partial results of one row and kv head; partial [.., SPLITS, GP, DP], stats [.., 2, SPLITS, GP]."""
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    largest = tl.full((GP,), _NO_SCORE, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP), tl.float32)
    base = pair.to(tl.int64) * SPLITS
    for first in range(0, active, CHUNK):
        s = first + tl.arange(0, CHUNK)
        at = stats + base * (2 * GP) + s[:, None] * GP + g[None, :]
        m = tl.load(at, mask=(s < active)[:, None], other=_NO_SCORE, cache_modifier=".cg")
        l = tl.load(at + SPLITS * GP, mask=(s < active)[:, None], other=0.0, cache_modifier=".cg")
        rows = (base + s)[:, None, None] * GP + g[None, :, None]
        part = tl.load(
            partial + rows * DP + d[None, None, :], mask=(s < active)[:, None, None], other=0.0, cache_modifier=".cg"
        )
        new = tl.maximum(largest, tl.max(m, 0))
        old = tl.exp2(largest - new)
        weight = tl.exp2(m - new[None, :])
        total = total * old + tl.sum(l * weight, 0)
        acc = acc * old[:, None] + tl.sum(part * weight[:, :, None], 0)
        largest = new
    inside = (g < G)[:, None] & (d < D)[None, :]
    tl.store(target + g[:, None] * D + d[None, :], acc / total[:, None], mask=inside)


@triton.jit
def _decode_kernel(
    q,
    out,
    partial,
    stats,
    counters,
    inv_freq,
    positions,
    slots,
    page_table,
    k_cache,
    v_cache,
    q_norm,
    k_norm,
    rope_scale,
    eps,
    scale,
    softcap,
    pages_per_slot,
    HKV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    FUSED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAST: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """q is qkv when FUSED. Products on the float units: [GP, BLOCK, DP] at a time, without a change of layout."""
    trigger(PDL)
    split = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    if not PREFETCH:
        wait(PDL)
    position = tl.load(positions + b)
    row_pages = page_table + tl.load(slots + b) * pages_per_slot
    start, stop, first, tiles, active = _extent(position, BLOCK, SPLITS, WINDOW, FUSED)
    if split >= active:
        return
    g = tl.arange(0, GP)[:, None, None]
    d = tl.arange(0, DP)[None, None, :]
    j = tl.arange(0, BLOCK)
    column = d < D
    n = (first + split) * BLOCK + j
    rows = _tile_rows(row_pages, head, (first + split) * BLOCK, stop, HKV, PAGE, BLOCK)[None, :, None] * D + d
    seen = ((n >= start) & (n < stop))[None, :, None] & column
    k = tl.load(k_cache + rows, mask=seen, other=0.0)
    v = tl.load(v_cache + rows, mask=seen, other=0.0)
    if FUSED:
        partner, cosine, sine = rotation(position, inv_freq, rope_scale, d, R)
    if PREFETCH:
        wait(PDL)

    inside = (g < G) & column
    if FUSED:
        heads = q + b.to(tl.int64) * ((G + 2) * HKV * D)
        queries = _head_vector(heads + (head * G + g) * D, q_norm, eps, d, partner, cosine, sine, inside, D, Q_NORM)
    else:
        queries = tl.load(q + ((b.to(tl.int64) * HKV + head) * G + g) * D + d, mask=inside, other=0.0).to(tl.float32)
    queries *= scale

    largest = tl.full((GP,), _NO_SCORE, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP), tl.float32)
    if FUSED:
        if split == 0:
            key = heads + ((G * HKV + head) * D + tl.zeros((1, 1, 1), tl.int32))
            new_k = _head_vector(key, k_norm, eps, d, partner, cosine, sine, column, D, K_NORM)
            new_v = tl.load(key + HKV * D + d, mask=column, other=0.0)
            page = tl.load(row_pages + position // PAGE).to(tl.int64)
            place = ((page * HKV + head) * PAGE + position % PAGE) * D + d
            new_k = new_k.to(k_cache.dtype.element_ty)
            new_v = new_v.to(v_cache.dtype.element_ty)
            tl.store(k_cache + place, new_k, mask=column)
            tl.store(v_cache + place, new_v, mask=column)
            score = _capped(tl.sum(queries * new_k.to(tl.float32), 2), softcap, SOFTCAP)  # [GP, 1]
            largest = tl.max(score, 1)
            total = tl.full((GP,), 1.0, tl.float32)
            acc += tl.sum(tl.broadcast_to(new_v.to(tl.float32), (GP, 1, DP)), 1)

    for t in range(split, tiles, SPLITS):
        n = (first + t) * BLOCK + j
        keep = (n >= start) & (n < stop)
        # The next tile is on its way while this one is worked on.
        ahead = n + SPLITS * BLOCK
        more = (ahead < stop) & (t + SPLITS < tiles)
        next_k = k
        next_v = v
        if t + SPLITS < tiles:
            tile = (first + t + SPLITS) * BLOCK
            rows = _tile_rows(row_pages, head, tile, stop, HKV, PAGE, BLOCK)[None, :, None] * D + d
            next_k = tl.load(k_cache + rows, mask=more[None, :, None] & column, other=0.0)
            next_v = tl.load(v_cache + rows, mask=more[None, :, None] & column, other=0.0)
        scores = _capped(tl.sum(queries * k.to(tl.float32), 2), softcap, SOFTCAP)  # [GP, BLOCK]
        scores = tl.where(keep[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        old = tl.exp2(largest - new)
        p = tl.exp2(scores - new[:, None])
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.sum(p[:, :, None] * v.to(tl.float32), 1)
        largest = new
        k = next_k
        v = next_v
    _finish(
        out, partial, stats, counters, largest, total, acc, b, head, split, active, HKV, G, GP, D, DP, SPLITS, CHUNK, LAST
    )


@triton.jit
def _finish(
    out,
    partial,
    stats,
    counters,
    largest,
    total,
    acc,
    b,
    head,
    split,
    active,
    HKV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST: tl.constexpr,
):
    """Write the result, or a partial one and, as the last to arrive, the joined result."""
    pair = b * HKV + head
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    target = out + pair.to(tl.int64) * (G * D)
    if active == 1:
        inside = (g < G)[:, None] & (d < D)[None, :]
        tl.store(target + g[:, None] * D + d[None, :], acc / total[:, None], mask=inside)
    else:
        at = pair.to(tl.int64) * SPLITS
        tl.store(partial + ((at + split) * GP + g[:, None]) * DP + d[None, :], acc)
        tl.store(stats + at * (2 * GP) + split * GP + g, largest)
        tl.store(stats + at * (2 * GP) + (SPLITS + split) * GP + g, total)
        if LAST:
            tl.debug_barrier()  # all of this program's stores come before its count
            arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel")
            if arrived == active - 1:
                tl.store(counters + pair, 0)
                _join(partial, stats, out, pair, active, target, G, GP, D, DP, SPLITS, CHUNK)


@triton.jit
def _decode_dot_kernel(
    q,
    out,
    partial,
    stats,
    counters,
    inv_freq,
    positions,
    slots,
    page_table,
    k_cache,
    v_cache,
    q_norm,
    k_norm,
    rope_scale,
    eps,
    scale,
    softcap,
    pages_per_slot,
    HKV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    FUSED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAST: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The same on the matrix units, GP ≥ 16: for long contexts, where the float units would not keep up."""
    trigger(PDL)
    split = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    if not PREFETCH:
        wait(PDL)
    position = tl.load(positions + b)
    row_pages = page_table + tl.load(slots + b) * pages_per_slot
    start, stop, first, tiles, active = _extent(position, BLOCK, SPLITS, WINDOW, FUSED)
    if split >= active:
        return
    g3 = tl.arange(0, GP)[:, None, None]
    d3 = tl.arange(0, DP)[None, None, :]
    if FUSED:
        partner, cosine, sine = rotation(position, inv_freq, rope_scale, d3, R)
    if PREFETCH:
        wait(PDL)
    inside = (g3 < G) & (d3 < D)
    if FUSED:
        heads = q + b.to(tl.int64) * ((G + 2) * HKV * D)
        queries = _head_vector(heads + (head * G + g3) * D, q_norm, eps, d3, partner, cosine, sine, inside, D, Q_NORM)
    else:
        queries = tl.load(q + ((b.to(tl.int64) * HKV + head) * G + g3) * D + d3, mask=inside, other=0.0).to(tl.float32)

    largest = tl.full((GP,), _NO_SCORE, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP), tl.float32)
    if FUSED:
        if split == 0:
            column = d3 < D
            key = heads + ((G * HKV + head) * D + tl.zeros((1, 1, 1), tl.int32))
            new_k = _head_vector(key, k_norm, eps, d3, partner, cosine, sine, column, D, K_NORM)
            new_v = tl.load(key + HKV * D + d3, mask=column, other=0.0)
            page = tl.load(row_pages + position // PAGE).to(tl.int64)
            place = ((page * HKV + head) * PAGE + position % PAGE) * D + d3
            new_k = new_k.to(k_cache.dtype.element_ty)
            new_v = new_v.to(v_cache.dtype.element_ty)
            tl.store(k_cache + place, new_k, mask=column)
            tl.store(v_cache + place, new_v, mask=column)
            score = _capped(tl.sum(queries * new_k.to(tl.float32), 2) * scale, softcap, SOFTCAP)
            largest = tl.max(score, 1)
            total = tl.full((GP,), 1.0, tl.float32)
            acc += tl.sum(tl.broadcast_to(new_v.to(tl.float32), (GP, 1, DP)), 1)

    operand = tl.reshape(queries, (GP, DP)).to(k_cache.dtype.element_ty)
    d = tl.arange(0, DP)[None, :]
    for t in range(split, tiles, SPLITS):
        n = (first + t) * BLOCK + tl.arange(0, BLOCK)
        keep = (n >= start) & (n < stop)
        rows = _tile_rows(row_pages, head, (first + t) * BLOCK, stop, HKV, PAGE, BLOCK)[:, None] * D + d
        k = tl.load(k_cache + rows, mask=keep[:, None] & (d < D), other=0.0)
        v = tl.load(v_cache + rows, mask=keep[:, None] & (d < D), other=0.0)
        scores = _capped(tl.dot(operand, tl.trans(k), input_precision="ieee") * scale, softcap, SOFTCAP)
        scores = tl.where(keep[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        old = tl.exp2(largest - new)
        p = tl.exp2(scores - new[:, None])
        total = total * old + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        largest = new
    _finish(
        out, partial, stats, counters, largest, total, acc, b, head, split, active, HKV, G, GP, D, DP, SPLITS, CHUNK, LAST
    )


@triton.jit
def _combine_kernel(
    out,
    partial,
    stats,
    positions,
    HKV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    FUSED: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    trigger(PDL)
    head = tl.program_id(0)
    b = tl.program_id(1)
    if not PREFETCH:
        wait(PDL)
    start, stop, first, tiles, active = _extent(tl.load(positions + b), BLOCK, SPLITS, WINDOW, FUSED)
    if PREFETCH:
        wait(PDL)
    if active > 1:
        pair = b * HKV + head
        _join(partial, stats, out, pair, active, out + pair.to(tl.int64) * (G * D), G, GP, D, DP, SPLITS, CHUNK)


class Tiling:
    """How decode attention is cut: positions per tile, splits, warps, stages, and whether by matrix units."""

    def __init__(self, block: int, splits: int, warps: int, stages: int, dot: bool) -> None:
        self.block, self.splits, self.warps, self.stages, self.dot = block, splits, warps, stages, dot


def choose_tiling(
    batch: int, num_kv_heads: int, group: int, dim: int, element_size: int, max_length: int, multiprocessors: int
) -> Tiling:
    """Tiling for a cache of up to ``max_length`` positions per slot; see docs/performance/kernels_attention.md."""
    padded = triton.next_power_of_2(dim)
    dot = element_size == 2 and (max_length > 8192 or padded > 128 or group > 4)
    block = 64 if padded <= 128 else 32
    if not dot and padded > 64:
        block = 32
    tiles = triton.cdiv(max_length, block)
    wanted = triton.cdiv(2 * multiprocessors, batch * num_kv_heads)
    return Tiling(block, max(1, min(tiles, wanted, 128)), 4, 3 if dot else 1, dot)


def _launch(
    q: torch.Tensor,
    inv_freq: torch.Tensor | None,
    rope_scale: float,
    positions: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    num_heads: int,
    scale: float,
    window: int,
    softcap: float,
    counters: torch.Tensor | None,
    prefetch: bool,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    batch = q.shape[0]
    _, num_kv_heads, page_size, dim = k_cache.shape
    group = num_heads // num_kv_heads
    device = q.device
    length = page_table.shape[1] * page_size
    if window:
        length = min(length, window + 64)
    if tiling is None:
        tiling = choose_tiling(
            batch, num_kv_heads, group, dim, k_cache.element_size(), length, num_multiprocessors(device)
        )
    padded_dim = triton.next_power_of_2(dim)
    padded_group = max(triton.next_power_of_2(group), 16 if tiling.dot else 1)
    splits = tiling.splits
    chunk = max(1, min(triton.next_power_of_2(splits), 8192 // (padded_group * padded_dim)))
    out = torch.empty((batch, num_heads * dim), dtype=q.dtype, device=device)
    partial = torch.empty((batch, num_kv_heads, splits, padded_group, padded_dim), dtype=torch.float32, device=device)
    stats = torch.empty((batch, num_kv_heads, 2, splits, padded_group), dtype=torch.float32, device=device)
    fused = inv_freq is not None
    unused = positions  # a pointer for what this call does not read
    options = launch_options(device)
    sizes = {"G": group, "GP": padded_group, "D": dim, "DP": padded_dim, "HKV": num_kv_heads}
    cut = {"BLOCK": tiling.block, "SPLITS": splits, "CHUNK": chunk, "WINDOW": window, "FUSED": fused}
    kernel = _decode_dot_kernel if tiling.dot else _decode_kernel
    kernel[(splits, num_kv_heads, batch)](
        q,
        out,
        partial,
        stats,
        unused if counters is None else counters,
        unused if inv_freq is None else inv_freq,
        positions,
        slots,
        page_table,
        k_cache,
        v_cache,
        unused if q_norm is None else q_norm,
        unused if k_norm is None else k_norm,
        rope_scale,
        eps,
        scale if softcap else scale * LOG2_E,
        softcap,
        page_table.shape[1],
        **sizes,
        **cut,
        R=0 if inv_freq is None else 2 * inv_freq.shape[0],
        PAGE=page_size,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        SOFTCAP=softcap != 0.0,
        LAST=counters is not None and splits > 1,
        PREFETCH=prefetch,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **options,
    )
    if counters is None and splits > 1:
        _combine_kernel[(num_kv_heads, batch)](
            out, partial, stats, positions, **sizes, **cut, PREFETCH=prefetch, num_warps=4, **options
        )
    return out


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    counters: torch.Tensor | None,
    prefetch: bool,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Launch the kernels; arguments and result as for ``ostinato.kernels.decode_attention.decode_attention``."""
    return _launch(
        q, None, 1.0, positions, slots, page_table, k_cache, v_cache, None, None, 0.0, q.shape[1],
        scale, window, softcap, counters, prefetch, tiling,
    )  # fmt: skip


def fused_decode_attention(
    qkv: torch.Tensor,
    inv_freq: torch.Tensor,
    rope_scale: float,
    positions: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    counters: torch.Tensor | None,
    prefetch: bool,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Launch the kernels; arguments and result as for ``…decode_attention.fused_decode_attention``."""
    return _launch(
        qkv, inv_freq, rope_scale, positions, slots, page_table, k_cache, v_cache, q_norm, k_norm, eps, num_heads,
        scale, window, softcap, counters, prefetch, tiling,
    )  # fmt: skip
