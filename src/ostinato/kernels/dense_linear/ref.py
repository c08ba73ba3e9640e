"""The product with a matrix of floats in plain PyTorch."""

from __future__ import annotations

import torch

from ostinato.kernels.block_linear.ref import default_dtype, finish
from ostinato.kernels.rms_norm.ref import rms_norm_ref


def dense_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What ``dense_linear`` means: the norm and everything after the product in float32.

    The product itself is float32 for float32 weights; for others it takes x̂ rounded to the weight's dtype, as the
    tensor cores do, and sums in float32.
    """
    wide = x.float() if norm is None else rms_norm_ref(x, norm, eps, torch.float32)
    product = wide.to(weight.dtype).float() @ weight.float().T
    return finish(product, bias, residual, gated, out_dtype or default_dtype(x, residual))
