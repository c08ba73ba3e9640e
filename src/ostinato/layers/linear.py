"""Linear layers over every class of weight, with the norm before and the residual or gate after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostinato.kernels.block_linear import block_linear, eights_linear, int8_linear, int8_linear_beside
from ostinato.kernels.dense_linear import dense_linear
from ostinato.kernels.gated import gated_activation
from ostinato.kernels.rms_norm import rms_norm
from ostinato.kernels.routed_linear import routed_linear
from ostinato.quant.blocks import BlockWeight, dequantize, join_rows
from ostinato.quant.cpu import CpuInt4Weight, CpuInt8Weight, pack_for_cpu

Weight = torch.Tensor | BlockWeight | CpuInt4Weight | CpuInt8Weight


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS norm. weight: float32 [K]; a zero-centred weight is stored with the one added."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class RoundedRow:
    """Rows that whoever made them rounded for the product that follows, so that no kernel stands between.

    x: int8 [M, K]. scale, squares: as ``int8_linear`` takes them; with squares the rows lack their norm, of ``eps``.
    """

    x: torch.Tensor
    scale: torch.Tensor
    squares: torch.Tensor | None
    eps: float


@dataclass(frozen=True, eq=False)
class RoutedRow:
    """What ``routed_linear`` makes of a row beside it for a mixture of experts, as ``moe_block`` takes it."""

    x: torch.Tensor
    scale: torch.Tensor
    squares: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """What an output product needs for the experts behind it.

    norm: float32 [N]. router: [R, N], the shared gate's row behind the router's. folded: float16 [R, K].
    """

    norm: torch.Tensor
    router: torch.Tensor
    folded: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one token reads beside the product's own."""
        return weight_bytes(self.router) + weight_bytes(self.folded)


@dataclass(frozen=True, eq=False)
class RoundedEights:
    """``RoundedRow`` for several rows, by eight. x, factors: as ``eights_linear`` takes them. rows: how many."""

    x: torch.Tensor
    factors: torch.Tensor
    rows: int


