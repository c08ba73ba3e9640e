"""Decode attention: each program attends one kv head's queries to every SPLITS-th tile of positions.

A program that alone covers its row writes the result; else partial results go to scratch and a second kernel joins
them, as it always does where the result is wanted in int8. Programs beyond the row's real length leave at once, so the
work follows the length that stands on the device. The token that is appended has a program of its own where there is
room for one, else the first tile's has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.decode_attention.join.triton import NO_SCORE, _join_kernel, extent, sigmoid_at
from ostinato.kernels.decode_attention.tiling import Tiling, choose_tiling
from ostinato.kernels.launch import launch_options, num_multiprocessors
from ostinato.kernels.rope.triton import from_fp8, from_fp8_pairs, operand_kind, quantize_fp8, raw_cache, rotation
from ostinato.kernels.triton import trigger, wait

__all__ = ["Tiling", "choose_tiling", "decode_attention", "fused_decode_attention"]

LOG2_E = 1.4426950408889634
_CHUNK = 64  # partial results that a warp of the second kernel joins at a time


@triton.jit
def _tile_pages(row_pages, first, stop, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of positions first … first + BLOCK - 1, or the page of each; BLOCK divides first."""
    if PAGE % BLOCK == 0:
        return tl.load(row_pages + first // PAGE, mask=first < stop, other=0)
    else:
        n = first + tl.arange(0, BLOCK)
        return tl.load(row_pages + n // PAGE, mask=n < stop, other=0)


@triton.jit
def _tile_rows(pages, head, first, HKV: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """int64 rows of a cache [pages, HKV, PAGE] for positions first … first + BLOCK - 1, from ``_tile_pages``."""
    if PAGE % BLOCK == 0:
        return (pages.to(tl.int64) * HKV + head) * PAGE + (first % PAGE + tl.arange(0, BLOCK))
    else:
        return (pages.to(tl.int64) * HKV + head) * PAGE + (first + tl.arange(0, BLOCK)) % PAGE


@triton.jit
def _tile(
    k_cache, v_cache, k_scale, v_scale, pages, head, first, start, stop, HKV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Positions first … first + BLOCK - 1: keys, values, their scales, and which of them lie in start … stop - 1."""
    places = _tile_rows(pages, head, first, HKV, PAGE, BLOCK)
    n = first + tl.arange(0, BLOCK)
    keep = (n >= start) & (n < stop)
    d = tl.arange(0, DP)[None, :]
    k = tl.load(k_cache + places[:, None] * D + d, mask=keep[:, None] & (d < D), other=0.0)
    if FP8:  # values in pairs of neighbours, for _attend
        pair = tl.arange(0, DP // 2)[None, :]
        v = tl.load(v_cache + places[:, None] * (D // 2) + pair, mask=keep[:, None] & (pair < D // 2), other=0.0)
        k_scales = tl.load(k_scale + places, mask=keep, other=0.0)
        v_scales = tl.load(v_scale + places, mask=keep, other=0.0)
    else:
        v = tl.load(v_cache + places[:, None] * D + d, mask=keep[:, None] & (d < D), other=0.0)
        k_scales = tl.zeros((BLOCK,), tl.float32)
        v_scales = k_scales
    return k, v, k_scales, v_scales, keep


@triton.jit
def _capped(scores, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2, after the cap where there is one; with a cap they come in natural units."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0)) * 1.4426950408889634
    return scores


@triton.jit
def _norm_weights(norm, d, partner, D: tl.constexpr, NORM: tl.constexpr):
    """The norm's weights of elements d and of their partners, [1, DP] each; ones where there is no norm."""
    if NORM:
        return tl.load(norm + d, mask=d < D, other=0.0), tl.load(norm + partner, mask=d < D, other=0.0)
    else:
        return tl.full(d.shape, 1.0, tl.float32), tl.full(d.shape, 1.0, tl.float32)


@triton.jit
def _with_partners(source, d, partner, inside):
    """Elements d of heads at ``source`` [H, 1], and the ones that rotation mixes them with."""
    return tl.load(source + d, mask=inside, other=0.0), tl.load(source + partner, mask=inside, other=0.0)


@triton.jit
def _place_of(row_pages, position, head, HKV: tl.constexpr, PAGE: tl.constexpr):
    """int64 row of a cache [pages, HKV, PAGE] for one position."""
    page = tl.load(row_pages + position // PAGE).to(tl.int64)
    return (page * HKV + head) * PAGE + position % PAGE


@triton.jit
def _head_rows(x, y, own_weight, partner_weight, eps, cosine, sine, D: tl.constexpr, NORM: tl.constexpr):
    """Heads x after norm and rotation, float32 [H, DP], y their elements' partners; the rest of the tensors [1, DP]."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= inverse * own_weight
        y *= inverse * partner_weight
    return x * cosine + y * sine


@triton.jit
def _new_rows(key, value, d, partner, weight, partner_weight, eps, cosine, sine, D: tl.constexpr, NORM: tl.constexpr):
    """The new token's key after norm and rotation, float32, and its value as it came, [1, DP] each."""
    k, k_partner = _with_partners(key, d, partner, d < D)
    v = tl.load(value + d, mask=d < D, other=0.0)
    return _head_rows(k, k_partner, weight, partner_weight, eps, cosine, sine, D, NORM), v


@triton.jit
def _append(
    queries, k, v, place, k_cache, v_cache, k_scale, v_scale, scale, softcap, D: tl.constexpr, DP: tl.constexpr,
    SOFTCAP: tl.constexpr, FP8: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Store the new token's key and value, float32 and as it came [1, DP], at ``place`` of the cache.

    Returns its score under each of ``queries`` [GS, DP], and the value as it was stored with its scale.
    """
    d = tl.arange(0, DP)[None, :]
    if FP8:
        stored_k, new_k_scale = quantize_fp8(tl.where(d < D, k, 0.0))
        stored_v, new_v_scale = quantize_fp8(v.to(tl.float32))
        tl.store(k_scale + place + tl.arange(0, 1), new_k_scale)
        tl.store(v_scale + place + tl.arange(0, 1), new_v_scale)
        read_k = from_fp8(stored_k, tl.float32) * new_k_scale[:, None]
        even, odd = tl.split(tl.reshape(stored_v, (1, DP // 2, 2)))
        pair = tl.arange(0, DP // 2)[None, :]
        both = even.to(tl.int16) | (odd.to(tl.int16) << 8)
        tl.store(v_cache + place * (D // 2) + pair, both, mask=pair < D // 2)
    else:
        stored_k = k.to(KIND)
        stored_v = v.to(KIND)
        new_v_scale = tl.full((1,), 1.0, tl.float32)
        read_k = stored_k.to(tl.float32)
        tl.store(v_cache + place * D + d, stored_v, mask=d < D)
    tl.store(k_cache + place * D + d, stored_k, mask=d < D)
    score = _capped(tl.sum(queries.to(tl.float32) * read_k, 1) * scale, softcap, SOFTCAP)
    return score, stored_v, new_v_scale


@triton.jit
def _raised(unit, v_scales):
    """The unit of an accumulator over FP8 values, raised so that weights of ``v_scales`` keep below 2^15 in float16."""
    return tl.maximum(unit, tl.max(v_scales, 0) * (1.0 / 32768.0))


@triton.jit
def _attend(
    operand, k, v, k_scales, v_scales, keep, largest, total, acc, acc_odd, unit, scale, softcap, SOFTCAP: tl.constexpr,
    FP8: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One tile: operand [GP, DP] against k and v [BLOCK, DP], of which ``keep`` [BLOCK] are there; acc counts units.

    FP8: v is int16 [BLOCK, DP / 2], two neighbours in each, since shared memory hands the matrix units 16-bit numbers
    in the order that they need, but bytes one by one only. The odd columns have an accumulator of their own.
    """
    scores = tl.dot(operand, tl.trans(from_fp8(k, KIND) if FP8 else k), input_precision="ieee") * scale
    if FP8:
        scores *= k_scales[None, :]
    scores = tl.where(keep[None, :], _capped(scores, softcap, SOFTCAP), float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    old = tl.exp2(largest - new)
    p = tl.exp2(scores - new[:, None])
    total = total * old + tl.sum(p, 1)
    if FP8:
        raised = _raised(unit, v_scales)
        old *= unit / raised
        p *= (v_scales / raised)[None, :]
        unit = raised
        v, odd = from_fp8_pairs(v, KIND)
        acc_odd = tl.dot(p.to(KIND), odd, acc_odd * old[:, None], input_precision="ieee")
    acc = tl.dot(p.to(KIND), v, acc * old[:, None], input_precision="ieee")
    return new, total, acc, acc_odd, unit


@triton.jit
def _decode_kernel(
    q,
    out,
    partial,
    stats,
    inv_freq,
    positions,
    slots,
    page_table,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    q_norm,
    k_norm,
    rope_scale,
    eps,
    scale,
    softcap,
    pages_per_slot,
    HKV: tl.constexpr,
    G: tl.constexpr,
    GS: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    FUSED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PREFETCH: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDED: tl.constexpr,
    FP8: tl.constexpr,
    KIND: tl.constexpr,
    PDL: tl.constexpr,
):
    """q is qkv when FUSED. The G heads of a group are padded to GS, and repeated to the GP rows of a matrix product.

    PARTS: SPLITS, or one more where the new token has a program of its own, the first, whose result comes last.
    """
    trigger(PDL)
    OWN: tl.constexpr = PARTS > SPLITS
    part = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    if not PREFETCH:
        wait(PDL)
    position = tl.load(positions + b)
    row_pages = page_table + tl.load(slots + b) * pages_per_slot
    start, stop, begin, parts = extent(position, FIRST, BLOCK, SPLITS, PARTS, WINDOW, FUSED)
    if ROUNDED:
        parts = tl.where(position >= 0, parts, 0)
    if part >= parts:
        return
    g = tl.arange(0, GS)[:, None]
    d = tl.arange(0, DP)[None, :]
    inside = (g < G) & (d < D)
    r = tl.arange(0, GP)
    row = (b.to(tl.int64) * HKV + head) * G
    if FUSED:
        partner, cosine, sine = rotation(position, inv_freq, rope_scale, d, R)
        q_weight, q_partner = _norm_weights(q_norm, d, partner, D, Q_NORM)
        heads = q + b.to(tl.int64) * ((G * (1 + GATED) + 2) * HKV * D)
        source = heads + (head * G + g) * D
        key = heads + (G * HKV + head) * D
        value = key + HKV * D
    if OWN:  # noqa: SIM102 (as below)
        if part == 0:
            k_weight, k_partner = _norm_weights(k_norm, d, partner, D, K_NORM)
            place = _place_of(row_pages, position, head, HKV, PAGE)
            if PREFETCH:
                wait(PDL)
            x, y = _with_partners(source, d, partner, inside)
            new_k, new_v = _new_rows(key, value, d, partner, k_weight, k_partner, eps, cosine, sine, D, K_NORM)
            queries = _head_rows(x, y, q_weight, q_partner, eps, cosine, sine, D, Q_NORM).to(KIND)
            score, stored_v, new_v_scale = _append(
                queries, new_k, new_v, place, k_cache, v_cache, k_scale, v_scale, scale, softcap, D, DP, SOFTCAP,
                FP8, KIND,
            )  # fmt: skip
            acc = (from_fp8(stored_v, tl.float32) * new_v_scale[:, None]) if FP8 else stored_v.to(tl.float32)
            tl.store(partial + ((row + g) * PARTS + SPLITS) * DP + d, tl.broadcast_to(acc, (GS, DP)), mask=inside)
            h = tl.arange(0, GS)
            tl.store(stats + (row + h) * (2 * PARTS) + SPLITS, score, mask=h < G)  # its weight is one
            return
    split = part - OWN
    begin += split * FIRST
    later = begin + split * (BLOCK - FIRST) + SPLITS * FIRST  # behind the first tiles of all programs
    pages = _tile_pages(row_pages, begin, stop, PAGE, FIRST)
    # A page number is read one tile ahead, so that the pipeline of the loop holds keys and values alone.
    later_pages = _tile_pages(row_pages, later, stop, PAGE, BLOCK)
    k, v, k_scales, v_scales, keep = _tile(
        k_cache, v_cache, k_scale, v_scale, pages, head, begin, start, stop, HKV, PAGE, FIRST, D, DP, FP8
    )
    if PREFETCH:
        wait(PDL)

    if FUSED:
        x, y = _with_partners(source, d, partner, inside)
        queries = _head_rows(x, y, q_weight, q_partner, eps, cosine, sine, D, Q_NORM)
    else:
        queries = tl.load(q + (row + g) * D + d, mask=inside, other=0.0)
    rounded = queries.to(KIND)
    operand = tl.reshape(tl.broadcast_to(rounded[None, :, :], (GP // GS, GS, DP)), (GP, DP))

    largest = tl.full((GP,), NO_SCORE, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP // 2 if FP8 else DP), tl.float32)
    acc_odd = tl.zeros((GP, DP // 2), tl.float32) if FP8 else acc  # a second accumulator for FP8 alone
    unit = tl.full((), 1e-30 if FP8 else 1.0, tl.float32)
    if FUSED and not OWN:  # noqa: SIM102 (the outer branch is taken by the compiler, the inner one by the program)
        if split == 0:
            k_weight, k_partner = _norm_weights(k_norm, d, partner, D, K_NORM)
            place = _place_of(row_pages, position, head, HKV, PAGE)
            new_k, new_v = _new_rows(key, value, d, partner, k_weight, k_partner, eps, cosine, sine, D, K_NORM)
            score, stored_v, new_v_scale = _append(
                rounded, new_k, new_v, place, k_cache, v_cache, k_scale, v_scale, scale, softcap, D, DP, SOFTCAP,
                FP8, KIND,
            )  # fmt: skip
            largest = tl.reshape(tl.broadcast_to(score[None, :], (GP // GS, GS)), (GP,))
            total = tl.full((GP,), 1.0, tl.float32)
            if FP8:
                even, odd = tl.split(tl.reshape(stored_v, (1, DP // 2, 2)))
                unit = _raised(unit, new_v_scale)
                acc += from_fp8(even, tl.float32) * (new_v_scale / unit)[:, None]
                acc_odd += from_fp8(odd, tl.float32) * (new_v_scale / unit)[:, None]
            else:
                acc += stored_v.to(tl.float32)

    if begin < stop:
        largest, total, acc, acc_odd, unit = _attend(
            operand, k, v, k_scales, v_scales, keep, largest, total, acc, acc_odd, unit, scale, softcap, SOFTCAP,
            FP8, KIND,
        )  # fmt: skip
    for at in range(later, stop, SPLITS * BLOCK):
        later_k, later_v, later_k_scales, later_v_scales, there = _tile(
            k_cache, v_cache, k_scale, v_scale, later_pages, head, at, at, stop, HKV, PAGE, BLOCK, D, DP, FP8
        )
        later_pages = _tile_pages(row_pages, at + SPLITS * BLOCK, stop, PAGE, BLOCK)
        largest, total, acc, acc_odd, unit = _attend(
            operand, later_k, later_v, later_k_scales, later_v_scales, there, largest, total, acc, acc_odd, unit, scale,
            softcap, SOFTCAP, FP8, KIND,
        )  # fmt: skip

    mine = (r < G)[:, None] & (d < D)
    if FP8:
        acc = tl.reshape(tl.join(acc, acc_odd), (GP, DP)) * unit
    if not ROUNDED and parts == 1:
        gate = q + (b.to(tl.int64) + 1) * ((G * (1 + GATED) + 2) * HKV * D) - G * HKV * D
        factor = sigmoid_at(gate, (head * G + r[:, None]) * D + d, mine, GATED)
        tl.store(out + (row + r)[:, None] * D + d, acc / total[:, None] * factor, mask=mine)
    else:
        tl.store(partial + ((row + r) * PARTS + split)[:, None] * DP + d, acc, mask=mine)
        tl.store(stats + (row + r) * (2 * PARTS) + split, largest, mask=r < G)
        tl.store(stats + (row + r) * (2 * PARTS) + PARTS + split, total, mask=r < G)


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
    prefetch: bool,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Launch the kernels; arguments and result as for ``ostinato.kernels.decode_attention.decode_attention``."""
    out, _ = fused_decode_attention(
        q, None, 1.0, positions, slots, page_table, k_cache, v_cache, None, None, 0.0, q.shape[1], k_cache.shape[1],
        scale, window, softcap, prefetch, k_scale, v_scale, tiling=tiling,
    )  # fmt: skip
    return out


def fused_decode_attention(
    qkv: torch.Tensor,
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
    num_kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    prefetch: bool,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    gated: bool = False,
    rounded: bool = False,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels; arguments and results as for ``ostinato.kernels.decode_attention.fused_decode_attention``.

    inv_freq: None where qkv is q alone, as ``decode_attention`` takes it, and the cache has all positions.
    """
    batch = qkv.shape[0]
    page_size, dim = k_cache.shape[2:]
    group = num_heads // num_kv_heads
    device = qkv.device
    length = page_table.shape[1] * page_size
    if window:
        length = min(length, window + 64)
    if tiling is None:
        tiling = choose_tiling(batch, num_kv_heads, dim, length, num_multiprocessors(device), k_cache.element_size())
    padded_dim = max(16, triton.next_power_of_2(dim))
    padded_group = triton.next_power_of_2(group)
    splits = tiling.splits
    out = torch.empty((batch, num_heads * dim), dtype=torch.int8 if rounded else qkv.dtype, device=device)
    shape = (batch, num_heads * dim // 32) if rounded else (0,)
    scale_of_out = torch.empty(shape, dtype=torch.float32, device=device)
    fused = inv_freq is not None
    parts = splits + 1 if fused and tiling.own else splits
    partial = torch.empty((batch, num_heads, parts, padded_dim), dtype=torch.float32, device=device)
    stats = torch.empty((batch, num_heads, 2, parts), dtype=torch.float32, device=device)
    unused = positions  # a pointer for what this call does not read
    options = launch_options(device)
    cut = {
        "D": dim, "DP": padded_dim, "FIRST": tiling.first or tiling.block, "BLOCK": tiling.block, "SPLITS": splits,
        "PARTS": parts, "WINDOW": window, "FUSED": fused, "PREFETCH": prefetch, "GATED": gated, "ROUNDED": rounded,
    }  # fmt: skip
    _decode_kernel[(parts, num_kv_heads, batch)](
        qkv,
        out,
        partial,
        stats,
        unused if inv_freq is None else inv_freq,
        positions,
        slots,
        page_table,
        raw_cache(k_cache),
        v_cache.view(torch.int16) if k_scale is not None else v_cache,
        unused if k_scale is None else k_scale,
        unused if v_scale is None else v_scale,
        unused if q_norm is None else q_norm,
        unused if k_norm is None else k_norm,
        rope_scale,
        eps,
        scale if softcap else scale * LOG2_E,
        softcap,
        page_table.shape[1],
        HKV=num_kv_heads,
        G=group,
        GS=padded_group,
        GP=max(16, padded_group),
        R=0 if inv_freq is None else 2 * inv_freq.shape[0],
        PAGE=page_size,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        SOFTCAP=softcap != 0.0,
        FP8=k_scale is not None,
        KIND=operand_kind(qkv.dtype, k_cache.dtype),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **cut,
        **options,
    )
    if rounded or parts > 1:
        columns = min(padded_dim, max(32, tiling.columns) if rounded else tiling.columns)
        warps = 2 if splits > _CHUNK and columns <= 32 else 1
        chunk = min(triton.next_power_of_2(splits), warps * _CHUNK)
        _join_kernel[(triton.cdiv(dim, columns), num_heads, batch)](
            out, qkv, partial, stats, positions, scale_of_out, HQ=num_heads, WIDTH=qkv.shape[-1], COLUMNS=columns,
            CHUNK=chunk, num_warps=warps, **cut, **options,
        )  # fmt: skip
    return out, scale_of_out
