"""RMS norm and int8 quantization of rows: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.launch import launch_options
from ostinato.kernels.rms_norm.ref import GROUP
from ostinato.kernels.triton import trigger, wait


@triton.jit
def _rms_norm_kernel(x, stride_x, weight, eps, out, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    w = tl.load(weight + k, mask=k < K, other=0.0)
    wait(PDL)
    value = tl.load(x + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / K + eps)
    tl.store(out + row * K + k, (value * root * w).to(out.dtype.element_ty), mask=k < K)


@triton.jit
def _rms_norm_quantize_kernel(
    x, stride_x, weight, eps, out, scales, K: tl.constexpr, NG: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr
):
    trigger(PDL)
    KG: tl.constexpr = K // 32
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, NG)
    k = g[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = (g < KG)[:, None]
    if NORM:
        w = tl.load(weight + k, mask=inside, other=0.0)
    wait(PDL)
    value = tl.load(x + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        value *= w * tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / K + eps)
    largest = tl.max(tl.abs(value), 1)
    inverse = (127.0 / tl.maximum(largest, 1e-30))[:, None]
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    rounded = (value * inverse + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(out + row * K + k, rounded.to(tl.int8), mask=inside)
    tl.store(scales + row * KG + g, largest * (1.0 / 127.0), mask=g < KG)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    """Launch ``_rms_norm_kernel``; arguments as the op's."""
    m, k = x.shape
    out = torch.empty((m, k), dtype=out_dtype, device=x.device)
    block = triton.next_power_of_2(k)
    options = launch_options(x.device)
    _rms_norm_kernel[(m,)](x, x.stride(0), weight, eps, out, k, block, num_warps=row_warps(block), **options)
    return out


def rms_norm_quantize(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_rms_norm_quantize_kernel``; arguments as the op's."""
    m, k = x.shape
    out = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty((m, k // GROUP), dtype=torch.float32, device=x.device)
    groups = triton.next_power_of_2(k // GROUP)
    _rms_norm_quantize_kernel[(m,)](
        x, x.stride(0), weight if weight is not None else scales, eps, out, scales, k, groups, weight is not None,
        num_warps=row_warps(groups * GROUP), **launch_options(x.device),
    )  # fmt: skip
    return out, scales


def row_warps(block: int) -> int:
    """Warps for a program that holds ``block`` elements: eight or more of them a thread."""
    return max(1, min(16, block // 256))
