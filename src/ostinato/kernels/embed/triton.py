"""Rows of an embedding table: one program for a stretch of columns of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.block_linear.matmul.triton import values
from ostinato.kernels.block_linear.planes import kind_constants, pairs
from ostinato.kernels.block_linear.rounded.triton import store_handed
from ostinato.kernels.launch import launch_options
from ostinato.kernels.moe.ref import HANDED
from ostinato.kernels.triton import trigger, wait
from ostinato.quant.blocks import KINDS


@triton.jit
def _embed_blocks_kernel(
    tokens, bytes_, high, d, m, sub_d, sub_m, out, scale, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, NG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    KG: tl.constexpr = K // 32
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * NG + tl.arange(0, NG)
    inside = (g < KG)[None, :]
    wait(PDL)
    token = tl.load(tokens + row + tl.arange(0, 1)).to(tl.int64)
    lo, hi = values(bytes_, high, d, m, sub_d, sub_m, token, g, inside, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
    to = out + row * K + (g[:, None] * 32 + tl.arange(0, 16)[None, :])[None]
    tl.store(to, (lo * scale).to(out.dtype.element_ty), mask=inside[:, :, None])
    tl.store(to + 16, (hi * scale).to(out.dtype.element_ty), mask=inside[:, :, None])


@triton.jit
def _embed_rounded_kernel(
    tokens, bytes_, high, d, m, sub_d, sub_m, norm, out, x, x_scale, squares, K: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr, MIN_SIGN: tl.constexpr, NG: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token's row in float32, and rounded for the layer behind, a scale for 16 columns."""
    trigger(PDL)
    KG: tl.constexpr = K // 32
    g = tl.program_id(0) * NG + tl.arange(0, NG)
    inside = (g < KG)[None, :]
    column = g[:, None] * 32 + tl.arange(0, 16)[None, :]
    within = (g < KG)[:, None]
    gain = tl.load(norm + column, mask=within, other=0.0)
    gain_up = tl.load(norm + column + 16, mask=within, other=0.0)
    wait(PDL)
    token = tl.load(tokens + tl.arange(0, 1)).to(tl.int64)
    lo, hi = values(bytes_, high, d, m, sub_d, sub_m, token, g, inside, KG, BITS, GROUP, SUPER, OFFSET, MIN_SIGN)
    lower = tl.reshape(lo, (NG, 16))
    upper = tl.reshape(hi, (NG, 16))
    tl.store(out + column, lower, mask=within)
    tl.store(out + column + 16, upper, mask=within)
    store_handed(lower, gain, 2 * g, x, x_scale, squares, K)
    store_handed(upper, gain_up, 2 * g + 1, x, x_scale, squares, K)


@triton.jit
def _embed_floats_kernel(tokens, table, out, scale, K, BLOCK: tl.constexpr, PDL: tl.constexpr):
    trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    token = tl.load(tokens + row).to(tl.int64)
    value = tl.load(table + token * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, (value * scale).to(out.dtype.element_ty), mask=k < K)


def embed(
    tokens: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor | None,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str | None,
    columns: int,
    out_dtype: torch.dtype,
    scale: float,
) -> torch.Tensor:
    """Launch the kernel for the table's format; arguments as the op's."""
    count = tokens.shape[0]
    out = torch.empty((count, columns), dtype=out_dtype, device=tokens.device)
    options = launch_options(tokens.device, first=True)
    if kind is None or d is None:
        grid = (count, triton.cdiv(columns, 1024))
        _embed_floats_kernel[grid](tokens, words, out, scale, columns, 1024, num_warps=4, **options)
        return out
    planes = pairs(words.view(torch.uint8), d, high, m, sub_d, sub_m, KINDS[kind])
    grid = (count, triton.cdiv(columns, 1024))
    _embed_blocks_kernel[grid](
        tokens, *planes, out, scale, columns, *kind_constants(KINDS[kind]), 32, num_warps=2, **options
    )
    return out


def embed_rounded(
    tokens: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    columns: int,
    norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel for one token; arguments and results as the op's."""
    device = tokens.device
    out = torch.empty((1, columns), dtype=torch.float32, device=device)
    x = torch.empty((1, columns), dtype=torch.int8, device=device)
    scale = torch.empty((1, columns // HANDED), dtype=torch.float32, device=device)
    squares = torch.empty((1, 1, columns // HANDED), dtype=torch.float32, device=device)
    planes = pairs(words.view(torch.uint8), d, high, m, sub_d, sub_m, KINDS[kind])
    _embed_rounded_kernel[(triton.cdiv(columns, 256),)](
        tokens, *planes, norm, out, x, scale, squares, columns, *kind_constants(KINDS[kind]), 8,
        num_warps=1, **launch_options(device, first=True),
    )  # fmt: skip
    return out, x, scale, squares
