"""Gated DeltaNet: linear attention with a recurrent state, a short convolution before it and a gated norm after it.

Source: Gated Delta Networks (arXiv:2412.06464).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.kernels.block_linear import int8_linear
from ostinato.kernels.delta import delta_decode, delta_prefill
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Linear, Norm, weight_bytes


@dataclass(frozen=True, eq=False)
class RuleResult:
    """What the delta rule leaves to the output product.

    y: [M, Hv · Dv]. squares, scale: where y is int8 and its heads lack their norm, as ``int8_linear`` takes them.
    """

    y: torch.Tensor
    squares: torch.Tensor | None = None
    scale: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class DeltaNet:
    """``out(gated_norm(delta_rule(conv(qkv)), z)) + h`` with ``q | k | v | z = in_proj(norm(h))``.

    beta_alpha: [2 · Hv, H] float32 or bfloat16, the rows of b over the rows of a. conv_weight: float32 [W, C].
    a_log, dt_bias: float32 [Hv]. gate_norm: over Dv. tiled: value head j reads key head j % Hk, else j // (Hv / Hk).
    """

    norm: Norm
    in_proj: Linear
    beta_alpha: torch.Tensor
    conv_weight: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    gate_norm: Norm
    out: Linear
    num_k_heads: int
    num_v_heads: int
    tiled: bool

    def __call__(self, h: torch.Tensor, batch: Batch, state: RecurrentState, activation: torch.dtype) -> torch.Tensor:
        """h: float32 [M, hidden] → float32 [M, hidden]; advances the states of the rows' slots."""
        qkvz = self.in_proj(h, norm=self.norm, out_dtype=activation)
        return self.output(self.rule(qkvz, h, batch, state), h)

    def rule(self, qkvz: torch.Tensor, h: torch.Tensor, batch: Batch, state: RecurrentState) -> RuleResult:
        """Convolution, gates, delta rule and gated norm; advances the states."""
        weights = (
            self.norm.weight,
            self.norm.eps,
            self.beta_alpha,
            self.conv_weight,
            self.a_log,
            self.dt_bias,
            self.gate_norm.weight,
            self.gate_norm.eps,
        )
        place = (state.conv, state.state, state.pending, batch.slots, batch.positions)
        if not batch.decode:
            y = delta_prefill(
                qkvz,
                h,
                *weights,
                *place,
                num_k_heads=self.num_k_heads,
                num_v_heads=self.num_v_heads,
                tiled=self.tiled,
            )
            return RuleResult(y)
        # One row alone does not fill a GPU: several programs share a head, so its norm is left to the next product, and
        # they round what that would have to round in each of its programs.
        defer = (
            h.is_cuda
            and h.shape[0] == 1
            and self.out.block_weight is not None
            and self.gate_norm.weight.shape[0] % 32 == 0
        )
        y, squares, scale = delta_decode(
            qkvz,
            h,
            *weights,
            *place,
            batch.active,
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            tiled=self.tiled,
            defer_norm=defer,
            # The embedding starts a step with a full dependency, and states advance in this kernel alone.
            prefetch=True,
        )
        return RuleResult(y, squares, scale) if defer else RuleResult(y)

    def output(self, result: RuleResult, h: torch.Tensor) -> torch.Tensor:
        """The output product of what ``rule`` returned, added to h."""
        weight = self.out.block_weight
        if result.scale is None or weight is None:
            return self.out(result.y, residual=h)
        return int8_linear(result.y, result.scale, weight, squares=result.squares, eps=self.gate_norm.eps, residual=h)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        small = (self.beta_alpha, self.conv_weight)
        return self.in_proj.num_bytes + self.out.num_bytes + sum(weight_bytes(x) for x in small)
