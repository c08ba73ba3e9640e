"""One kernel whose first programs multiply by the output matrix, and whose last ones by the router.

Both need the row x alone: the router's logits are router · (norm * residual) + folded · x, and no program waits for
another's part of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import head_norm
from ostinato.kernels.block_linear.planes import kind_constants, pairs
from ostinato.kernels.block_linear.rounded.triton import (
    add_all,
    hand_on,
    load_rows,
    load_unsummed,
    row_sums,
    sharers,
    with_row_sums,
)
from ostinato.kernels.lanes.triton import row_of, share, sum_rows
from ostinato.kernels.launch import launch_options
from ostinato.kernels.moe.ref import HANDED
from ostinato.kernels.triton import load_float, load_floats, load_word, nothing, store_own, trigger, wait
from ostinato.quant.blocks import KINDS


@dataclass(frozen=True)
class RoutedTiles:
    """rows: of the weight a program, a multiple of 16. groups: of 32 columns a step. routes: logits a program."""

    rows: int
    groups: int
    warps: int
    routes: int


def default_tiles(n: int, k: int) -> RoutedTiles:
    """Tiles by rule, from measurements at N = 2048, K = 4096: fewer programs than multiprocessors."""
    groups = min(32, triton.next_power_of_2(k // 32))
    rows = 2 * HANDED if n >= 2048 else HANDED
    return RoutedTiles(rows, groups, max(1, groups // 4), 8)


@triton.jit
def _signed(word, AT: tl.constexpr):
    """Byte AT of each word as float32."""
    return ((word << (24 - 8 * AT)) >> 24).to(tl.float32)


@triton.jit
def _store_logits(
    first, x_words, x_scales, squares, eps, residual, norm, router, folded, logits, ROUTES, N: tl.constexpr,
    K: tl.constexpr, TOGETHER: tl.constexpr, HEADS: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits first … first + TOGETHER - 1, of which every thread adds some quads of columns."""
    OF_X: tl.constexpr = (K + 4 * THREADS - 1) // (4 * THREADS)
    OF_H: tl.constexpr = (N + 4 * THREADS - 1) // (4 * THREADS)
    WARPS: tl.constexpr = THREADS // 32
    thread = tl.arange(0, WARPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    gains = nothing()
    for i in tl.static_range(OF_H):
        at = (i * THREADS + thread) * 4
        gains += load_floats(norm + at, at < N)
    weights = nothing()
    for t in tl.static_range(TOGETHER):
        row = tl.minimum(first + t, ROUTES - 1)
        for i in tl.static_range(OF_X):
            at = (i * THREADS + thread) * 4
            weights += load_floats(folded + row * K + at, at < K)
        for i in tl.static_range(OF_H):
            at = (i * THREADS + thread) * 4
            r0, r1, r2, r3 = load_floats(router + row * N + at, at < N)
            weights += (
                r0 * gains[4 * i], r1 * gains[4 * i + 1], r2 * gains[4 * i + 2], r3 * gains[4 * i + 3],
            )  # fmt: skip
    wait(PDL)
    values = nothing()
    for i in tl.static_range(OF_X):
        at = i * THREADS + thread
        word = load_word(x_words + at, at < K // 4)
        scale = load_float(x_scales + at // 8, at < K // 4)
        if HEADS > 0:
            scale *= head_norm(squares, 0, at // 8, at < K // 4, K, HEADS, eps)
        values += (
            _signed(word, 0) * scale, _signed(word, 1) * scale, _signed(word, 2) * scale, _signed(word, 3) * scale,
        )  # fmt: skip
    for i in tl.static_range(OF_H):
        at = (i * THREADS + thread) * 4
        values += load_floats(residual + at, at < N)
    COUNT: tl.constexpr = 4 * (OF_X + OF_H)
    sums = nothing()
    for t in tl.static_range(TOGETHER):
        total = values[0] * weights[t * COUNT]
        for i in tl.static_range(1, COUNT):
            total += values[i] * weights[t * COUNT + i]
        sums += (total,)
    total = sum_rows(sums, TOGETHER, 1, 1, 32)[0]
    lane = thread % 32
    of = row_of(lane, TOGETHER, 1, 32)
    if WARPS > 1:
        places = nothing()
        for i in tl.static_range(WARPS):
            places += (of * WARPS + i,)
        place = of * WARPS + thread // 32
        found = share((total, place, lane < TOGETHER), places, 1, WARPS, TOGETHER * WARPS)
        total = found[0]
        for i in tl.static_range(1, WARPS):
            total += found[i]
    store_own(logits + first + of, total, (thread < TOGETHER) & (first + of < ROUTES))


@triton.jit
def _store_rows(
    start, x_words, x_scales, squares, eps, words, high, d, m, sub_d, sub_m, residual, norm, out, next_x, next_scale,
    next_squares, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr,
    OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, R: tl.constexpr, W: tl.constexpr, NG: tl.constexpr,
    HEADS: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows start … start + R * W - 1 of the weight, each in NG lanes of a warp, and the row for the experts."""
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + NG - 1) // NG
    MIN: tl.constexpr = MIN_SIGN != 0
    w = tl.arange(0, W)[None, None, :, None]
    g = tl.arange(0, NG)[None, None, None, :] + w * 0
    planes = nothing() + (words, high, d, m, sub_d, sub_m)  # noqa: RUF005
    tiles = nothing()  # all of them: one loaded a step ahead would come from memory after the wait
    for step in tl.static_range(STEPS):
        tiles += (load_rows(planes, start + w * R, N - 1, step * NG + g, R, KG, BITS, GROUP, SUPER, MIN),)
    n = start + w * R + row_of(g, R, 1, NG)  # the lane's own, once the lanes have added what they have
    mine = (g < R) & (n < N)
    gain = load_float(norm + n, n < N)
    wait(PDL)
    added = load_float(residual + n, n < N)
    S: tl.constexpr = sharers(GROUP, SUPER)
    KEPT: tl.constexpr = max(1, R // S)
    sums = nothing()
    for step in tl.static_range(STEPS):
        at = step * NG + g
        x = load_unsummed(x_words, x_scales, at, KG, 8)
        if HEADS > 0:
            scale = x[8] * head_norm(squares, 0, at, at < KG, K, HEADS, eps)
            x = (x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], scale)
        x = with_row_sums(x, 8, GROUP, MIN or OFFSET != 0)
        more = row_sums(tiles[step], x, R, 8, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
        sums = more if step == 0 else add_all(sums, more, KEPT)
    total = sum_rows(sums, KEPT, 1, S, NG)[0] + added
    store_own(out + n, total, mine)
    SPAN: tl.constexpr = NG * SHARE // R
    hand_on(total, gain, n, mine, w * NG + g, SPAN, SHARE, W * NG, next_x, next_scale, next_squares, N)


@triton.jit
def _routed_kernel(
    x_words, x_scales, squares, eps, words, high, d, m, sub_d, sub_m, residual, norm, router, folded, out, next_x,
    next_scale, next_squares, logits, ROUTES, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, NG: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr, TOGETHER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    program = tl.program_id(0)
    if program * (R * W) < N:
        _store_rows(
            program * (R * W), x_words, x_scales, squares, eps, words, high, d, m, sub_d, sub_m, residual, norm, out,
            next_x, next_scale, next_squares, N, K, BITS, GROUP, SUPER, OFFSET, MIN_SIGN, R, W, NG, HEADS, SHARE, PDL,
        )  # fmt: skip
    else:
        _store_logits(
            (program - (N + R * W - 1) // (R * W)) * TOGETHER, x_words, x_scales, squares, eps, residual, norm, router,
            folded, logits, ROUTES, N, K, TOGETHER, HEADS, W * NG, PDL,
        )  # fmt: skip


def routed_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    squares: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    norm: torch.Tensor,
    router: torch.Tensor,
    folded: torch.Tensor,
    tiles: RoutedTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments and results as the op's, and ``tiles`` in place of the rule's."""
    n, k, routes, device = words.shape[0], x.shape[1], router.shape[0], x.device
    t = default_tiles(n, k) if tiles is None else tiles
    lanes = min(32, t.groups)
    width = t.warps * 32 // lanes
    assert t.rows % HANDED == 0, "a program rounds whole groups of columns"
    assert t.rows % width == 0, "no thread without a row"
    assert t.rows // width <= lanes, "no lane with sums of two rows"
    assert t.routes <= 32, "no lane with two logits"
    out = torch.empty((1, n), dtype=torch.float32, device=device)
    next_x = torch.empty((1, n), dtype=torch.int8, device=device)
    next_scale = torch.empty((1, n // HANDED), dtype=torch.float32, device=device)
    next_squares = torch.empty((1, 1, n // HANDED), dtype=torch.float32, device=device)
    logits = torch.empty((1, routes), dtype=torch.float32, device=device)
    _routed_kernel[(triton.cdiv(n, t.rows) + triton.cdiv(routes, t.routes),)](
        x.view(torch.int32), scale, squares if squares is not None else scale, eps,
        *pairs(words, d, high, m, sub_d, sub_m, KINDS[kind]), residual, norm, router, folded,
        out, next_x, next_scale, next_squares, logits, routes, n, k, *kind_constants(KINDS[kind]),
        t.rows // width, width, lanes, squares.shape[1] if squares is not None else 0, HANDED, t.routes,
        num_warps=t.warps, **launch_options(device),
    )  # fmt: skip
    return out, next_x, next_scale, next_squares, logits
