"""y = x Wᵀ for a W of floats, with the same options as block_linear."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear import FLOATS, check_linear
from ostinato.kernels.block_linear.ref import default_dtype
from ostinato.kernels.dense_linear.ref import dense_linear_ref
from ostinato.kernels.registry import register

__all__ = ["dense_linear"]


def dense_linear(
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
    """residual + act(x̂ Wᵀ + bias), where x̂ is x or rms_norm(x, norm, eps).

    x: [M, K] float32, bfloat16 or float16, rows of adjacent elements. weight: [N, K] contiguous, of the same dtypes.
    norm: float32 [K]. bias: [N] of floats. residual: float32 [M, N], contiguous; it is not written.
    gated: ``silu`` or ``gelu_tanh``: W holds F gate rows, then F up rows, and the result is act(gate) * up, [M, F].
    Returns [M, N] (or [M, F]) of ``out_dtype``; default: the residual's dtype, else x's. Raises KernelError.
    """
    if weight.dim() != 2 or weight.dtype not in FLOATS or not weight.is_contiguous():
        raise KernelError(
            f"dense_linear takes a contiguous weight [N, K] of floats, got {tuple(weight.shape)} {weight.dtype}"
        )
    shape = (weight.shape[0], weight.shape[1])
    check_linear("dense_linear", x, shape, weight.device, norm, bias, residual, gated)
    dtype = out_dtype or default_dtype(x, residual)
    if x.device.type == "cpu":
        return dense_linear_ref(
            x, weight, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated, out_dtype=dtype
        )
    result: torch.Tensor = _dense_linear(x, weight, norm, eps, bias, residual, gated, dtype)
    return result


def _dense_linear_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return dense_linear_ref(
        x, weight, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated, out_dtype=out_dtype
    )


def _dense_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    rows = weight.shape[0] if gated is None else weight.shape[0] // 2
    return x.new_empty((x.shape[0], rows), dtype=out_dtype)


_dense_linear = register(
    "dense_linear(Tensor x, Tensor weight, Tensor? norm, float eps, Tensor? bias, Tensor? residual, str? gated,"
    " ScalarType out_dtype) -> Tensor",
    reference=_dense_linear_cpu,
    kernel="ostinato.kernels.dense_linear.triton:dense_linear",
    fake=_dense_linear_fake,
)
