"""Where the rows for tokens lie."""

from __future__ import annotations

import torch

from ostinato.layers.linear import Linear, Target
from ostinato.quant.blocks import BlockWeight, dequantize


def place_embedding(
    table: BlockWeight | torch.Tensor, target: Target, tied_head: Linear | None
) -> BlockWeight | torch.Tensor:
    """The rows for tokens; with tied embeddings the head's own matrix, unless the CPU has packed or rounded it."""
    if tied_head is not None:
        shared = tied_head.parts[0]
        if isinstance(shared, BlockWeight | torch.Tensor) and (target.exact or isinstance(shared, type(table))):
            return shared
    if isinstance(table, BlockWeight):
        return dequantize(table.to(target.device)) if target.exact else table.to(target.device)
    return table.to(target.device, target.activation)
