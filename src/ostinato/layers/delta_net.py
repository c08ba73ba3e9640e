"""Gated DeltaNet: linear attention with a recurrent state, a short convolution before it and a gated norm after it.

Source: Gated Delta Networks (arXiv:2412.06464).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.kernels.block_linear import prefers_eights, prefers_int8
from ostinato.kernels.block_linear.eights import SPAN
from ostinato.kernels.delta import delta_decode, delta_prefill
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Linear, Norm, RoundedEights, RoundedRow, weight_bytes


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

    def __call__(
        self,
        h: torch.Tensor,
        batch: Batch,
        state: RecurrentState,
        activation: torch.dtype,
        row: RoundedRow | None = None,
    ) -> torch.Tensor:
        """h: float32 [M, hidden] → float32 [M, hidden]; advances the states of the rows' slots.

        row: norm(h) where the layer before has rounded it.
        """
        return self.output(self.mix(h, batch, state, activation, row), h)

    def mix(
        self,
        h: torch.Tensor,
        batch: Batch,
        state: RecurrentState,
        activation: torch.dtype,
        row: RoundedRow | None = None,
    ) -> torch.Tensor | RoundedRow | RoundedEights:
        """All before the output product; arguments as for a call. What ``output`` takes."""
        if row is None:
            return self.rule(self.in_proj(h, norm=self.norm, out_dtype=activation), h, batch, state)
        # The gates' products go with the projection: in the rule they would be done by every program of a head.
        norm, beside = self.norm.weight, self.beta_alpha
        qkvz, gates = self.in_proj.of_rounded_beside(row, h, norm, beside, out_dtype=activation)
        return self.rule(qkvz, h, batch, state, gates)

    def rule(
        self,
        qkvz: torch.Tensor,
        h: torch.Tensor,
        batch: Batch,
        state: RecurrentState,
        gates: torch.Tensor | None = None,
    ) -> torch.Tensor | RoundedRow | RoundedEights:
        """Convolution, gates, delta rule and gated norm; advances the states. What the output product reads.

        gates: float32 [1, 2 heads], norm(h) · beta_alpha, if they are there already; in a decode step alone.
        """
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
            return delta_prefill(
                qkvz,
                h,
                *weights,
                *place,
                num_k_heads=self.num_k_heads,
                num_v_heads=self.num_v_heads,
                tiled=self.tiled,
            )
        # Few rows do not fill a GPU: several programs share a head, so its norm is left to the next product, and they
        # round what that would have to round in each of its programs, or in a kernel before them.
        weight, rows = self.out.block_weight, h.shape[0]
        form = "plain"
        if weight is not None:
            whole = h.is_cuda and self._head_dim % 32 == 0
            if whole and (rows == 1 or prefers_int8(weight, rows)):
                form = "rounded"
            elif self._head_dim == SPAN and prefers_eights(weight, rows):
                form = "eights"
        y, squares, scale = delta_decode(
            qkvz,
            h,
            *weights,
            *place,
            batch.active,
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            tiled=self.tiled,
            form=form,
            gates=gates,
            # The embedding starts a step with a full dependency, and states advance in this kernel alone.
            prefetch=True,
        )
        if form == "eights":
            return RoundedEights(y, scale, rows)
        return RoundedRow(y, scale, squares, self.gate_norm.eps) if form == "rounded" else y

    def output(self, result: torch.Tensor | RoundedRow | RoundedEights, h: torch.Tensor) -> torch.Tensor:
        """The output product of what ``rule`` returned, added to h."""
        if isinstance(result, RoundedRow):
            return self.out.of_rounded(result, residual=h)
        if isinstance(result, RoundedEights):
            return self.out.of_eights(result, residual=h)
        return self.out(result, residual=h)

    @property
    def _head_dim(self) -> int:
        return self.gate_norm.weight.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        small = (self.beta_alpha, self.conv_weight)
        return self.in_proj.num_bytes + self.out.num_bytes + sum(weight_bytes(x) for x in small)
