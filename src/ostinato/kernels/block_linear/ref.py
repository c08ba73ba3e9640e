"""The product with a block-quantized matrix in plain PyTorch: the truth, and a model of the int8 kernel."""

from __future__ import annotations

import torch

from ostinato.kernels.gated.ref import gated_activation_ref
from ostinato.kernels.rms_norm.ref import GROUP, quantize_rows_ref, rms_norm_ref
from ostinato.quant.blocks import BlockWeight, dequantize, quants, scales


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
) -> torch.Tensor:
    """``block_linear`` with activations rounded to int8 in groups of 32, as the kernel for few rows does it.

    Products within a group are exact integers; the sums over groups are taken in float64.
    """
    wide = x.float() if norm is None else rms_norm_ref(x, norm, eps, torch.float32)
    quantized, x_scale = quantize_rows_ref(wide)
    group = weight.kind.group
    columns = x.shape[1]
    by_group = quantized.view(x.shape[0], columns // group, group).double()
    stored = (quants(weight).to(torch.int16) - weight.kind.offset).view(-1, columns // group, group).double()
    scale, minimum = scales(weight)
    products = torch.einsum("mgi,ngi->mng", by_group, stored) * scale.double()
    if minimum is not None:
        products += by_group.sum(-1)[:, None, :] * minimum.double()
    spread = x_scale.double().repeat_interleave(GROUP // group, dim=1)
    total = (products * spread[:, None, :]).sum(-1).float()
    return finish(total, bias, residual, gated, out_dtype or default_dtype(x, residual))


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
