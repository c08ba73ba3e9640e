"""State of recurrent layers: a fixed number of values for each slot, however long its text is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RecurrentSpec:
    """What one delta-net layer keeps for a slot.

    conv_channels, conv_width: the causal convolution sees the last conv_width inputs of each channel. num_heads,
    key_dim, value_dim: a matrix [key_dim, value_dim] for each value head.
    """

    conv_channels: int
    conv_width: int
    num_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """A token adds nothing."""
        return 0

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        """Bytes for one sequence with matrices of ``dtype``; the rest is float32."""
        conv = 4 * self.conv_channels * self.conv_width
        pending = 4 * 2 * self.num_heads * (self.key_dim + self.value_dim + 1)
        return conv + pending + dtype.itemsize * self.num_heads * self.key_dim * self.value_dim


@dataclass(frozen=True, eq=False)
class RecurrentState:
    """The state of all slots. A row at position 0 starts from zeros, whatever stands here.

    conv: float32 [S, conv_width, conv_channels], a ring: entry p % conv_width holds the inputs at position p.
    state: float32 or bfloat16 [S, num_heads, key_dim, value_dim].
    pending: float32 [S, 2, num_heads, key_dim + value_dim + 1], what the last token does to ``state`` and is not yet in
    it: key, change and decay; entry p % 2 is that of position p.
    """

    conv: torch.Tensor
    state: torch.Tensor
    pending: torch.Tensor

    @classmethod
    def allocate(cls, spec: RecurrentSpec, num_slots: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        conv = (num_slots, spec.conv_width, spec.conv_channels)
        state = (num_slots, spec.num_heads, spec.key_dim, spec.value_dim)
        pending = (num_slots, 2, spec.num_heads, spec.key_dim + spec.value_dim + 1)
        return cls(
            torch.zeros(conv, dtype=torch.float32, device=device),
            torch.zeros(state, dtype=dtype, device=device),
            torch.zeros(pending, dtype=torch.float32, device=device),
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.conv, self.state, self.pending
