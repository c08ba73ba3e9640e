"""Rows of an embedding table, dequantized where the table is block-quantized."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.embed.ref import embed_ref
from ostinato.kernels.registry import register
from ostinato.quant.blocks import BlockWeight

__all__ = ["embed"]


def embed(
    tokens: torch.Tensor,
    weight: BlockWeight | torch.Tensor,
    out_dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> torch.Tensor:
    """Rows ``tokens`` of the table [V, K], times ``scale``.

    tokens: int32 or int64 [M], contiguous, each in 0 … V - 1 (not checked on a GPU). weight: a BlockWeight, or a
    contiguous [V, K] of floats. Returns [M, K] of ``out_dtype``. Raises KernelError.
    """
    if tokens.dim() != 1 or tokens.dtype not in (torch.int32, torch.int64) or not tokens.is_contiguous():
        raise KernelError(f"embed takes contiguous int32 or int64 tokens [M], got {tuple(tokens.shape)} {tokens.dtype}")
    if tokens.device != weight.device:
        raise KernelError(f"embed: tokens are on {tokens.device} and the table on {weight.device}")
    if isinstance(weight, torch.Tensor) and (
        weight.dim() != 2 or not weight.is_floating_point() or not weight.is_contiguous()
    ):
        raise KernelError(f"embed takes a contiguous table [V, K] of floats, got {tuple(weight.shape)} {weight.dtype}")
    if tokens.device.type == "cpu":
        return embed_ref(tokens, weight, out_dtype, scale)
    if isinstance(weight, torch.Tensor):
        result: torch.Tensor = _embed(
            tokens, weight, None, None, None, None, None, None, weight.shape[1], out_dtype, scale
        )
        return result
    found: torch.Tensor = _embed(tokens, *weight.operands, weight.shape[1], out_dtype, scale)
    return found


def _embed_cpu(
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
    if kind is None or d is None:
        return embed_ref(tokens, words, out_dtype, scale)
    weight = BlockWeight.of(columns, words, d, high, m, sub_d, sub_m, kind)
    return embed_ref(tokens, weight, out_dtype, scale)


def _embed_fake(
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
    return words.new_empty((tokens.shape[0], columns), dtype=out_dtype)


_embed = register(
    "embed(Tensor tokens, Tensor words, Tensor? d, Tensor? high, Tensor? m, Tensor? sub_d, Tensor? sub_m, str? kind,"
    " int columns, ScalarType out_dtype, float scale) -> Tensor",
    reference=_embed_cpu,
    kernel="ostinato.kernels.embed.triton:embed",
    fake=_embed_fake,
)
