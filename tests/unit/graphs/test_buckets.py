"""Buckets: which graph a batch runs in, when it is captured, and how the batch is padded."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import CaptureError, UsageError
from ostinato.graphs import Buckets, EagerCallable


def _buckets(built: list[int], sizes: tuple[int, ...] = (8, 1, 4, 4)) -> Buckets[EagerCallable]:
    def build(size: int) -> EagerCallable:
        built.append(size)
        return EagerCallable(lambda x: x + 1, (torch.zeros(size),))

    return Buckets(sizes, build)


def test_the_smallest_bucket_that_holds_the_batch_is_used() -> None:
    buckets = _buckets([])
    assert buckets.sizes == (1, 4, 8)
    assert [buckets.bucket_for(n) for n in range(1, 9)] == [1, 4, 4, 4, 8, 8, 8, 8]
    for rows in (0, -1, 9):
        with pytest.raises(UsageError, match="fits no bucket: they hold 1 to 8"):
            buckets.bucket_for(rows)


@pytest.mark.parametrize("sizes", [(), (0, 4), (-1,)])
def test_sizes_must_be_positive(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="positive"):
        _buckets([], sizes)


def test_graphs_are_captured_when_first_used_and_once() -> None:
    built: list[int] = []
    buckets = _buckets(built)
    graph = buckets.graph_for(3)
    assert buckets.graph_for(2) is graph
    assert built == [4]
    buckets.capture_all()
    assert built == [4, 8, 1]
    assert buckets.captured_sizes == (1, 4, 8)
    assert len(list(buckets)) == 3


def test_a_short_batch_is_padded_with_the_dummy() -> None:
    assert _buckets([]).padded(["a", "b", "c"], "dummy") == ["a", "b", "c", "dummy"]
    assert _buckets([]).padded(["a"], "dummy") == ["a"]


def test_closing_closes_every_graph() -> None:
    with _buckets([]) as buckets:
        graph = buckets.graph_for(1)
    assert graph.is_closed
    with pytest.raises(CaptureError, match="closed"):
        buckets.graph_for(1)
