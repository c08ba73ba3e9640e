"""The gated MLP of a dense layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.layers.linear import Linear, Norm


@dataclass(frozen=True, eq=False)
class GatedMLP:
    """``down(silu(gate(norm(h))) * up(norm(h))) + h``. gate_up: gate rows over up rows."""

    norm: Norm
    gate_up: Linear
    down: Linear

    def __call__(self, h: torch.Tensor, activation: torch.dtype) -> torch.Tensor:
        """h: float32 [M, hidden] → float32 [M, hidden]; ``activation`` is the dtype between the two products."""
        return self.down(self.gate_up(h, norm=self.norm, gated="silu", out_dtype=activation), residual=h)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return self.gate_up.num_bytes + self.down.num_bytes
