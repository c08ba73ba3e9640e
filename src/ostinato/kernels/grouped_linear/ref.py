"""Products of sorted picks in plain PyTorch: an expert at a time, in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ostinato.kernels.gated.ref import gated_activation_ref
from ostinato.quant.blocks import BlockWeight, dequantize


def sort_picks_ref(ids: torch.Tensor, num_experts: int, block_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``order`` [P] and ``blocks`` [P // block_rows + num_experts, 3] of a PickSchedule.

    The blocks of expert e begin at number offset[e] // block_rows + e: never less than what the experts before it
    need, so that every expert finds its blocks knowing nothing but how many picks come before its own.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True).to(torch.int32)
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    blocks = torch.zeros(flat.numel() // block_rows + num_experts, 3, dtype=torch.int32)
    for expert in range(num_experts):
        start, stop = int(offsets[expert]), int(offsets[expert + 1])
        number = start // block_rows + expert
        for first in range(start, stop, block_rows):
            blocks[number] = torch.tensor([expert, first, min(first + block_rows, stop)], dtype=torch.int32)
            number += 1
    return order, blocks


def expert_spans(blocks: torch.Tensor, num_experts: int) -> Iterator[tuple[int, int, int]]:
    """(expert, first, stop): the sorted positions of each expert that was picked."""
    used = blocks[blocks[:, 2] > blocks[:, 1]]
    for expert in sorted(set(used[:, 0].tolist())):
        mine = used[used[:, 0] == expert]
        yield expert, int(mine[:, 1].min()), int(mine[:, 2].max())


def grouped_gate_up_ref(
    x: torch.Tensor,
    gate_up: BlockWeight,
    order: torch.Tensor,
    blocks: torch.Tensor,
    num_experts: int,
    top_k: int,
    gated: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """act(gate) * up of each pick, [P, F] in sorted order."""
    rows = gate_up.shape[0] // num_experts
    out = torch.zeros(order.shape[0], rows // 2, dtype=out_dtype, device=x.device)
    for expert, first, stop in expert_spans(blocks, num_experts):
        tokens = order[first:stop].long() // top_k
        matrix = dequantize(gate_up.slice_rows(expert * rows, (expert + 1) * rows))
        out[first:stop] = gated_activation_ref(x[tokens].float() @ matrix.T, gated, out_dtype)
    return out


def grouped_down_ref(
    act: torch.Tensor,
    down: BlockWeight,
    order: torch.Tensor,
    blocks: torch.Tensor,
    num_experts: int,
    weights: torch.Tensor,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """residual + the weighted sum over each token's picks, [T, N]."""
    rows = down.shape[0] // num_experts
    product = torch.zeros(order.shape[0], rows, device=act.device)
    for expert, first, stop in expert_spans(blocks, num_experts):
        matrix = dequantize(down.slice_rows(expert * rows, (expert + 1) * rows))
        product[order[first:stop].long()] = act[first:stop].float() @ matrix.T
    total = (product.view(*weights.shape, rows) * weights[..., None]).sum(1)
    return (total if residual is None else total + residual).to(out_dtype)
