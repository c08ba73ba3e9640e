"""The step: what a graph captures and a token costs.

Everything that a step reads and writes lies on the device: these buffers, the sampler's state, the KV pages. The step
advances all of it, so the next replay needs nothing from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.graphs import StaticBuffers
from ostinato.kv.paged import PagedKV
from ostinato.layers.batch import Batch
from ostinato.models.interface import Model
from ostinato.sampling import SamplerState


@dataclass(frozen=True, eq=False)
class StepBuffers(StaticBuffers):
    """What a step starts from, one row per slot; the very tensors of the sampler and the KV, which the step advances.

    tokens: int32 [S], the next input. positions: int32 [S], where it stands in its text. remaining: int32 [S], tokens
    that may still be drawn. active: int32 [S], 1 while the slot's answer goes on. page_table: int32 [S, pages + 1].
    slots: int32 [S], 0, 1, 2 …
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    remaining: torch.Tensor
    active: torch.Tensor
    page_table: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, sampler: SamplerState, kv: PagedKV) -> StepBuffers:
        b = sampler.buffers
        slots = torch.arange(b.max_batch, dtype=torch.int32, device=b.tokens.device)
        return cls(b.tokens, b.positions, b.remaining, b.active, kv.page_table, slots)


def decode_step(model: Model, kv: PagedKV, sampler: SamplerState, buffers: StepBuffers, num_rows: int) -> None:
    """One token for each of the slots 0 … num_rows - 1: forward, sampling, and the advance of their state."""
    batch = Batch(
        tokens=buffers.tokens[:num_rows],
        positions=buffers.positions[:num_rows],
        slots=buffers.slots[:num_rows],
        decode=True,
        active=buffers.active[:num_rows],
    )
    sampler.step(model.forward(batch, kv.layers))
