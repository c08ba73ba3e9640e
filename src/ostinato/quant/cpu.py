"""Block weights in the forms that PyTorch's own CPU products read.

Four-bit kinds with groups of 32, 64 or 128 become PyTorch's packed int4 (``_weight_int4pack_mm_for_cpu``): quants
keep their values, scale and minimum of a group are rounded to bfloat16. Eight-bit weights become int8 with one scale a
row (``_weight_int8pack_mm``), rounded once more. All other kinds become dense bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.quant.blocks import BlockKind, BlockWeight, dequantize, quants, scales

_int4_product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_int8_product = torch.ops.aten._weight_int8pack_mm.default


@dataclass(frozen=True, eq=False)
class CpuInt4Weight:
    """packed: uint8, PyTorch's private order. scales_zeros: bfloat16 [K / group, N, 2]. shape: (N, K)."""

    shape: tuple[int, int]
    packed: torch.Tensor
    scales_zeros: torch.Tensor
    group: int

    @property
    def num_bytes(self) -> int:
        return self.packed.numel() + 2 * self.scales_zeros.numel()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x bfloat16 [M, K] → bfloat16 [M, N]."""
        result: torch.Tensor = _int4_product(x, self.packed, self.group, self.scales_zeros)
        return result


@dataclass(frozen=True, eq=False)
class CpuInt8Weight:
    """q: int8 [N, K]. scale: bfloat16 [N]."""

    shape: tuple[int, int]
    q: torch.Tensor
    scale: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.q.numel() + 2 * self.scale.numel()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x bfloat16 [M, K] → bfloat16 [M, N]."""
        result: torch.Tensor = _int8_product(x, self.q, self.scale)
        return result


CpuWeight = CpuInt4Weight | CpuInt8Weight


def _is_int4(kind: BlockKind) -> bool:
    return kind.bits == 4 and kind.group >= 32


def packed_bytes(kind: BlockKind, count: int) -> int:
    """Bytes of ``count`` weights of ``kind`` after ``pack_for_cpu``, for a number of rows that packs."""
    if _is_int4(kind):
        return count // 2 + 4 * count // kind.group
    return count if kind.bits == 8 else 2 * count


def pack_for_cpu(weight: BlockWeight) -> CpuWeight | torch.Tensor:
    """The fastest form of ``weight`` for products on the CPU; see the module's docstring for what is rounded."""
    n, k = weight.shape
    kind = weight.kind
    if _is_int4(kind) and n % 16 == 0:
        scale, minimum = scales(weight)
        zero = (8 - kind.offset) * scale  # PyTorch means (q - 8) * scale + zero
        if minimum is not None:
            zero = zero + minimum
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quants(weight).int(), 1)
        scales_zeros = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous().bfloat16()
        return CpuInt4Weight((n, k), packed, scales_zeros, kind.group)
    if kind.bits == 8:
        return _int8_rows(weight)
    return dequantize(weight, torch.bfloat16)


def _int8_rows(weight: BlockWeight, rows_at_once: int = 4096) -> CpuInt8Weight:
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.int8)
    scale = torch.empty(n, dtype=torch.bfloat16)
    for start in range(0, n, rows_at_once):  # a vocabulary-sized matrix never stands in float32 as a whole
        part = dequantize(weight.slice_rows(start, min(start + rows_at_once, n)))
        row_scale = (part.abs().amax(dim=1) / 127).bfloat16()
        scale[start : start + len(part)] = row_scale
        steps = part / row_scale.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        q[start : start + len(part)] = steps.round_().clamp_(-127, 127).to(torch.int8)
    return CpuInt8Weight((n, k), q, scale)
