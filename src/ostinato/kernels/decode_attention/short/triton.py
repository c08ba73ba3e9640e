"""Decode attention over rows so short that every 16 positions have a program of their own.

Such a program has next to nothing to multiply, so matrix units and the way of their operands through shared memory cost
more than they save. Keys and values wait in registers before the projection is done. Then a warp has a query head: it
norms and rotates it and gives it to all others; each warp multiplies two keys by all heads; and with the scores each
weighs the values for its own head. The warps meet twice. The new token's key and value have a program of their own,
which is also the one to append them to the cache, so that no other waits for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.decode_attention.join.triton import NO_SCORE, extent
from ostinato.kernels.lanes.triton import max_lanes, of_lane, row_of, share, sum_lanes, sum_rows
from ostinato.kernels.rope.triton import cos_sin
from ostinato.kernels.triton import load_floats, load_words, nothing, store_own, store_quad, trigger, wait

BLOCK = 16  # positions of a program
DIM = 256  # of a head: eight for each lane
_WARPS = 8


@triton.jit
def _unpacked(words):
    """Eight bfloat16 in four words, as float32."""
    found = nothing()
    for i in tl.static_range(4):
        low = (words[i] << 16).to(tl.float32, bitcast=True)
        upp = (words[i] & -65536).to(tl.float32, bitcast=True)
        found += (low, upp)
    return found


@triton.jit
def _bits(x):
    """x as bfloat16, in the low half of an int32."""
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535


@triton.jit
def _eight(pointer, inside):
    a, b, c, d = load_floats(pointer, inside)
    e, f, g, h = load_floats(pointer + 4, inside)
    return a, b, c, d, e, f, g, h


@triton.jit
def _turned(source, own, partner, weight, partner_weight, cosine, sine, turns, eps, D: tl.constexpr):
    """A head after norm and rotation, eight elements a lane, in words of two bfloat16. source: pointer to its words."""
    x = _unpacked(load_words(source + own // 2, own >= 0))
    y = _unpacked(load_words(source + partner // 2, turns))
    squares = x[0] * x[0]
    for e in tl.static_range(1, 8):
        squares += x[e] * x[e]
    inverse = tl.rsqrt(sum_lanes(squares, 1, 32) / D + eps)
    words = nothing()
    for i in tl.static_range(4):
        low = x[2 * i] * (inverse * weight[2 * i]) * cosine[2 * i]
        low += y[2 * i] * (inverse * partner_weight[2 * i]) * sine[2 * i]
        upp = x[2 * i + 1] * (inverse * weight[2 * i + 1]) * cosine[2 * i + 1]
        upp += y[2 * i + 1] * (inverse * partner_weight[2 * i + 1]) * sine[2 * i + 1]
        words += (_bits(low) | (_bits(upp) << 16),)
    return words


@triton.jit
def _attend_one(query, key, value, place, of_stats, scale, lane, writes, SPLITS: tl.constexpr):
    """The partial result of the new position alone."""
    q = _unpacked(query)
    k = _unpacked(key)
    dot = q[0] * k[0]
    for e in tl.static_range(1, 8):
        dot += q[e] * k[e]
    score = sum_lanes(dot, 1, 32) * scale
    acc = _unpacked(value)
    store_quad(place, acc[0], acc[1], acc[2], acc[3], writes)
    store_quad(place + 4, acc[4], acc[5], acc[6], acc[7], writes)
    store_own(of_stats, score, writes & (lane == 0))
    store_own(of_stats + SPLITS, lane * 0.0 + 1.0, writes & (lane == 0))


@triton.jit
def _attend_tile(
    query, keys, values, place, of_stats, scale, known, lane, warp, writes, G: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The partial result of BLOCK cached positions, of which a warp has two keys, and the values in all lanes.

    known: whether position lane % BLOCK is attended to.
    """
    written = nothing()
    for i in tl.static_range(4):
        written += (query[i].to(tl.float32, bitcast=True), warp * 128 + i * 32 + lane, writes)
    places = nothing()
    for g in tl.static_range(G):
        for i in tl.static_range(4):
            places += (lane + (g * 128 + i * 32),)
    queries = share(written, places, 4, 4 * G, 128 * G)
    first_key = _unpacked(keys[0])
    second_key = _unpacked(keys[1])
    of_first = nothing()
    of_second = nothing()
    for g in tl.static_range(G):
        words = nothing()
        for i in tl.static_range(4):
            words += (queries[4 * g + i].to(tl.int32, bitcast=True),)
        q = _unpacked(words)
        one = q[0] * first_key[0]
        two = q[0] * second_key[0]
        for e in tl.static_range(1, 8):
            one += q[e] * first_key[e]
            two += q[e] * second_key[e]
        of_first += (one,)
        of_second += (two,)
    one, two = sum_rows(of_first + of_second, G, 2, 1, 32)
    at = row_of(lane, G, 1, 32) * BLOCK + warp * 2
    own_score = tl.minimum(warp, G - 1) * BLOCK + lane % BLOCK
    both = share((one, at, lane < G, two, at + 1, lane < G), (own_score, own_score), 2, 2, BLOCK * G)
    score = tl.where(known, both[0] * scale, NO_SCORE)
    largest = max_lanes(score, 1, BLOCK)
    p = tl.where(known, tl.exp2(score - largest), 0.0)
    total = sum_lanes(p, 1, BLOCK)
    acc = nothing()
    for _ in tl.static_range(8):
        acc += (lane * 0.0,)
    for i in tl.static_range(BLOCK):
        weight = of_lane(p, lane * 0 + i)
        v = _unpacked(values[i])
        more = nothing()
        for e in tl.static_range(8):
            more += (acc[e] + weight * v[e],)
        acc = more
    store_quad(place, acc[0], acc[1], acc[2], acc[3], writes)
    store_quad(place + 4, acc[4], acc[5], acc[6], acc[7], writes)
    store_own(of_stats, largest, writes & (lane == 0))
    store_own(of_stats + SPLITS, total, writes & (lane == 0))


