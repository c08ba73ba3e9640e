"""Rows of an embedding table in plain PyTorch."""

from __future__ import annotations

import torch

from ostinato.kernels.moe.ref import hand_down_ref
from ostinato.quant.blocks import BlockWeight, dequantize


def embed_ref(
    tokens: torch.Tensor, weight: BlockWeight | torch.Tensor, out_dtype: torch.dtype, scale: float
) -> torch.Tensor:
    """Rows ``tokens`` [M] of the table, times ``scale``, computed in float32: [M, K]."""
    rows = tokens.long()
    found = weight[rows].float() if isinstance(weight, torch.Tensor) else dequantize(weight.select_rows(rows))
    return (found * scale).to(out_dtype)


def embed_rounded_ref(
    tokens: torch.Tensor, weight: BlockWeight, norm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``embed_rounded`` means."""
    out = embed_ref(tokens, weight, torch.float32, 1.0)
    return out, *hand_down_ref(out, norm)
