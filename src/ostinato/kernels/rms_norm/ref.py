"""RMS norm and int8 quantization of activation rows in plain PyTorch."""

from __future__ import annotations

import torch

GROUP = 32  # columns that share one activation scale


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(out_dtype)


def quantize_rows_ref(x: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] as int8 [M, K] and float32 scales [M, K/group]: scale = max|x| / 127, q = x / scale to the nearest even.

    A group of zeros has scale 0.
    """
    grouped = x.float().reshape(*x.shape[:-1], -1, group)
    largest = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
    quantized = torch.round(grouped * inverse).to(torch.int8)
    return quantized.flatten(-2), (largest / 127.0).squeeze(-1)


def rms_norm_quantize_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize_rows_ref of rms_norm_ref, without rounding between them."""
    return quantize_rows_ref(rms_norm_ref(x, weight, eps, torch.float32))
