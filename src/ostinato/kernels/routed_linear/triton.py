"""One kernel whose first programs multiply by the output matrix, and whose last ones by the router.

Both need the row x alone: the router's logits are router · (norm * residual) + folded · x, and no program waits for
another's part of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ostinato.kernels.block_linear.matvec.triton import head_norm, load_tile, products, with_sums
from ostinato.kernels.block_linear.planes import kind_constants, pairs
from ostinato.kernels.block_linear.rounded.triton import store_handed
from ostinato.kernels.launch import launch_options
from ostinato.kernels.moe.ref import HANDED
from ostinato.kernels.triton import load_floats, load_word, load_words, nothing, trigger, wait
from ostinato.quant.blocks import KINDS


@dataclass(frozen=True)
class RoutedTiles:
    """rows: of the weight a program, a multiple of 16. groups: of 32 columns a step. routes: logits a program."""

    rows: int
    groups: int
    warps: int
    routes: int


def default_tiles(k: int) -> RoutedTiles:
    """Tiles by rule, from measurements at K = 4096."""
    groups = min(32, triton.next_power_of_2(k // 32))
    return RoutedTiles(HANDED, groups, max(1, groups // 4), 4)


@triton.jit
def _signed(word, AT: tl.constexpr):
    """Byte AT of each word as float32."""
    return ((word << (24 - 8 * AT)) >> 24).to(tl.float32)


@triton.jit
def _store_logits(
    first, x_words, x_scales, squares, eps, residual, norm, router, folded, logits, ROUTES, N: tl.constexpr,
    K: tl.constexpr, TOGETHER: tl.constexpr, HEADS: tl.constexpr, NG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits first … first + TOGETHER - 1. Tensors are [TOGETHER, NG, 4]: a thread has quads of columns of each row."""
    KG: tl.constexpr = K // 32
    SHARE: tl.constexpr = 16  # columns of the residual that go with a group
    STEPS: tl.constexpr = (N + NG * SHARE - 1) // (NG * SHARE)
    j = tl.arange(0, 4)[None, None, :]
    g = tl.arange(0, NG)[None, :, None] + j * 0
    j = j + g * 0
    n = tl.minimum(first + tl.arange(0, TOGETHER), ROUTES - 1)[:, None, None]
    inside = g < KG
    both = (n >= 0) & inside
    column = g * 32 + j * 4
    a0, a1, a2, a3 = load_floats(folded + n * K + column, both)
    a4, a5, a6, a7 = load_floats(folded + n * K + column + 16, both)
    weights = nothing()
    for step in tl.static_range(STEPS):
        at = (step * NG + g) * SHARE + j * 4
        p0, p1, p2, p3 = load_floats(norm + at, at < N)
        r0, r1, r2, r3 = load_floats(router + n * N + at, (n >= 0) & (at < N))
        weights += (r0 * p0, r1 * p1, r2 * p2, r3 * p3)
    wait(PDL)
    low = load_word(x_words + g * 8 + j, inside)
    upp = load_word(x_words + g * 8 + j + 4, inside)
    scale = load_word(x_scales + g, inside).to(tl.float32, bitcast=True)
    if HEADS > 0:
        scale *= head_norm(squares, 0, g, inside, K, HEADS, eps)
    total = (_signed(low, 0) * a0 + _signed(low, 1) * a1) + (_signed(low, 2) * a2 + _signed(low, 3) * a3)
    total += (_signed(upp, 0) * a4 + _signed(upp, 1) * a5) + (_signed(upp, 2) * a6 + _signed(upp, 3) * a7)
    total *= scale
    for step in tl.static_range(STEPS):
        at = (step * NG + g) * SHARE + j * 4
        h0, h1, h2, h3 = load_floats(residual + at, at < N)
        total += (h0 * weights[4 * step] + h1 * weights[4 * step + 1]) + (
            h2 * weights[4 * step + 2] + h3 * weights[4 * step + 3]
        )
    which = first + tl.arange(0, TOGETHER)
    tl.store(logits + which, tl.sum(tl.sum(total, 2), 1), mask=which < ROUTES)


