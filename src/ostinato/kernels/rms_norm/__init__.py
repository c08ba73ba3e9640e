"""RMS norm of rows, and int8 quantization of rows with or without it."""

from __future__ import annotations

import math

import torch

from ostinato.errors import KernelError
from ostinato.kernels.registry import register
from ostinato.kernels.rms_norm.ref import GROUP, quantize_rows_ref, rms_norm_quantize_ref, rms_norm_ref

__all__ = ["quantize_rows", "rms_norm", "rms_norm_quantize"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight for each row, computed in float32.

    x: [M, K] float32, bfloat16 or float16, rows of adjacent elements. weight: float32 [K].
    Returns a contiguous [M, K] of ``out_dtype`` (default: x's). Raises KernelError.
    """
    _check(x, weight)
    dtype = x.dtype if out_dtype is None else out_dtype
    if x.device.type == "cpu":
        return _rms_norm_row(x, weight, eps, dtype) if x.shape[0] == 1 else rms_norm_ref(x, weight, eps, dtype)
    result: torch.Tensor = _rms_norm(x, weight, eps, dtype)
    return result


def _rms_norm_row(x: torch.Tensor, weight: torch.Tensor, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    """``rms_norm_ref`` of one row on a CPU: a dot product and a scale on the host, in less than half of the time."""
    wide = x.float()
    row = wide[0]
    scale = 1.0 / math.sqrt(torch.dot(row, row).item() / row.shape[0] + eps)
    return (wide * weight).mul_(scale).to(out_dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int8 with one float32 scale (largest magnitude / 127) per 32 columns.

    x: [M, K] float32, bfloat16 or float16, rows of adjacent elements, K a multiple of 32.
    Returns int8 [M, K] and float32 [M, K/32]. Raises KernelError.
    """
    _check(x, None, GROUP)
    if x.device.type == "cpu":
        return quantize_rows_ref(x)
    quantized: tuple[torch.Tensor, torch.Tensor] = _rms_norm_quantize(x, None, 0.0)
    return quantized


def rms_norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_rows(rms_norm(x, weight, eps)) in one kernel, without rounding between them."""
    _check(x, weight, GROUP)
    if x.device.type == "cpu":
        return rms_norm_quantize_ref(x, weight, eps)
    quantized: tuple[torch.Tensor, torch.Tensor] = _rms_norm_quantize(x, weight, eps)
    return quantized


def _check(x: torch.Tensor, weight: torch.Tensor | None, multiple: int = 1) -> None:
    if x.dim() != 2 or x.stride(1) != 1 or x.dtype not in FLOATS:
        raise KernelError(
            f"rms_norm takes x [M, K] of floats with adjacent columns, got {tuple(x.shape)} {x.dtype}"
            f" with strides {x.stride()}"
        )
    if x.shape[1] % multiple:
        raise KernelError(f"rows are quantized in groups of {multiple} columns, which do not divide {x.shape[1]}")
    if weight is not None and (
        weight.shape != x.shape[1:] or weight.dtype != torch.float32 or weight.device != x.device
    ):
        raise KernelError(
            f"rms_norm takes a float32 weight [{x.shape[1]}] on {x.device}, got {tuple(weight.shape)} {weight.dtype}"
            f" on {weight.device}"
        )


def _rms_norm_quantize_cpu(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, ...]:
    return quantize_rows_ref(x) if weight is None else rms_norm_quantize_ref(x, weight, eps)


def _rms_norm_quantize_fake(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, ...]:
    m, k = x.shape
    return x.new_empty((m, k), dtype=torch.int8), x.new_empty((m, k // GROUP), dtype=torch.float32)


_rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType out_dtype) -> Tensor",
    reference=rms_norm_ref,
    kernel="ostinato.kernels.rms_norm.triton:rms_norm",
    fake=lambda x, weight, eps, out_dtype: x.new_empty(x.shape, dtype=out_dtype),
)
_rms_norm_quantize = register(
    "rms_norm_quantize(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    reference=_rms_norm_quantize_cpu,
    kernel="ostinato.kernels.rms_norm.triton:rms_norm_quantize",
    fake=_rms_norm_quantize_fake,
)
