"""Launching block-quantized products: which kernel, which tiles, and what has to run before and after it."""

from __future__ import annotations

import functools

import torch
import triton

from ostinato.kernels.block_linear.batch.triton import _mma_kernel
from ostinato.kernels.block_linear.matmul.triton import _dequantize_kernel, _finish_kernel, _tile_kernel
from ostinato.kernels.block_linear.matvec.triton import _resident_kernel, _streamed_kernel
from ostinato.kernels.block_linear.planes import kind_constants, pairs
from ostinato.kernels.block_linear.rounded.triton import _rounded_kernel
from ostinato.kernels.block_linear.wide.triton import _round_kernel, _wide_kernel
from ostinato.kernels.grouped_linear.triton import packed_matmul
from ostinato.kernels.launch import gpu_name, launch_options, num_multiprocessors
from ostinato.kernels.rms_norm.triton import rms_norm, rms_norm_quantize, row_warps
from ostinato.kernels.tuning import Tiles, linear_key, table
from ostinato.quant.blocks import KINDS, BlockKind

SMALL = 2**21  # elements of a weight whose products are bound by their start and not by memory
DENSE_BYTES = 256 << 20  # the most that a product of many rows dequantizes at a time


def block_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Launch the kernels for x [M, K]; arguments as the op's, and ``tiles`` in place of the table's."""
    tokens, k = x.shape
    n = words.shape[0] // (1 if gated is None else 2)
    out = torch.empty((tokens, n), dtype=out_dtype, device=x.device)
    if tokens == 0:
        return out
    if tiles is None:
        tiles = choose(kind, n, k, tokens, gated is not None, x.device)
    constants = kind_constants(KINDS[kind])
    options = launch_options(x.device)
    if tiles.path in ("resident", "streamed", "mma"):
        planes = pairs(words, d, high, m, sub_d, sub_m, KINDS[kind])
        after = (bias if bias is not None else d, residual if residual is not None else out, out, tokens, n, k)
        flags = (bias is not None, residual is not None, gated)
        if tiles.path == "resident":
            if (x.data_ptr() | x.stride(0) * x.element_size()) % 16:  # the kernel loads four elements at a time
                x = x.clone(memory_format=torch.contiguous_format)
            grid = (triton.cdiv(n, tiles.rows * tiles.repeats), triton.cdiv(tokens, tiles.tokens))
            _resident_kernel[grid](
                x, x.stride(0), norm if norm is not None else d, eps, *planes, *after, *constants,
                tiles.rows, tiles.groups, tiles.repeats, tiles.tokens, norm is not None, *flags,
                num_warps=tiles.warps, **options,
            )  # fmt: skip
            return out
        quantized, scales = rms_norm_quantize(x, norm, eps)
        quantized, scales = quantized.view(torch.int32), scales.view(torch.int32)
        grid = (triton.cdiv(n, tiles.rows), triton.cdiv(tokens, tiles.tokens))
        if tiles.path == "mma":
            _mma_kernel[grid](
                quantized, scales, *planes, *after, *constants,
                tiles.rows // 16, tiles.tokens // 8, tiles.warps, *flags, num_warps=tiles.warps, **options,
            )  # fmt: skip
        else:
            _streamed(quantized, scales, None, eps, planes, after, constants, flags, tiles)
        return out
    if tiles.path == "wide":
        _wide(x, norm, eps, words, high, d, m, bias, residual, out, KINDS[kind], gated, tiles)
        return out
    if tiles.path == "packed":
        x = rms_norm(x, norm, eps, torch.bfloat16) if norm is not None else x.to(torch.bfloat16)
        return packed_matmul(x, words, d, high, m, sub_d, sub_m, kind, bias, residual, gated, out_dtype)
    planes = pairs(words.view(torch.uint8), d, high, m, sub_d, sub_m, KINDS[kind])
    if norm is not None and (tiles.path == "gemm" or tiles.splits > 1):
        x, norm = rms_norm(x, norm, eps, torch.bfloat16), None
    if tiles.path == "gemm":
        alone = residual if bias is None else None
        wide = out_dtype == torch.float32 and gated is None
        product = _gemm(x.to(torch.bfloat16), planes, words.shape[0], constants, alone, wide, tiles)
        if bias is None and gated is None and product.dtype == out_dtype:
            return product
        _finish(product, 1, bias, residual if alone is None else None, gated, out)
        return out
    whole = tiles.splits == 1
    rows = n if whole else words.shape[0]
    product = out if whole else torch.empty((tiles.splits, tokens, rows), dtype=torch.float32, device=x.device)
    grid3 = (triton.cdiv(tokens, tiles.tokens), triton.cdiv(rows, tiles.rows), tiles.splits)
    _tile_kernel[grid3](
        x, x.stride(0), norm if norm is not None else d, eps, *planes, bias if bias is not None else d,
        residual if residual is not None else out, product, tokens, rows, k, *constants,
        tiles.rows, tiles.groups, tiles.tokens, tiles.splits, norm is not None,
        whole and bias is not None, whole and residual is not None, gated if whole else None,
        num_warps=tiles.warps, num_stages=tiles.stages, **options,
    )  # fmt: skip
    if not whole:
        _finish(product, tiles.splits, bias, residual, gated, out)
    return out


def int8_linear(
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
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Launch the kernel for x int8 [M, K]; arguments as the op's, and ``tiles`` in place of the table's."""
    (tokens, k), n = x.shape, words.shape[0]
    out = torch.empty((tokens, n), dtype=out_dtype, device=x.device)
    if tokens == 0:
        return out
    if tiles is None:
        tiles = _int8_tiles(kind, n, k, tokens, x.device)
    planes = pairs(words, d, high, m, sub_d, sub_m, KINDS[kind])
    constants = kind_constants(KINDS[kind])
    words_of_x = x.view(torch.int32)
    if scale.shape[1] == k // 32:
        after = (d, residual if residual is not None else out, out, tokens, n, k)
        flags = (False, residual is not None, None)
        _streamed(words_of_x, scale.view(torch.int32), squares, eps, planes, after, constants, flags, tiles)
        return out
    _rounded(words_of_x, scale, squares, eps, planes, residual, out, k, constants, tiles, None)
    return out