@triton.jit
def _short_kernel(
    qkv, partial, stats, inv_freq, positions, slots, page_table, k_cache, v_cache, q_norm, k_norm, rope_scale, eps,
    scale, pages_per_slot, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, GATED: tl.constexpr, WARPS: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """qkv and the caches are words of two bfloat16. SPLITS: one more than a row has programs for cached positions."""
    trigger(PDL)
    split = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    if not PREFETCH:
        wait(PDL)
    position = tl.load(positions + b)
    row_pages = page_table + tl.load(slots + b) * pages_per_slot
    start, stop, first, tiles, _count = extent(position, BLOCK, SPLITS, WINDOW, True)
    if (split > tiles) | (position < 0):
        return
    lane = tl.arange(0, 32)[None, :] + tl.arange(0, WARPS)[:, None] * 0
    warp = tl.arange(0, WARPS)[:, None] + lane * 0
    own = lane * 8
    mine = tl.minimum(warp, G - 1)  # a warp's query head of the group; those too many repeat the last
    is_new = split == tiles
    begin = tl.where(is_new, position, (first + split) * BLOCK)
    page = tl.load(row_pages + begin // PAGE).to(tl.int64)
    rows = (page * HKV + head) * PAGE + begin % PAGE  # the cache's, of the first position
    keys = nothing()
    for i in tl.static_range(BLOCK // WARPS):
        n = warp * (BLOCK // WARPS) + i
        there = (begin + n >= start) & (begin + n < stop) & (split < tiles)
        keys += (load_words(k_cache + (rows + n) * (D // 2) + own // 2, there),)
    values = nothing()
    for n in tl.static_range(BLOCK):
        there = (own >= 0) & (begin + n >= start) & (begin + n < stop) & (split < tiles)
        values += (load_words(v_cache + (rows + n) * (D // 2) + own // 2, there),)
    turns = own < R
    partner = tl.where(own < R // 2, own + R // 2, own - R // 2)
    weight = _eight(q_norm + own, own >= 0)
    partner_weight = _eight(q_norm + partner, turns)
    frequency = tl.load(inv_freq + lane % (R // 2))
    of_cosine, of_sine = cos_sin(position, frequency, rope_scale)
    cosine = nothing()
    sine = nothing()
    for e in tl.static_range(8):
        at = (own + e) % (R // 2)
        cosine += (tl.where(turns, of_lane(of_cosine, at), 1.0),)
        turned = of_lane(of_sine, at)
        sine += (tl.where(turns, tl.where(own < R // 2, -turned, turned), 0.0),)
    if PREFETCH:
        wait(PDL)

    heads = qkv + b.to(tl.int64) * ((G * (1 + GATED) + 2) * HKV * (D // 2))
    source = heads + (head * G + mine) * (D // 2)
    query = _turned(source, own, partner, weight, partner_weight, cosine, sine, turns, eps, D)
    row = (b.to(tl.int64) * HKV + head) * G + mine
    place = partial + (row * SPLITS + split) * D + own
    of_stats = stats + row * (2 * SPLITS) + split
    writes = warp < G
    if is_new:
        of_key = _eight(k_norm + own, own >= 0)
        of_partner = _eight(k_norm + partner, turns)
        place_of_key = heads + (G * HKV + head) * (D // 2) + lane * 0
        key = _turned(place_of_key, own, partner, of_key, of_partner, cosine, sine, turns, eps, D)
        value = load_words(place_of_key + (HKV * D + own) // 2, own >= 0)
        new_at = rows * (D // 2) + own // 2
        store_quad(k_cache + new_at, key[0], key[1], key[2], key[3], warp == 0)
        store_quad(v_cache + new_at, value[0], value[1], value[2], value[3], warp == 0)
        _attend_one(query, key, value, place, of_stats, scale, lane, writes, SPLITS)
    else:
        known = (begin + lane % BLOCK >= start) & (begin + lane % BLOCK < stop)
        _attend_tile(query, keys, values, place, of_stats, scale, known, lane, warp, writes, G, BLOCK, SPLITS)


def takes(
    qkv: torch.Tensor,
    inv_freq: torch.Tensor | None,
    k_cache: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    group: int,
    softcap: float,
    rounded: bool,
) -> bool:
    """Whether the kernel is made for these heads."""
    bfloat16 = qkv.dtype == k_cache.dtype == torch.bfloat16
    normed = q_norm is not None and k_norm is not None
    turned = inv_freq is not None and inv_freq.shape[0] <= 32 and inv_freq.shape[0] % 8 == 0
    whole = k_cache.shape[2] % BLOCK == 0 and k_cache.shape[3] == DIM and group in (1, 2, 4, 8)
    return bfloat16 and normed and turned and whole and rounded and not softcap


def launch(
    qkv: torch.Tensor,
    partial: torch.Tensor,
    stats: torch.Tensor,
    inv_freq: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    rope_scale: float,
    eps: float,
    scale: float,
    window: int,
    gated: bool,
    prefetch: bool,
    options: dict[str, bool],
) -> None:
    """Partial results [B, Hq, splits, D] and their [B, Hq, 2, splits] largest scores, in units of log2, and sums.

    ``scale`` has them in these units. One split more than tiles of cached positions: the new one's stands behind them.
    """
    num_kv_heads, page = k_cache.shape[1:3]
    splits = partial.shape[2]
    _short_kernel[(splits, num_kv_heads, qkv.shape[0])](
        qkv.view(torch.int32), partial, stats, inv_freq, positions, slots, page_table, k_cache.view(torch.int32),
        v_cache.view(torch.int32), q_norm, k_norm, rope_scale, eps, scale, page_table.shape[1], HKV=num_kv_heads,
        G=partial.shape[1] // num_kv_heads, D=DIM, R=2 * inv_freq.shape[0], PAGE=page, BLOCK=BLOCK, SPLITS=splits,
        WINDOW=window, GATED=gated, WARPS=_WARPS, PREFETCH=prefetch, num_warps=_WARPS, **options,
    )  # fmt: skip
