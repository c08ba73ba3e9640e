"""Tensor-core products on packed weights: tiles of W are unpacked to bfloat16 between global and shared memory.

Each step of ``_product_kernel`` multiplies 32 * NG columns. The low nibbles of the words are columns 0 … 15 of each 32
and the high nibbles columns 16 … 31, so x is loaded as the same two halves and a step is two products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ostinato.kernels.block_linear.matmul.triton import values
from ostinato.kernels.block_linear.matvec.triton import half
from ostinato.kernels.block_linear.planes import kind_constants, pairs
from ostinato.kernels.grouped_linear.hopper.triton import _wgmma_kernel
from ostinato.kernels.grouped_linear.unpack.triton import in_order, unpack
from ostinato.kernels.launch import capability, launch_options
from ostinato.kernels.triton import dot_bfloat16, gate_times_up, load_word, trigger, wait
from ostinato.quant.blocks import KINDS, BlockKind


@triton.jit
def load_scales(
    d, m, sub_d, sub_m, rows, g, KG: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    MIN_SIGN: tl.constexpr,
):  # fmt: skip
    """What unpack needs of the scales of 32-groups g [NG] of rows [BN]: four float32 [BN, NG].

    Scale and summand of the lower 16 columns, then of the upper: weight = scale * quant + summand. Past a row's last
    group they are that group's: behind the last row there may be NaN, which no zero weight takes out of a sum.
    """
    SUB: tl.constexpr = GROUP != SUPER
    g = tl.minimum(g, KG - 1)
    at = rows[:, None] * KG + g[None, :]
    over = rows[:, None] * (KG * 32 // SUPER) + (g // (SUPER // 32))[None, :]
    inside = at >= 0
    dd = load_word(d + over, inside)
    mm = dd
    sd = at
    sm = at
    if MIN_SIGN != 0:
        mm = load_word(m + over, inside)
    if SUB:
        sd = load_word(sub_d + at, inside)
        if MIN_SIGN != 0:
            sm = load_word(sub_m + at, inside)
    scale, summand = half(dd, mm, sd, sm, False, GROUP, OFFSET, MIN_SIGN, SUB)
    upper, upper_summand = scale, summand
    if GROUP == 16:
        upper, upper_summand = half(dd, mm, sd, sm, True, GROUP, OFFSET, MIN_SIGN, SUB)
    return scale, summand, upper, upper_summand


@triton.jit
def halves(
    bytes_, high, d, m, sub_d, sub_m, rows, g, KG: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr,
):  # fmt: skip
    """What unpack returns, for any number of bits."""
    inside = (rows >= 0)[:, None] & (g < KG)[None, :]
    low, upper = values(bytes_, high, d, m, sub_d, sub_m, rows, g, inside, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
    shape: tl.constexpr = (low.shape[0], low.shape[1] * 16)
    return tl.reshape(low, shape).to(tl.bfloat16), tl.reshape(upper, shape).to(tl.bfloat16)


@triton.jit
def accumulate(acc, w, x, SWAP: tl.constexpr):
    """acc [BM, BN] + x wᵀ of x [BM, C] and w [BN, C]; acc is [BN, BM] if SWAP."""
    if SWAP:
        return dot_bfloat16(w, tl.trans(x), acc)
    else:
        return dot_bfloat16(x, tl.trans(w), acc)


@triton.jit
def _product_kernel(
    x, stride_x, bytes_, high, d, m, sub_d, sub_m, bias, residual, out, order, blocks, M, N, TOP_K, EXPERT_ROWS,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr,
    MIN_SIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NG: tl.constexpr, SWAP: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [·, N]: BM rows of x times BN rows of W (and as many of up where gated).

    ROWS says which rows of x a program takes and where its results go. ``all``: both are rows of a matrix of M rows.
    ``gather``: the tokens of a block of picks, to its sorted positions. ``scatter``: sorted positions, to the picks.
    """
    trigger(PDL)
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + NG - 1) // NG
    program = tl.program_id(0)
    num_n = tl.cdiv(N, BN)
    wait(PDL)
    if ROWS == "all":  # squares of 8 blocks of rows: neighbours in time share rows of x and of W in the L2 cache
        wide = 8 * num_n
        first_block = (program // wide) * 8
        height = min(tl.cdiv(M, BM) - first_block, 8)
        n_block = (program % wide) // height
        start = (first_block + program % height) * BM
        stop = M
        base = 0
    else:
        n_block = program % num_n
        block = blocks + (program // num_n) * 3
        base = tl.load(block).to(tl.int64) * EXPERT_ROWS
        start = tl.load(block + 1)
        stop = tl.load(block + 2)
        if start >= stop:
            return
    position = start + tl.arange(0, BM)
    inside_m = position < stop
    safe = tl.minimum(position, stop - 1)
    if ROWS == "all":
        source = safe
        target = position
    elif ROWS == "gather":
        source = tl.load(order + safe) // TOP_K
        target = position
    else:
        source = safe
        target = tl.load(order + safe)
    n = n_block * BN + tl.arange(0, BN)
    inside_n = n < N
    n_safe = tl.minimum(n, N - 1)
    bytes_ += base * (K if BITS == 8 else K // 2)
    high += base * (KG * 2 if BITS == 6 else KG)
    d += base * (K // SUPER)
    m += base * (K // SUPER)
    sub_d += base * KG
    sub_m += base * KG

    column = tl.arange(0, NG * 32)
    x_at = x + source.to(tl.int64)[:, None] * stride_x + column[None, :]
    g = tl.arange(0, NG)
    if SWAP:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    up = acc
    if BITS == 4:
        w_at = bytes_ + n_safe[:, None] * (K // 2) + tl.arange(0, NG * 16)[None, :]
        s0, s1, s2, s3 = load_scales(d, m, sub_d, sub_m, n_safe, g, KG, GROUP, SUPER, OFFSET, MIN_SIGN)
        if GATE is not None:
            t0, t1, t2, t3 = load_scales(d, m, sub_d, sub_m, n_safe + N, g, KG, GROUP, SUPER, OFFSET, MIN_SIGN)
    for step in range(STEPS):
        if KG % NG == 0:
            x_tile = tl.load(x_at + step * (NG * 32))
        else:
            in_k = (step * NG * 32 + column < K)[None, :]
            in_w = (step * NG * 16 + tl.arange(0, NG * 16) < K // 2)[None, :]
            x_tile = tl.load(x_at + step * (NG * 32), mask=in_k, other=0.0)
        now = step * NG + g
        if BITS == 4:  # the next step's scales first: the fence before a product waits for all loads before it
            then = now + NG
            s4, s5, s6, s7 = load_scales(d, m, sub_d, sub_m, n_safe, then, KG, GROUP, SUPER, OFFSET, MIN_SIGN)
            if GATE is not None:
                t4, t5, t6, t7 = load_scales(d, m, sub_d, sub_m, n_safe + N, then, KG, GROUP, SUPER, OFFSET, MIN_SIGN)
            if KG % NG == 0:
                packed = tl.load(w_at + step * (NG * 16))
            else:
                packed = tl.load(w_at + step * (NG * 16), mask=in_w, other=0)
            low, upper = unpack(packed, s0, s1, s2, s3)
            s0, s1, s2, s3 = s4, s5, s6, s7
        else:
            low, upper = halves(bytes_, high, d, m, sub_d, sub_m, n_safe, now, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
        acc = accumulate(acc, in_order(low, upper), x_tile, SWAP)
        if GATE is not None:
            if BITS == 4:
                if KG % NG == 0:
                    packed = tl.load(w_at + N * (K // 2) + step * (NG * 16))
                else:
                    packed = tl.load(w_at + N * (K // 2) + step * (NG * 16), mask=in_w, other=0)
                low, upper = unpack(packed, t0, t1, t2, t3)
                t0, t1, t2, t3 = t4, t5, t6, t7
            else:
                low, upper = halves(
                    bytes_, high, d, m, sub_d, sub_m, n_safe + N, now, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN
                )
            up = accumulate(up, in_order(low, upper), x_tile, SWAP)
    if BIAS:
        added = tl.load(bias + n_safe).to(tl.float32)
        acc += added[:, None] if SWAP else added[None, :]
        if GATE is not None:
            added = tl.load(bias + n_safe + N).to(tl.float32)
            up += added[:, None] if SWAP else added[None, :]
    if GATE is not None:
        acc = gate_times_up(acc, up, GATE)
    if SWAP:
        acc = tl.trans(acc)
    where = target.to(tl.int64)[:, None] * N + n[None, :]
    store = inside_m[:, None] & inside_n[None, :]
    if RESIDUAL:
        acc += tl.load(residual + where, mask=store, other=0.0)
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=store)


@triton.jit
def _sort_kernel(
    ids, order, blocks, P, NUM_EXPERTS, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """order [P] and blocks [P // BLOCK_ROWS + NUM_EXPERTS, 3]: a program counts, places and cuts one expert's picks."""
    trigger(PDL)
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    wait(PDL)
    below = tl.zeros((BLOCK,), tl.int32)
    mine = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, P, BLOCK):
        found = tl.load(ids + first + lane, mask=first + lane < P, other=NUM_EXPERTS)
        below += (found < expert).to(tl.int32)
        mine += (found == expert).to(tl.int32)
    start = tl.sum(below, 0)
    stop = start + tl.sum(mine, 0)
    slot = start // BLOCK_ROWS + expert
    end = stop // BLOCK_ROWS + expert + 1
    part = tl.arange(0, 64)
    for number in range(slot, end, 64):
        begin = tl.minimum(start + (number - slot + part) * BLOCK_ROWS, stop)
        to = blocks + (number + part) * 3
        tl.store(to, expert, mask=number + part < end)
        tl.store(to + 1, begin, mask=number + part < end)
        tl.store(to + 2, tl.minimum(begin + BLOCK_ROWS, stop), mask=number + part < end)
    placed = start
    for first in range(0, P, BLOCK):
        hit = tl.load(ids + first + lane, mask=first + lane < P, other=NUM_EXPERTS) == expert
        rank = tl.cumsum(hit.to(tl.int32), 0)
        tl.store(order + placed + rank - 1, first + lane, mask=hit)
        placed += tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _weighted_sum_kernel(
    product, weights, residual, out, N, TOP_K: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [T, N] = residual + the sum over a token's picks of weights [T, TOP_K] times product [T, TOP_K, N]."""
    trigger(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    wait(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        weight = tl.load(weights + token * TOP_K + j)
        total += weight * tl.load(product + (token * TOP_K + j) * N + n, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + token * N + n, mask=inside, other=0.0)
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class ProductTiles:
    """A program's part of a product: rows of x, columns of the result, and 32 * groups columns of x a step.

    swap: W is the first operand, for fewer rows of x than the tensor cores take there.
    pipelined: ``_wgmma_kernel``, of two groups a step.
    """

    tokens: int
    rows: int
    groups: int
    warps: int
    stages: int
    swap: bool = False
    pipelined: bool = False


def tiles_for(tokens: int, gated: bool, kind: BlockKind, k: int, device: torch.device) -> ProductTiles:
    """Tiles for blocks of up to ``tokens`` rows of x."""
    rows = 64 if gated else 128
    if tokens < 64:
        return ProductTiles(tokens, rows, 2, 4, 3, swap=True)
    if tokens >= 128 and capability(device)[0] == 9 and kind.bits == 4 and k % 64 == 0:
        return ProductTiles(tokens, rows, 2, 8, 4, pipelined=True)
    return ProductTiles(min(tokens, 128), rows, 2, 4 if tokens == 64 else 8, 3)


def packed_matmul(
    x: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
    tiles: ProductTiles | None = None,
) -> torch.Tensor:
    """Launch ``_product_kernel`` over all rows of x; arguments as the op's, and ``tiles`` in place of the rule's."""
    tokens = x.shape[0]
    n = words.shape[0] // (1 if gated is None else 2)
    out = torch.empty((tokens, n), dtype=out_dtype, device=x.device)
    if tokens == 0:
        return out
    if tiles is None:
        most = 16 if tokens <= 16 else 32 if tokens <= 32 else 64 if tokens <= 64 else 128
        if tokens > 1024 and gated is None:
            most = 256
        tiles = tiles_for(most, gated is not None, KINDS[kind], x.shape[1], x.device)
    programs = triton.cdiv(tokens, tiles.tokens) * triton.cdiv(n, tiles.rows)
    planes = (words, d, high, m, sub_d, sub_m)
    _launch(x, planes, kind, bias, residual, gated, out, None, None, n, 1, programs, "all", tiles)
    return out


def sort_picks(ids: torch.Tensor, num_experts: int, block_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_sort_kernel``; arguments as the op's."""
    picks = ids.numel()
    order = torch.empty((picks,), dtype=torch.int32, device=ids.device)
    blocks = torch.empty((picks // block_rows + num_experts, 3), dtype=torch.int32, device=ids.device)
    block = max(64, min(4096, triton.next_power_of_2(picks)))
    _sort_kernel[(num_experts,)](
        ids, order, blocks, picks, num_experts, block_rows, block, num_warps=max(1, min(8, block // 256)),
        **launch_options(ids.device),
    )  # fmt: skip
    return order, blocks


def grouped_gate_up(
    x: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    order: torch.Tensor,
    blocks: torch.Tensor,
    num_experts: int,
    top_k: int,
    block_rows: int,
    gated: str,
    out_dtype: torch.dtype,
    tiles: ProductTiles | None = None,
) -> torch.Tensor:
    """Launch ``_product_kernel`` over blocks of picks; arguments as the op's."""
    n = words.shape[0] // num_experts // 2
    out = torch.empty((order.shape[0], n), dtype=out_dtype, device=x.device)
    tiles = tiles or tiles_for(block_rows, True, KINDS[kind], x.shape[1], x.device)
    assert tiles.tokens == block_rows, f"{tiles} for blocks of {block_rows}"
    programs = blocks.shape[0] * triton.cdiv(n, tiles.rows)
    planes = (words, d, high, m, sub_d, sub_m)
    if order.shape[0]:
        _launch(x, planes, kind, None, None, gated, out, order, blocks, n, top_k, programs, "gather", tiles)
    return out


def grouped_down(
    act: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    order: torch.Tensor,
    blocks: torch.Tensor,
    num_experts: int,
    block_rows: int,
    weights: torch.Tensor,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    tiles: ProductTiles | None = None,
) -> torch.Tensor:
    """Launch ``_product_kernel`` over blocks of picks, then ``_weighted_sum_kernel``; arguments as the op's."""
    n = words.shape[0] // num_experts
    tokens, top_k = weights.shape
    out = torch.empty((tokens, n), dtype=out_dtype, device=act.device)
    if tokens == 0:
        return out
    tiles = tiles or tiles_for(block_rows, False, KINDS[kind], act.shape[1], act.device)
    assert tiles.tokens == block_rows, f"{tiles} for blocks of {block_rows}"
    product = torch.empty((order.shape[0], n), dtype=torch.bfloat16, device=act.device)
    programs = blocks.shape[0] * triton.cdiv(n, tiles.rows)
    planes = (words, d, high, m, sub_d, sub_m)
    _launch(act, planes, kind, None, None, None, product, order, blocks, n, top_k, programs, "scatter", tiles)
    block = min(2048, triton.next_power_of_2(n))
    _weighted_sum_kernel[(tokens, triton.cdiv(n, block))](
        product, weights, residual if residual is not None else out, out, n, top_k, residual is not None, block,
        num_warps=max(1, min(8, block // 256)), **launch_options(act.device),
    )  # fmt: skip
    return out


Planes = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


def _launch(
    x: torch.Tensor,
    planes: Planes,
    kind: str,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out: torch.Tensor,
    order: torch.Tensor | None,
    blocks: torch.Tensor | None,
    n: int,
    top_k: int,
    programs: int,
    rows: str,
    tiles: ProductTiles,
) -> None:
    words, d, high, m, sub_d, sub_m = planes
    x = x.to(torch.bfloat16)
    if (x.data_ptr() | x.stride(0) * 2) % 16:  # rows are copied to shared memory 16 bytes at a time
        x = x.clone(memory_format=torch.contiguous_format)
    constants = kind_constants(KINDS[kind])
    bytes_, high, d, m, sub_d, sub_m = pairs(words.view(torch.uint8), d, high, m, sub_d, sub_m, KINDS[kind])
    after = (
        bias if bias is not None else d, residual if residual is not None else out, out,
        order if order is not None else d, blocks if blocks is not None else d, x.shape[0], n, top_k,
        n * (1 if gated is None else 2), x.shape[1],
    )  # fmt: skip
    flags = (rows, bias is not None, residual is not None, gated)
    if tiles.pipelined:
        both = tiles.rows * (1 if gated is None else 2)
        _wgmma_kernel[(programs,)](
            x, x.stride(0), bytes_, d, m, sub_d, sub_m, *after, *constants[1:], tiles.tokens, both, tiles.stages,
            *flags, num_warps=tiles.warps, **launch_options(x.device),
        )  # fmt: skip
    else:
        _product_kernel[(programs,)](
            x, x.stride(0), bytes_, high, d, m, sub_d, sub_m, *after, *constants, tiles.tokens, tiles.rows,
            tiles.groups, tiles.swap, *flags, num_warps=tiles.warps, num_stages=tiles.stages,
            **launch_options(x.device),
        )  # fmt: skip