@dataclass(frozen=True)
class Target:
    """Where weights go and how activations between ops are kept.

    device: of weights and state. activation: dtype between ops: bfloat16, or float32 for the exact path, in which
    quantized weights are dequantized to float32. The residual stream is float32 in both.
    """

    device: torch.device
    activation: torch.dtype

    @property
    def exact(self) -> bool:
        return self.activation == torch.float32

    def place(self, weight: BlockWeight | torch.Tensor) -> Weight:
        """The form of a matrix in which this target multiplies by it."""
        if isinstance(weight, torch.Tensor):
            return weight.to(self.device, self.activation).contiguous()
        if self.exact:
            return dequantize(weight.to(self.device))
        if self.device.type == "cpu":
            return pack_for_cpu(weight)
        return weight.to(self.device)

    def place_plain(self, *weights: BlockWeight | torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Small matrices that stay as they are, in one dtype: bfloat16 if that holds all of their values, else float32.

        GGUF files have them in float32, though most models were published in bfloat16.
        """
        tensors = [as_tensor(weight) for weight in weights]
        lossless = not self.exact and all(torch.equal(t.float(), t.bfloat16().float()) for t in tensors)
        dtype = torch.bfloat16 if lossless else torch.float32
        return tuple(tensor.to(self.device, dtype).contiguous() for tensor in tensors)


def linear(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``f(norm(x) Wᵀ + bias) + residual``; dispatches on the class of the weight.

    x: [M, K]. weight: N rows, K columns. gated: ``silu`` or ``gelu_tanh``: the rows are gate over up and the result is
    ``act(gate) * up``, [M, N / 2]. residual: float32 [M, N]; the result is then float32. out_dtype: else x's dtype.
    """
    norm_weight, eps = (norm.weight, norm.eps) if norm is not None else (None, 0.0)
    if isinstance(weight, BlockWeight):
        return block_linear(
            x,
            weight,
            norm=norm_weight,
            eps=eps,
            bias=bias,
            residual=residual,
            gated=gated,
            out_dtype=out_dtype,
        )
    if isinstance(weight, torch.Tensor):
        return dense_linear(
            x,
            weight,
            norm=norm_weight,
            eps=eps,
            bias=bias,
            residual=residual,
            gated=gated,
            out_dtype=out_dtype,
        )
    y = weight.product(x.to(torch.bfloat16) if norm is None else rms_norm(x, norm.weight, norm.eps, torch.bfloat16))
    if bias is not None:
        y = y + bias
    if gated is not None:
        y = gated_activation(y, gated)
    if residual is not None:
        return residual + y
    return y if out_dtype is None else y.to(out_dtype)


@dataclass(frozen=True, eq=False)
class Linear:
    """Matrices that read the same input and whose outputs stand side by side, joined where their types are equal.

    parts: weights of N1, N2, … rows over K columns. bias: float32 or activation dtype [N1 + N2 + …] or None.
    """

    parts: tuple[Weight, ...]
    bias: torch.Tensor | None = None

    @classmethod
    def join(
        cls, weights: Sequence[BlockWeight | torch.Tensor], target: Target, bias: torch.Tensor | None = None
    ) -> Linear:
        """Join neighbours of one type; a fusion changes no result, so unequal types stay apart."""
        groups: list[list[BlockWeight | torch.Tensor]] = []
        for weight in weights:
            if groups and _joinable(groups[-1][-1], weight):
                groups[-1].append(weight)
            else:
                groups.append([weight])
        placed = tuple(target.place(_join(group)) for group in groups)
        return cls(placed, None if bias is None else bias.to(target.device, torch.float32))

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
        gated: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """See ``linear``."""
        if len(self.parts) == 1:
            return linear(
                x,
                self.parts[0],
                norm=norm,
                bias=self.bias,
                residual=residual,
                gated=gated,
                out_dtype=out_dtype,
            )
        y = torch.cat([linear(x, part, norm=norm, out_dtype=out_dtype) for part in self.parts], dim=-1)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if gated is not None:
            y = gated_activation(y, gated)
        return y if residual is None else residual + y

    def of_rounded(
        self, row: RoundedRow, *, residual: torch.Tensor | None = None, out_dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The product with rows that are rounded already, by the ``block_weight``: [M, N] of ``out_dtype``."""
        weight = self.block_weight
        assert weight is not None, "rows are rounded for one matrix of blocks alone"
        return int8_linear(
            row.x, row.scale, weight, squares=row.squares, eps=row.eps, residual=residual, out_dtype=out_dtype
        )

    def of_rounded_beside(
        self, row: RoundedRow, h: torch.Tensor, norm: torch.Tensor, beside: torch.Tensor, *, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``of_rounded`` of one row, and float32 [1, R] of norm(h) · beside, [R, K], in the same kernel."""
        weight = self.block_weight
        assert weight is not None, "rows are rounded for one matrix of blocks alone"
        assert row.squares is not None, "the row's norm is left to its product"
        return int8_linear_beside(
            row.x, row.scale, weight, squares=row.squares, eps=row.eps, h=h, norm=norm, beside=beside,
            out_dtype=out_dtype,
        )  # fmt: skip

    def of_routed(self, row: RoundedRow, residual: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, RoutedRow]:
        """``of_rounded`` of one row, float32 [1, N], with what the experts behind it take in place of their router."""
        weight = self.block_weight
        assert weight is not None, "rows are rounded for one matrix of blocks alone"
        out, *routed = routed_linear(
            row.x, row.scale, weight, residual=residual, norm=routing.norm, router=routing.router,
            folded=routing.folded, squares=row.squares, eps=row.eps,
        )  # fmt: skip
        return out, RoutedRow(*routed)

    def of_eights(self, rows: RoundedEights, *, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``of_rounded`` for rows by eight: float32 [M, N]."""
        weight = self.block_weight
        assert weight is not None, "rows are rounded for one matrix of blocks alone"
        return eights_linear(rows.x, rows.factors, weight, rows=rows.rows, residual=residual)

    @property
    def block_weight(self) -> BlockWeight | None:
        """The one matrix of blocks that is all of this layer, as ``int8_linear`` takes it; None where there is more."""
        part = self.parts[0]
        return part if isinstance(part, BlockWeight) and len(self.parts) == 1 and self.bias is None else None

    @property
    def num_bytes(self) -> int:
        return sum(weight_bytes(part) for part in self.parts)


def as_tensor(weight: BlockWeight | torch.Tensor) -> torch.Tensor:
    """A tensor of floats: ``weight`` itself, or float32 where it is quantized."""
    return dequantize(weight) if isinstance(weight, BlockWeight) else weight


def weight_bytes(weight: Weight) -> int:
    """Bytes that one product with ``weight`` reads."""
    if isinstance(weight, torch.Tensor):
        return weight.numel() * weight.element_size()
    return weight.num_bytes


def _joinable(a: BlockWeight | torch.Tensor, b: BlockWeight | torch.Tensor) -> bool:
    if isinstance(a, BlockWeight) and isinstance(b, BlockWeight):
        return a.kind == b.kind and a.shape[1] == b.shape[1]
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype


def _join(group: Sequence[BlockWeight | torch.Tensor]) -> BlockWeight | torch.Tensor:
    blocks = [w for w in group if isinstance(w, BlockWeight)]
    if blocks:
        return blocks[0] if len(blocks) == 1 else join_rows(blocks)
    return torch.cat([w for w in group if isinstance(w, torch.Tensor)])
