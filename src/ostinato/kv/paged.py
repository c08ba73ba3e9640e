"""Paged KV for full and windowed attention: pages on the device, one page table, a host-side allocator.

The first pages belong to nobody: each slot has a dummy page. Idle slots, finished slots that run on for a step or two,
and the column past the end of every page table point at it, so a step may always write where its position says. On a
GPU the rows of a step run at the same time, so no two of them share a dummy page; on the CPU, where a page is a whole
context and rows run in turn, all share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostinato.errors import MemoryBudgetError


@dataclass(frozen=True)
class KVSpec:
    """What one attention layer keeps per token: a key and a value of ``head_dim`` for each KV head."""

    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, eq=False)
class LayerKV:
    """k, v: [num_pages, num_kv_heads, page_size, head_dim]. page_table: int32 [num_slots, pages_per_slot + 1]."""

    k: torch.Tensor
    v: torch.Tensor
    page_table: torch.Tensor


def num_dummies(num_slots: int, device: torch.device) -> int:
    """Pages that a PagedKV sets aside."""
    return num_slots if device.type == "cuda" else 1


class PagedKV:
    """The KV of all layers of a model for ``num_slots`` sequences of at most ``context`` tokens.

    On a GPU pages hold ``page_size`` tokens. On the CPU a page is a slot's whole context (``page_size`` = context), so
    that attention reads one contiguous view instead of gathering.
    """

    def __init__(
        self,
        specs: Sequence[KVSpec],
        *,
        num_slots: int,
        context: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.context = context
        self.page_size = page_size
        self._num_slots = num_slots
        self.pages_per_slot = -(-context // page_size)
        self.num_dummies = num_dummies(num_slots, device)
        self.num_pages = self.num_dummies + num_slots * self.pages_per_slot
        self.dtype = dtype
        self.page_table = self.dummy_table().to(device)

        def storage(spec: KVSpec) -> torch.Tensor:
            shape = (self.num_pages, spec.num_kv_heads, page_size, spec.head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.layers = tuple(LayerKV(storage(s), storage(s), self.page_table) for s in specs)
        # Lowest pages first, so that a lone sequence lies in one run of memory.
        self._free = list(range(self.num_pages - 1, self.num_dummies - 1, -1))
        self._owned: list[list[int]] = [[] for _ in range(num_slots)]

    def dummy_table(self) -> torch.Tensor:
        """A page table of dummy pages alone: int32 [num_slots, pages_per_slot + 1], on the host."""
        dummies = torch.arange(self._num_slots, dtype=torch.int32).clamp_max(self.num_dummies - 1)
        return dummies[:, None].repeat(1, self.pages_per_slot + 1)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.k, layer.v))

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def can_hold(self, slot: int, num_tokens: int) -> bool:
        """Whether ``slot`` can grow to ``num_tokens`` with the pages that are free now."""
        return self.pages_for(num_tokens) - len(self._owned[slot]) <= len(self._free)

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Give ``slot`` pages for positions 0 … num_tokens - 1; it keeps those that it has.

        The page table's row follows on the current stream, after the steps already launched and before the next.
        Raises MemoryBudgetError when pages run out; then nothing has changed.
        """
        if not self.can_hold(slot, num_tokens):
            raise MemoryBudgetError(
                f"{num_tokens} tokens need {self.pages_for(num_tokens)} KV pages and {len(self._free)} are free; "
                "wait for a sequence to end, or load with a larger --context or batch"
            )
        owned = self._owned[slot]
        while len(owned) < self.pages_for(num_tokens):
            owned.append(self._free.pop())
        self._write_row(slot)

    def release(self, slot: int) -> None:
        """Take back the pages of ``slot``; its row points at its dummy page from the next step on."""
        self._free.extend(reversed(self._owned[slot]))
        self._owned[slot] = []
        self._write_row(slot)

    def _write_row(self, slot: int) -> None:
        row = torch.full((self.page_table.shape[1],), min(slot, self.num_dummies - 1), dtype=torch.int32)
        owned = self._owned[slot]
        if owned:
            row[: len(owned)] = torch.tensor(owned, dtype=torch.int32)
        if self.page_table.is_cuda:
            # A pinned block of its own for each copy: the allocator keeps it until the copy has run.
            row = row.pin_memory()
        self.page_table[slot].copy_(row, non_blocking=True)
