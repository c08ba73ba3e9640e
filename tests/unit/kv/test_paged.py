"""Pages: nobody owns page 0, nothing is lost, and a refusal changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato.errors import MemoryBudgetError
from ostinato.kv.paged import KVSpec, PagedKV
from tests.unit.engine.machine import check_pages

CPU = torch.device("cpu")
SPECS = (KVSpec(2, 8), KVSpec(1, 16))


def make(num_slots: int = 3, context: int = 20, page_size: int = 8, dtype: torch.dtype = torch.float32) -> PagedKV:
    return PagedKV(SPECS, num_slots=num_slots, context=context, page_size=page_size, dtype=dtype, device=CPU)


def test_shapes_and_bytes() -> None:
    kv = make(dtype=torch.bfloat16)
    assert kv.num_pages == 1 + 3 * 3
    assert kv.page_table.shape == (3, 4)
    assert [tuple(layer.k.shape) for layer in kv.layers] == [(10, 2, 8, 8), (10, 1, 8, 16)]
    assert kv.num_bytes == sum(s.bytes_per_token(torch.bfloat16) for s in SPECS) * 10 * 8
    assert not any(t.any() for layer in kv.layers for t in (layer.k, layer.v))


def test_a_slot_grows_and_keeps_what_it_has() -> None:
    kv = make()
    kv.reserve(1, 9)
    first = kv.page_table[1].tolist()
    assert first == [1, 2, 0, 0]
    kv.reserve(1, 3)
    assert kv.page_table[1].tolist() == first
    kv.reserve(0, 1)
    kv.reserve(1, 20)
    assert kv.page_table[1].tolist() == [1, 2, 4, 0]
    kv.release(1)
    assert kv.page_table[1].tolist() == [0] * 4
    kv.release(1)
    check_pages(kv)
    kv.reserve(2, 17)
    assert kv.page_table[2].tolist() == [1, 2, 4, 0]  # the lowest first, as at the start
    check_pages(kv)


def test_the_column_past_the_end_is_the_dummy_page() -> None:
    """A finished slot that runs on for a step writes at its context's end: that must be nobody's page."""
    kv = make(context=16)
    kv.reserve(0, 16)
    assert kv.page_table[0, 16 // 8] == 0


def test_a_refusal_changes_nothing() -> None:
    kv = make(num_slots=2)
    kv._free = kv._free[:2]  # as if other slots held the rest
    table = kv.page_table.clone()
    assert not kv.can_hold(0, 17)
    with pytest.raises(MemoryBudgetError, match="17 tokens need 3 KV pages and 2 are free"):
        kv.reserve(0, 17)
    assert torch.equal(kv.page_table, table)
    assert kv.num_free_pages == 2
    kv.reserve(0, 16)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 21)), max_size=40),
    st.sampled_from((1, 4, 21)),
)
def test_any_order_of_reservations(actions: list[tuple[bool, int, int]], page_size: int) -> None:
    kv = make(num_slots=4, context=21, page_size=page_size)
    for grow, slot, tokens in actions:
        if grow:
            kv.reserve(slot, tokens)  # every slot can always have its whole context
            assert len(kv._owned[slot]) >= kv.pages_for(tokens)
        else:
            kv.release(slot)
        check_pages(kv)
    for slot in range(4):
        kv.release(slot)
    assert kv.num_free_pages == kv.num_pages - 1
