"""The tokens of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one forward pass; in a decode step all of it lives on the device and every replay reads it anew.

    tokens: int32 [M]. positions: int32 [M]. slots: int32 [M], the row of the page table that each token belongs to.
    decode: one token of each slot (otherwise: consecutive tokens of one slot). active: int32 [M] in a decode step: rows
    with 0 are idle and leave recurrent state alone, since the slot may be between two chunks of its prompt.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    decode: bool
    active: torch.Tensor | None = None
