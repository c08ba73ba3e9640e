"""The output product before a mixture of experts in plain PyTorch."""

from __future__ import annotations

import torch

from ostinato.kernels.block_linear.ref import int8_linear_ref
from ostinato.kernels.moe.ref import hand_down_ref
from ostinato.quant.blocks import BlockWeight, dequantize

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def fold_router(router: torch.Tensor, norm: torch.Tensor, weight: BlockWeight) -> torch.Tensor:
    """router · diag(norm) · weight, float16 [R, K]: the part of a router's logits that an output product makes.

    router: float32 or bfloat16 [R, N]. norm: float32 [N]. weight: (N, K). Infinite where float16 does not hold it.
    """
    return ((router.float() * norm) @ dequantize(weight)).half()


def routed_linear_ref(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: BlockWeight,
    squares: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    norm: torch.Tensor,
    router: torch.Tensor,
) -> Results:
    """What ``routed_linear`` means, without the folded matrix."""
    out = int8_linear_ref(x, scale, weight, squares, eps, residual, torch.float32)
    return out, *hand_down_ref(out, norm), (out * norm) @ router.float().T