@triton.jit
def _store_rows(
    start, x_words, x_scales, squares, eps, words, high, d, m, sub_d, sub_m, residual, norm, out, next_x, next_scale,
    next_squares, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr,
    OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, R: tl.constexpr, W: tl.constexpr, NG: tl.constexpr,
    HEADS: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows start … start + R * W - 1 of the weight, as in ``_streamed_kernel``, and the row for the experts."""
    KG: tl.constexpr = K // 32
    STEPS: tl.constexpr = (KG + NG - 1) // NG
    SUB: tl.constexpr = GROUP != SUPER
    MIN: tl.constexpr = MIN_SIGN != 0
    rows = tl.minimum(start + tl.arange(0, R)[None, :, None, None] * W + tl.arange(0, W)[None, None, :, None], N - 1)
    n = start + tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    group = start // SHARE + tl.arange(0, R * W // SHARE)
    column = group[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    g = tl.arange(0, NG)[None, None, None, :]
    lane = tl.arange(0, W)[None, None, :, None] * 0 + g
    tiles = nothing()  # all of them: one loaded a step ahead would come from memory after the wait
    for step in tl.static_range(STEPS):
        tiles += (load_tile(words, high, d, m, sub_d, sub_m, rows, step * NG + g, KG, BITS, SUPER, MIN, SUB),)
    gain = tl.load(norm + column, mask=column < N, other=0.0)
    wait(PDL)
    added = tl.load(residual + n, mask=n < N, other=0.0)
    acc = tl.zeros((1, R, W, NG), tl.float32)
    for step in tl.static_range(STEPS):
        at = step * NG + lane
        inside = at < KG
        w0, w1, w2, w3 = load_words(x_words + at * 8, inside)
        w4, w5, w6, w7 = load_words(x_words + at * 8 + 4, inside)
        scale = load_word(x_scales + at, inside).to(tl.float32, bitcast=True)
        if HEADS > 0:
            scale *= head_norm(squares, 0, at, inside, K, HEADS, eps)
        quantized = with_sums(w0, w1, w2, w3, w4, w5, w6, w7, scale, GROUP, MIN or OFFSET != 0)
        acc += products(tiles[step], quantized, BITS, GROUP, OFFSET, MIN_SIGN, SUB)
    total = tl.reshape(tl.sum(acc, 3), (R, W)) + added
    tl.store(out + n, total, mask=n < N)
    shared = tl.reshape(total, (R * W // SHARE, SHARE))
    store_handed(shared, gain, group, next_x, next_scale, next_squares, N)


@triton.jit
def _routed_kernel(
    x_words, x_scales, squares, eps, words, high, d, m, sub_d, sub_m, residual, norm, router, folded, out, next_x,
    next_scale, next_squares, logits, ROUTES, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, NG: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr, TOGETHER: tl.constexpr,
    KG_UP: tl.constexpr, PDL: tl.constexpr,
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
            folded, logits, ROUTES, N, K, TOGETHER, HEADS, KG_UP, PDL,
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
    t = default_tiles(k) if tiles is None else tiles
    width = max(1, t.warps * 32 // t.groups)
    assert t.rows % HANDED == 0, "a program rounds whole groups of columns"
    assert t.rows % width == 0, "no thread without a row"
    out = torch.empty((1, n), dtype=torch.float32, device=device)
    next_x = torch.empty((1, n), dtype=torch.int8, device=device)
    next_scale = torch.empty((1, n // HANDED), dtype=torch.float32, device=device)
    next_squares = torch.empty((1, 1, n // HANDED), dtype=torch.float32, device=device)
    logits = torch.empty((1, routes), dtype=torch.float32, device=device)
    _routed_kernel[(triton.cdiv(n, t.rows) + triton.cdiv(routes, t.routes),)](
        x.view(torch.int32), scale.view(torch.int32), squares if squares is not None else scale, eps,
        *pairs(words, d, high, m, sub_d, sub_m, KINDS[kind]), residual, norm, router, folded,
        out, next_x, next_scale, next_squares, logits, routes, n, k, *kind_constants(KINDS[kind]),
        t.rows // width, width, t.groups, squares.shape[1] if squares is not None else 0, HANDED, t.routes,
        triton.next_power_of_2(k // 32), num_warps=t.warps, **launch_options(device),
    )  # fmt: skip
    return out, next_x, next_scale, next_squares, logits
