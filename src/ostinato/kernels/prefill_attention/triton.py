"""Prefill attention on the matrix units: one program holds a block of queries of one head and walks over the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.launch import launch_options
from ostinato.kernels.rope.triton import from_fp8, operand_kind, raw_cache
from ostinato.kernels.triton import trigger, wait

LOG2_E = 1.4426950408889634


@triton.jit
def _walk(
    acc,
    largest,
    total,
    unit,
    queries,
    row_pages,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    head,
    rows,
    begin,
    end,
    stop,
    scale,
    softcap,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend queries at positions ``rows`` to positions begin … end - 1, multiples of BLOCK_N; acc counts units."""
    d = tl.arange(0, DP)
    j = tl.arange(0, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        n = first + j
        if PAGE % BLOCK_N == 0:
            page = tl.load(row_pages + first // PAGE).to(tl.int64)
            # Not a scalar base plus fixed offsets: with that, the matrix products no longer overlap (Triton 3.6).
            places = (page * HKV + head) * PAGE + first % PAGE + j
        else:
            page = tl.load(row_pages + n // PAGE, mask=n < stop, other=0).to(tl.int64)
            places = (page * HKV + head) * PAGE + n % PAGE
        at = places[:, None] * D + d[None, :]
        k_at = k_cache + at
        v_at = v_cache + at
        if MASKED:
            present = (n < stop)[:, None] & (d < D)[None, :]
            k = tl.load(k_at, mask=present, other=0.0)
            v = tl.load(v_at, mask=present, other=0.0)
        elif D == DP:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            k = tl.load(k_at, mask=(d < D)[None, :], other=0.0)
            v = tl.load(v_at, mask=(d < D)[None, :], other=0.0)
        if FP8:
            k = from_fp8(k, queries.dtype)
            v = from_fp8(v, queries.dtype)
            k_scales = tl.load(k_scale + places, mask=n < stop, other=0.0)
            v_scales = tl.load(v_scale + places, mask=n < stop, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if FP8:
            scores *= k_scales[None, :]
        if SOFTCAP:
            scores *= scale
            scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))
            factor = 1.4426950408889634
        else:
            factor = scale
        if MASKED:
            keep = n[None, :] <= rows[:, None]
            if WINDOW > 0:
                keep = keep & (n[None, :] > rows[:, None] - WINDOW)
            scores = tl.where(keep, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1) * factor)
        p = tl.exp2(scores * factor - new[:, None])
        old = tl.exp2(largest - new)
        total = total * old + tl.sum(p, 1)
        if FP8:  # weights below 2^15, so that float16 holds them
            raised = tl.maximum(unit, tl.max(v_scales, 0) * (1.0 / 32768.0))
            old *= unit / raised
            p *= (v_scales / raised)[None, :]
            unit = raised
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        largest = new
    return acc, largest, total, unit


@triton.jit
def _prefill_kernel(
    q,
    out,
    positions,
    slots,
    page_table,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    gate,
    gate_stride,
    num_tokens,
    scale,
    softcap,
    pages_per_slot,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    trigger(PDL)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest walks start first
    query_head = tl.program_id(0)
    head = query_head // G
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DP)
    wait(PDL)
    position = tl.load(positions)
    row_pages = page_table + tl.load(slots) * pages_per_slot
    inside = (t < num_tokens)[:, None] & (d < D)[None, :]
    at = (t.to(tl.int64)[:, None] * (HKV * G) + query_head) * D + d[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)
    queries = queries.to(KIND)

    rows = position + t
    stop = position + num_tokens
    block_first = position + block * BLOCK_M
    block_stop = tl.minimum(block_first + BLOCK_M, stop)
    begin = 0
    free_begin = 0  # from here to free_end every query sees every position
    if WINDOW > 0:
        begin = tl.maximum(block_first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        free_begin = tl.maximum(tl.cdiv(block_first + BLOCK_M - WINDOW, BLOCK_N), 0) * BLOCK_N
    free_end = (block_first + 1) // BLOCK_N * BLOCK_N
    free_begin = tl.maximum(tl.minimum(free_begin, free_end), begin)

    largest = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DP), tl.float32)
    unit = tl.full((), 1e-30 if FP8 else 1.0, tl.float32)
    if WINDOW > 0:
        acc, largest, total, unit = _walk(
            acc, largest, total, unit, queries, row_pages, k_cache, v_cache, k_scale, v_scale, head, rows, begin,
            free_begin, stop, scale, softcap, HKV, D, DP, PAGE, BLOCK_N, WINDOW, SOFTCAP, FP8, True,
        )  # fmt: skip
    acc, largest, total, unit = _walk(
        acc, largest, total, unit, queries, row_pages, k_cache, v_cache, k_scale, v_scale, head, rows, free_begin,
        free_end, stop, scale, softcap, HKV, D, DP, PAGE, BLOCK_N, WINDOW, SOFTCAP, FP8, False,
    )  # fmt: skip
    acc, largest, total, unit = _walk(
        acc, largest, total, unit, queries, row_pages, k_cache, v_cache, k_scale, v_scale, head, rows,
        tl.maximum(free_end, begin), block_stop, stop, scale, softcap, HKV, D, DP, PAGE, BLOCK_N, WINDOW, SOFTCAP,
        FP8, True,
    )  # fmt: skip
    total = tl.where(total > 0.0, total, 1.0)  # a row beyond the chunk may see nothing
    acc *= (unit / total)[:, None]
    if GATED:
        z = tl.load(gate + t.to(tl.int64)[:, None] * gate_stride + query_head * D + d[None, :], mask=inside, other=0.0)
        acc *= tl.sigmoid(tl.maximum(z.to(tl.float32), -80.0))  # below that exp(-z) overflows
    tl.store(out + at, acc, mask=inside)


