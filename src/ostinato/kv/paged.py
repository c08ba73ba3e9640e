"""What the layers of a model keep: paged KV for attention, fixed state for recurrent layers; one allocator for both.

Pages of KV lie on the device, under one page table and a host-side allocator; recurrent state has a place a slot.

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
from ostinato.kv.recurrent import RecurrentSpec, RecurrentState

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class KVSpec:
    """What one attention layer keeps per token: a key and a value of ``head_dim`` for each KV head."""

    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes in a cache of ``dtype``; an FP8 vector has a float32 scale."""
        vector = self.head_dim * dtype.itemsize + (4 if dtype == FP8 else 0)
        return 2 * self.num_kv_heads * vector

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        """Everything that attention keeps grows with the text."""
        return 0


@dataclass(frozen=True, eq=False)
class LayerKV:
    """One attention layer's pages.

    k, v: [num_pages, num_kv_heads, page_size, head_dim]. page_table: int32 [num_slots, pages_per_slot + 1].
    k_scale, v_scale: float32 [num_pages, num_kv_heads, page_size], of the vectors of an FP8 cache; else None.
    """

    k: torch.Tensor
    v: torch.Tensor
    page_table: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a token writes."""
        return tuple(t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None)


def num_dummies(num_slots: int, device: torch.device) -> int:
    """Pages that a PagedKV sets aside."""
    return num_slots if device.type == "cuda" else 1


class PagedKV:
    """KV and state of all layers of a model for ``num_slots`` sequences of at most ``context`` tokens.

    On a GPU pages hold ``page_size`` tokens. On the CPU a page is a slot's whole context (``page_size`` = context), so
    that attention reads one contiguous view instead of gathering.
    """

    def __init__(
        self,
        specs: Sequence[KVSpec | RecurrentSpec],
        *,
        num_slots: int,
        context: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.context = context
        self.page_size = page_size
        self._num_slots = num_slots
        self.pages_per_slot = -(-context // page_size)
        self.num_dummies = num_dummies(num_slots, device)
        self.num_pages = self.num_dummies + num_slots * self.pages_per_slot
        self.dtype = dtype
        self.page_table = self.dummy_table().to(device)

        def storage(spec: KVSpec, *width: int, dtype: torch.dtype) -> torch.Tensor:
            shape = (self.num_pages, spec.num_kv_heads, page_size, *width)
            return torch.zeros(shape, dtype=dtype, device=device)

        def layer(spec: KVSpec | RecurrentSpec) -> LayerKV | RecurrentState:
            if isinstance(spec, RecurrentSpec):
                return RecurrentState.allocate(spec, num_slots, state_dtype, device)
            k, v = (storage(spec, spec.head_dim, dtype=dtype) for _ in range(2))
            if dtype != FP8:
                return LayerKV(k, v, self.page_table)
            k_scale, v_scale = (storage(spec, dtype=torch.float32) for _ in range(2))
            return LayerKV(k, v, self.page_table, k_scale, v_scale)

        self.layers = tuple(layer(spec) for spec in specs)
        # Lowest pages first, so that a lone sequence lies in one run of memory.
        self._free = list(range(self.num_pages - 1, self.num_dummies - 1, -1))
        self._owned: list[list[int]] = [[] for _ in range(num_slots)]

    def dummy_table(self) -> torch.Tensor:
        """A page table of dummy pages alone: int32 [num_slots, pages_per_slot + 1], on the host."""
        dummies = torch.arange(self._num_slots, dtype=torch.int32).clamp_max(self.num_dummies - 1)
        return dummies[:, None].repeat(1, self.pages_per_slot + 1)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer's state stands after one length of text alone, and cannot go back."""
        return any(isinstance(layer, RecurrentState) for layer in self.layers)

    def written_by_verification(self, num_rows: int) -> list[torch.Tensor]:
        """What a step writes whose page table is ``dummy_table()``: the dummy pages, the state of its rows."""
        found: list[torch.Tensor] = []
        for layer in self.layers:
            stop = num_rows if isinstance(layer, RecurrentState) else self.num_dummies
            found += [t[:stop] for t in layer.tensors()]
        return found

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