def int8_linear_beside(
    x: torch.Tensor,
    scale: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    squares: torch.Tensor,
    eps: float,
    h: torch.Tensor,
    norm: torch.Tensor,
    beside: torch.Tensor,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments and results as the op's, and ``tiles`` in place of the table's."""
    k, n = x.shape[1], words.shape[0]
    out = torch.empty((1, n), dtype=out_dtype, device=x.device)
    logits = torch.empty((1, beside.shape[0]), dtype=torch.float32, device=x.device)
    if tiles is None:
        tiles = _int8_tiles(kind, n, k, 1, x.device)
    planes = pairs(words, d, high, m, sub_d, sub_m, KINDS[kind])
    given = h, norm, beside, logits
    _rounded(x.view(torch.int32), scale, squares, eps, planes, None, out, k, kind_constants(KINDS[kind]), tiles, given)
    return out, logits


def _rounded(
    x: torch.Tensor,
    scale: torch.Tensor,
    squares: torch.Tensor | None,
    eps: float,
    planes: tuple[torch.Tensor, ...],
    residual: torch.Tensor | None,
    out: torch.Tensor,
    k: int,
    constants: tuple[int, ...],
    tiles: Tiles,
    beside: tuple[torch.Tensor, ...] | None,
) -> None:
    """Launch ``_rounded_kernel`` for x of int8 words. beside: what stands from h to logits in its arguments."""
    (tokens, n), parts = out.shape, squares.shape[2] if squares is not None else 0
    lanes = min(32, tiles.groups)
    width = tiles.warps * 32 // lanes
    rows = max(tiles.rows, width)  # no thread without a row
    assert rows % width == 0, f"{tiles} leaves threads without a row"
    assert rows // width <= lanes, f"{tiles} has more rows than lanes for their sums"
    count = 0 if beside is None else beside[2].shape[0]
    # One kernel for products with and without rows beside them: two would not stay in the instruction cache.
    may_have = tokens == 1 and squares is not None and residual is None
    _rounded_kernel[(triton.cdiv(n, rows) + triton.cdiv(count, tiles.warps), tokens)](
        x, scale, squares if squares is not None else scale, eps, *planes,
        residual if residual is not None else out, out, *(beside or (scale, scale, out, scale)),
        count, n, k, *constants, rows // width, width, lanes, parts, residual is not None, may_have,
        num_warps=tiles.warps, **launch_options(out.device),
    )  # fmt: skip


def prefers_int8(kind: str, n: int, k: int, m: int, device: torch.device) -> bool:
    """Arguments as for ``choose``; see ``ostinato.kernels.block_linear.prefers_int8``."""
    return _measured_int8(kind, n, k, m, device) is not None or choose(kind, n, k, m, False, device).path == "streamed"


def _measured_int8(kind: str, n: int, k: int, m: int, device: torch.device) -> Tiles | None:
    return table(gpu_name(device)).get(linear_key(kind, n, k, m, False) + " int8")


def _int8_tiles(kind: str, n: int, k: int, m: int, device: torch.device) -> Tiles:
    """Tiles of ``int8_linear``: measured for it, else those with which ``block_linear`` runs the same kernel."""
    tiles = _measured_int8(kind, n, k, m, device) or choose(kind, n, k, m, False, device)
    return tiles if tiles.path == "streamed" else default_int8_tiles(n, k, m)


def default_int8_tiles(n: int, k: int, m: int) -> Tiles:
    """Tiles of ``int8_linear`` by rule: one warp a program where those are many, as was fastest for one row."""
    groups = min(64, triton.next_power_of_2(k // 32))
    rows, warps = (8, 1) if m == 1 and n >= 8192 else (8 if n > 4096 else 4, 2)
    rows = max(rows, warps * 32 // groups)  # no thread without a row
    return Tiles("streamed", rows, groups, tokens=min(4, triton.next_power_of_2(m)), warps=warps)


def _streamed(
    x: torch.Tensor,
    scale: torch.Tensor,
    squares: torch.Tensor | None,
    eps: float,
    planes: tuple[torch.Tensor, ...],
    after: tuple[torch.Tensor | int, ...],
    constants: tuple[int, ...],
    flags: tuple[bool | str | None, ...],
    tiles: Tiles,
) -> None:
    """Launch ``_streamed_kernel`` for x of int8 words with their scales' bits; ``after`` and ``flags`` are its own."""
    tokens, n = after[3], after[4]
    width = rows_side_by_side(tiles)
    grid = (triton.cdiv(n, tiles.rows), triton.cdiv(tokens, tiles.tokens))
    _streamed_kernel[grid](
        x, scale, squares if squares is not None else planes[2], eps, *planes, *after, *constants,
        tiles.rows // width, width, tiles.groups, tiles.tokens, squares.shape[1] if squares is not None else 0, *flags,
        num_warps=tiles.warps, **launch_options(x.device),
    )  # fmt: skip


def rows_side_by_side(tiles: Tiles) -> int:
    """Rows of W next to each other over the threads of a program that streams W."""
    width = max(1, tiles.warps * 32 // tiles.groups)
    assert tiles.rows % width == 0, f"{tiles} leaves threads without a row"
    return width


def takes_wide(kind: BlockKind) -> bool:
    """Whether the path ``wide`` multiplies weights of this kind."""
    return kind.group in (64, 128) and kind.bits in (4, 6) and not kind.has_sub and kind.bits * kind.group < 768


def _wide(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    words: torch.Tensor,
    high: torch.Tensor | None,
    d: torch.Tensor,
    m: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    kind: BlockKind,
    gated: str | None,
    tiles: Tiles,
) -> None:
    """Launch the kernels of ``wide``. tiles.rows: a multiple of 16; tokens: of 8; groups: spans of a warp at a time."""
    assert takes_wide(kind), f"{kind.name} has no wide product"
    tokens, k = x.shape
    span = kind.group
    eights = triton.cdiv(tokens, 8)
    rounded = torch.empty((eights, k // span, span * 2), dtype=torch.int32, device=x.device)
    factors = torch.empty((eights, k // span, 16), dtype=torch.float32, device=x.device)
    spans, options = triton.next_power_of_2(k // span), launch_options(x.device)
    _round_kernel[(eights * 8,)](
        x, x.stride(0), norm if norm is not None else d, eps,
        rounded.view(torch.int8), factors, tokens, k, span, spans, norm is not None,
        num_warps=row_warps(spans * span), **options,
    )  # fmt: skip
    _multiply_eights(rounded, factors, words, high, d, m, bias, residual, out, kind, gated, tiles)


def _multiply_eights(
    rounded: torch.Tensor,
    factors: torch.Tensor,
    words: torch.Tensor,
    high: torch.Tensor | None,
    d: torch.Tensor,
    m: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    kind: BlockKind,
    gated: str | None,
    tiles: Tiles,
) -> None:
    """Launch ``_wide_kernel`` for rows of int8 by eight (int32 words) and their factors."""
    tokens, n = out.shape
    span = kind.group
    grid = (triton.cdiv(n, tiles.rows), triton.cdiv(tokens, tiles.tokens))
    scales = d.view(torch.int16)
    _wide_kernel[grid](
        rounded, factors.view(torch.int32), words, high if high is not None else words, scales,
        m.view(torch.int16) if m is not None else scales, bias if bias is not None else d,
        residual if residual is not None else out, out, tokens, n, rounded.shape[1] * span, kind.bits, span,
        kind.offset, kind.min_sign, tiles.rows // 16, tiles.tokens // 8, tiles.groups, tiles.warps, bias is not None,
        residual is not None, gated, num_warps=tiles.warps, **launch_options(out.device),
    )  # fmt: skip


def eights_linear(
    x: torch.Tensor,
    factors: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    m: torch.Tensor | None,
    kind: str,
    rows: int,
    residual: torch.Tensor | None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Launch ``_wide_kernel``; arguments as the op's, and ``tiles`` in place of the table's."""
    n, k = words.shape[0], x.shape[1] * KINDS[kind].group
    out = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    if tiles is None:
        tiles = choose(kind, n, k, rows, False, x.device)
    if tiles.path != "wide":
        tiles = wide_tiles(n, x.shape[1], rows, False)
    _multiply_eights(x.view(torch.int32), factors, words, None, d, m, None, residual, out, KINDS[kind], None, tiles)
    return out


def _gemm(
    x: torch.Tensor,
    planes: tuple[torch.Tensor, ...],
    rows: int,
    constants: tuple[int, ...],
    residual: torch.Tensor | None,
    wide: bool,
    tiles: Tiles,
) -> torch.Tensor:
    """x Wᵀ (plus residual) through a dense copy of a stretch of W's rows at a time.

    The result is float32 if ``wide`` or with a residual, else bfloat16.
    """
    tokens, k = x.shape
    step = min(rows, max(256, DENSE_BYTES // (2 * k) // 256 * 256))  # an odd stretch would leave the fast products
    dtype = torch.float32 if wide or residual is not None else torch.bfloat16
    product = None if step == rows else torch.empty((tokens, rows), dtype=dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        dense = dequantize_rows(tuple(p[start:stop] for p in planes), stop - start, k, constants, tiles)
        if residual is None:
            part = torch.mm(x, dense.T, out_dtype=dtype) if wide else x @ dense.T
        else:
            part = torch.addmm(residual[:, start:stop], x, dense.T, out_dtype=torch.float32)
        if product is None:
            return part
        product[:, start:stop] = part
    assert product is not None
    return product


def dequantize_rows(
    planes: tuple[torch.Tensor, ...], rows: int, k: int, constants: tuple[int, ...], tiles: Tiles
) -> torch.Tensor:
    """The matrix of all ``rows`` in bfloat16 [rows, K]."""
    dense = torch.empty((rows, k), dtype=torch.bfloat16, device=planes[0].device)
    grid = (triton.cdiv(rows, tiles.rows), triton.cdiv(k // 32, tiles.groups))
    _dequantize_kernel[grid](
        *planes, dense, rows, k, *constants, tiles.rows, tiles.groups, num_warps=tiles.warps,
        **launch_options(dense.device),
    )  # fmt: skip
    return dense


def _finish(
    product: torch.Tensor,
    splits: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out: torch.Tensor,
) -> None:
    tokens, n = out.shape
    block = min(1024, triton.next_power_of_2(n))
    _finish_kernel[(tokens, triton.cdiv(n, block))](
        product, bias if bias is not None else product, residual if residual is not None else product, out, tokens, n,
        splits, bias is not None, residual is not None, gated, block, num_warps=max(1, min(4, block // 128)),
        **launch_options(out.device),
    )  # fmt: skip


@functools.cache
def choose(kind: str, n: int, k: int, m: int, gated: bool, device: torch.device) -> Tiles:
    """The tiles for a product: measured ones where the GPU's table has them, else a rule's."""
    measured = table(gpu_name(device)).get(linear_key(kind, n, k, m, gated))
    if measured is not None:
        return measured
    rows = n * (2 if gated else 1)
    if 2 < m <= 64 and rows * k > SMALL and takes_wide(KINDS[kind]):
        return wide_tiles(rows, k // KINDS[kind].group, m, gated)
    tiles = default_tiles(rows, k, m, num_multiprocessors(device))
    # A weight of our own kinds is never written out as a dense matrix; for GGUF's that is the faster way still.
    return Tiles("packed", 0, 0, 0, 0) if tiles.path == "gemm" and kind.startswith("I4_") else tiles


def wide_tiles(n: int, spans: int, m: int, gated: bool) -> Tiles:
    """Tiles of the path ``wide`` by rule: warps share the columns where there are few programs.

    A gated product holds two tiles of W at once, so half as much of each.
    """
    tokens = 8 if m <= 8 else 16
    programs = triton.cdiv(n, 16) * triton.cdiv(m, tokens)
    warps = max(1, min(8, 2048 // programs, spans))
    warps = 1 << (warps.bit_length() - 1)
    groups = max(1, min(2 if gated else 4, spans // warps))
    return Tiles("wide", 16, 1 << (groups.bit_length() - 1), tokens, warps)


def default_tiles(n: int, k: int, m: int, multiprocessors: int) -> Tiles:
    """Tiles by rule, for n rows of W in all (gate and up counted).

    Up to 16 rows of x: int8, with x in registers where W is small, else streamed; on the tensor cores where W is long
    and narrow, as an output layer is. More: bfloat16, on weights dequantized in registers where W is small, else a
    dense copy of W and the vendor's product.
    """
    groups = triton.next_power_of_2(k // 32)
    small = n * k <= SMALL
    top = triton.next_power_of_2(m)
    if m == 1:
        if groups <= 64 and n * k <= 2**25:
            rows = 4 if n <= multiprocessors * 6 else 8 if n <= multiprocessors * 16 else 16
            repeats = max(1, min(4, n // (rows * multiprocessors * 6)))
            return Tiles("resident", rows, groups, 1, warps=max(1, min(4, groups // 8)), repeats=repeats)
        return Tiles("streamed", rows=8, groups=min(groups, 64), tokens=1, warps=2)
    if m <= 16 and small and groups <= 32:
        return Tiles("resident", rows=16, groups=groups, tokens=2 if m <= 8 else 4, warps=4)
    if m <= 16 and small:
        return Tiles("streamed", rows=4, groups=64, tokens=min(top, 4), warps=2)
    if m <= 64 and k < 1024 and n * k > 2**22:
        return Tiles("mma", rows=64, groups=0, tokens=max(8, min(32, top)), warps=2 if m <= 8 else 1)
    if m <= 16:
        return Tiles("streamed", rows=8, groups=min(groups, 16), tokens=min(top, 4 if m <= 8 else 8), warps=1)
    if m <= 192 and n * k <= 2**22:
        return Tiles("tile", rows=64, groups=4, tokens=min(64, max(16, top)), warps=4, splits=2, stages=3)
    return Tiles("gemm", rows=8, groups=8, tokens=0, warps=4)