def choose_blocks(num_tokens: int, dim: int, element_size: int, fp8: bool = False) -> tuple[int, int, int, int]:
    """(queries per block, positions per step, warps, stages); see docs/performance/kernels_attention.md."""
    padded = triton.next_power_of_2(dim)
    if element_size == 4:
        return 16 if padded > 128 else 32, 32, 4, 1
    if padded > 128:
        if num_tokens > 1024:  # with fewer, blocks of 128 queries leave multiprocessors without work
            return (128, 32, 8, 2) if fp8 else (128, 64, 8, 2)
        return (64, 64, 4, 2) if num_tokens > 64 else (64, 32, 4, 2)
    return (64, 128, 4, 2) if padded <= 64 else (64, 64, 4, 3)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    blocks: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """Launch ``_prefill_kernel``; arguments and result as for ``ostinato.kernels.prefill_attention``."""
    num_tokens, num_heads, dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    block_m, block_n, warps, stages = blocks or choose_blocks(
        num_tokens, dim, max(k_cache.element_size(), q.element_size()), k_scale is not None
    )
    out = torch.empty((num_tokens, num_heads * dim), dtype=q.dtype, device=q.device)
    _prefill_kernel[(num_heads, triton.cdiv(num_tokens, block_m))](
        q,
        out,
        positions,
        slots,
        page_table,
        raw_cache(k_cache),
        raw_cache(v_cache),
        positions if k_scale is None else k_scale,
        positions if v_scale is None else v_scale,
        q if gate is None else gate,
        0 if gate is None else gate.stride(0),
        num_tokens,
        scale if softcap else scale * LOG2_E,
        softcap,
        page_table.shape[1],
        HKV=num_kv_heads,
        G=num_heads // num_kv_heads,
        D=dim,
        DP=triton.next_power_of_2(dim),
        PAGE=page_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        WINDOW=window,
        SOFTCAP=softcap != 0.0,
        FP8=k_scale is not None,
        KIND=operand_kind(q.dtype, k_cache.dtype),
        GATED=gate is not None,
        num_warps=warps,
        num_stages=stages,
        **launch_options(q.device),
    )
    return out
