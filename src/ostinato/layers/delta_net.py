"""Gated DeltaNet: linear attention with a recurrent state, a short convolution before it and a gated norm after it.

Source: Gated Delta Networks (arXiv:2412.06464).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.kernels.delta import delta_decode, delta_prefill
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Linear, Norm, weight_bytes
from ostinato.quant.blocks import BlockWeight


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
        y, squares = self.rule(qkvz, h, batch, state)
        return self.out(y, residual=h, squares=squares, squares_eps=self.gate_norm.eps)

    def rule(
        self, qkvz: torch.Tensor, h: torch.Tensor, batch: Batch, state: RecurrentState
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Convolution, gates, delta rule, gated norm: [M, Hv · Dv], and the squares of heads that lack their norm."""
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
            return y, None
        # One row alone does not fill a GPU: several programs share a head, and its norm is left to the next product.
        defer = (
            h.is_cuda and h.shape[0] == 1 and len(self.out.parts) == 1 and isinstance(self.out.parts[0], BlockWeight)
        )
        y, squares = delta_decode(
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
        return y, squares if defer else None

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        small = (self.beta_alpha, self.conv_weight)
        return self.in_proj.num_bytes + self.out.num_bytes + sum(weight_bytes(x) for x in small)
