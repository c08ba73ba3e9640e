"""How kernels are handed a block weight: its constants and its planes."""

from __future__ import annotations

import torch

from ostinato.quant.blocks import BlockKind


def kind_constants(kind: BlockKind) -> tuple[int, int, int, int, int]:
    """BITS, GROUP, SUPER, OFFSET and MIN_SIGN of the kernels.

    They step through 32 columns at a time: those of a larger group read its scale again, at index column // SUPER.
    """
    return kind.bits, kind.group, kind.super_group, kind.offset, kind.min_sign


def pairs(
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: BlockKind,
) -> tuple[torch.Tensor, ...]:
    """The planes in the kernels' order: absent ones as ``d``, two sub-scales of 16 columns as one int16."""
    found = []
    for plane in (sub_d, sub_m):
        if plane is None:
            found.append(d)
        else:
            found.append(plane.view(torch.int16) if kind.group == 16 else plane)
    return words, high if high is not None else d, d, m if m is not None else d, *found
