"""Rows of int8 by eight, in the order in which the integer tensor cores of the path ``wide`` take them.

x: int8 [⌈M / 8⌉, K / 128, 1024]. Of 128 columns of eight rows first the lower 16 of each 32, row after row, then the
upper 16. factors: float32 [⌈M / 8⌉, K / 128, 8, 2], for each row the scale of 128 columns and the sum of their int8.
"""

from __future__ import annotations

import torch

SPAN = 128  # columns that share a scale


def by_eights(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x int8 [M, K] and its scale float32 [M, K / 128] in that order; rows beyond M are zeros."""
    rows, columns = x.shape
    missing = -rows % 8
    x = torch.cat((x, x.new_zeros(missing, columns)))
    scale = torch.cat((scale, scale.new_zeros(missing, columns // SPAN)))
    eights, spans = len(x) // 8, columns // SPAN
    sums = x.view(-1, spans, SPAN).sum(2, dtype=torch.int64).float()
    factors = torch.stack((scale, sums), 2).view(eights, 8, spans, 2).transpose(1, 2).contiguous()
    parts = x.view(eights, 8, spans, 4, 2, 16).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(eights, spans, 8 * SPAN), factors


def from_eights(x: torch.Tensor, factors: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``by_eights`` was given."""
    eights, spans = x.shape[:2]
    plain = x.view(eights, spans, 2, 8, 4, 16).permute(0, 3, 1, 4, 2, 5).reshape(eights * 8, spans * SPAN)
    return plain[:rows], factors[..., 0].transpose(1, 2).reshape(eights * 8, spans)[:rows]
