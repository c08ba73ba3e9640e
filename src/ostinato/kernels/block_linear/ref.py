"""The product with a block-quantized matrix in plain PyTorch: the truth, and a model of the int8 kernel."""

from __future__ import annotations

import torch

from ostinato.kernels.block_linear.eights import from_eights
from ostinato.kernels.gated.ref import gated_activation_ref
from ostinato.kernels.rms_norm.ref import GROUP, quantize_rows_ref, rms_norm_ref
from ostinato.quant.blocks import BlockWeight, dequantize


def block_linear_ref(
    x: torch.Tensor,
    weight: BlockWeight,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What ``block_linear`` means, all of it in float32."""
    wide = x.float() if norm is None else rms_norm_ref(x, norm, eps, torch.float32)
    return finish(wide @ dequantize(weight).T, bias, residual, gated, out_dtype or default_dtype(x, residual))


def block_linear_int8_ref(
    x: torch.Tensor,
    weight: BlockWeight,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: str | None = None,
    out_dtype: torch.dtype | None = None,
    group: int = GROUP,
) -> torch.Tensor:
    """``block_linear`` with activations rounded to int8, ``group`` columns to a scale, as the kernels for few rows do.

    The streamed and the batched kernel share a scale among 32 columns, the resident one among 4, the wide one among a
    group of W. Sums are float64.
    """
    wide = x.float() if norm is None else rms_norm_ref(x, norm, eps, torch.float32)
    quantized, scale = quantize_rows_ref(wide, group)
    rounded = quantized.double() * scale.double().repeat_interleave(group, dim=1)
    total = (rounded @ dequantize(weight).double().T).float()
    return finish(total, bias, residual, gated, out_dtype or default_dtype(x, residual))


def int8_linear_ref(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: BlockWeight,
    squares: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """What ``int8_linear`` means."""
    wide = x.float() * scale.repeat_interleave(x.shape[1] // scale.shape[1], dim=1)
    if squares is not None:
        heads = squares.shape[1]
        norm = torch.rsqrt(squares.sum(dim=2) / (x.shape[1] // heads) + eps)
        wide = (wide.view(x.shape[0], heads, -1) * norm[:, :, None]).view(x.shape)
    return block_linear_ref(wide, weight, residual=residual, out_dtype=out_dtype)


def int8_linear_beside_ref(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: BlockWeight,
    squares: torch.Tensor,
    eps: float,
    h: torch.Tensor,
    norm: torch.Tensor,
    beside: torch.Tensor,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``int8_linear_beside`` means."""
    out = int8_linear_ref(x, scale, weight, squares, eps, None, out_dtype)
    return out, rms_norm_ref(h, norm, eps, torch.float32) @ beside.float().T


def eights_linear_ref(
    x: torch.Tensor, factors: torch.Tensor, weight: BlockWeight, rows: int, residual: torch.Tensor | None
) -> torch.Tensor:
    """What ``eights_linear`` means."""
    plain, scale = from_eights(x, factors, rows)
    return int8_linear_ref(plain, scale, weight, None, 0.0, residual, torch.float32)


def default_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """The result's dtype where none is asked for: the residual's, else x's."""
    return x.dtype if residual is None else residual.dtype


def finish(
    product: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Everything after a float32 product: bias, gated activation, residual, rounding."""
    if bias is not None:
        product = product + bias.float()
    if gated is not None:
        product = gated_activation_ref(product, gated, torch.float32)
    if residual is not None:
        product = product + residual.float()
    return product.to(out_dtype)
