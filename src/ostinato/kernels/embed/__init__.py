"""Rows of an embedding table, dequantized where the table is block-quantized."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.embed.ref import embed_ref, embed_rounded_ref
from ostinato.kernels.moe.ref import HANDED
from ostinato.kernels.registry import register
from ostinato.quant.blocks import BlockWeight

__all__ = ["embed", "embed_rounded"]

Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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


def embed_rounded(tokens: torch.Tensor, weight: BlockWeight, norm: torch.Tensor) -> Rounded:
    """The row of one token, and what the layer behind takes in place of its norm.

    tokens: int32 or int64 [1], in 0 … V - 1 (not checked on a GPU). weight: a table (V, K). norm: float32 [K]. Returns
    (out, x, scale, squares): out float32 [1, K], the others of it as ``moe_block`` returns them for a ``next_norm``.
    Raises KernelError.
    """
    if tokens.shape != (1,) or tokens.dtype not in (torch.int32, torch.int64):
        raise KernelError(f"embed_rounded takes int32 or int64 tokens [1], got {tuple(tokens.shape)} {tokens.dtype}")
    columns = weight.shape[1]
    if norm.shape != (columns,) or norm.dtype != torch.float32 or not norm.is_contiguous():
        raise KernelError(f"embed_rounded takes a float32 norm [{columns}], got {tuple(norm.shape)} {norm.dtype}")
    for name, device in (("table", weight.device), ("norm", norm.device)):
        if device != tokens.device:
            raise KernelError(f"embed_rounded: tokens are on {tokens.device} and the {name} on {device}")
    if tokens.device.type == "cpu":
        return embed_rounded_ref(tokens, weight, norm)
    found: Rounded = _embed_rounded(tokens, *weight.operands, columns, norm)
    return found


def _embed_rounded_cpu(
    tokens: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    columns: int,
    norm: torch.Tensor,
) -> Rounded:
    return embed_rounded_ref(tokens, BlockWeight.of(columns, words, d, high, m, sub_d, sub_m, kind), norm)


def _embed_rounded_fake(tokens: torch.Tensor, words: torch.Tensor, *rest: object) -> Rounded:
    norm = rest[-1]
    assert isinstance(norm, torch.Tensor)
    columns = norm.shape[0]
    return (
        norm.new_empty((1, columns)), norm.new_empty((1, columns), dtype=torch.int8),
        norm.new_empty((1, columns // HANDED)), norm.new_empty((1, 1, columns // HANDED)),
    )  # fmt: skip


_embed_rounded = register(
    "embed_rounded(Tensor tokens, Tensor words, Tensor d, Tensor? high, Tensor? m, Tensor? sub_d, Tensor? sub_m,"
    " str kind, int columns, Tensor norm) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_embed_rounded_cpu,
    kernel="ostinato.kernels.embed.triton:embed_rounded",
    fake=_embed_rounded_fake,
)


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
