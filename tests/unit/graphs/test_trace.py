"""The trace under a capture: which operations cannot be captured, which values are frozen, and on which line.

The CPU stands for the device here: the rules ask only whether a tensor is on the device of the capture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ostinato.graphs.rules import remedy_for_error, violation_of
from ostinato.graphs.trace import CaptureViolation, OpTrace, error_site, frozen_difference, split_of, storage_key

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def _line_of(function: Callable[..., Any], text: str) -> int:
    lines, start = inspect.getsourcelines(function)
    return start + next(index for index, line in enumerate(lines) if text in line)


BREAKERS: list[tuple[str, Callable[[torch.Tensor], Any]]] = [
    ("item", lambda x: x.sum().item()),
    ("if", lambda x: 1 if x.sum() > 0 else 0),
    ("nonzero", lambda x: x.nonzero()),
    ("where", lambda x: torch.where(x > 0)),
    ("mask read", lambda x: x[x > 0]),
    ("masked_select", lambda x: x.masked_select(x > 0)),
    ("unique", lambda x: x.unique()),
    ("bincount", lambda x: torch.bincount(x.abs().long())),
    ("repeat_interleave", lambda x: torch.repeat_interleave(x.abs().long())),
    ("masked_fill with a tensor", lambda x: x.masked_fill(x > 0, x[0])),
    ("mask write of a tensor", lambda x: x.clone().index_put_((x > 0,), x[0])),
]
SOUND: list[tuple[str, Callable[[torch.Tensor], Any]]] = [
    ("arithmetic", lambda x: (x * 2 + 1).softmax(0)),
    ("torch.where", lambda x: torch.where(x > 0, x, 0.0)),
    ("masked_fill with a number", lambda x: x.masked_fill(x > 0, 0.0)),
    ("scatter_add", lambda x: torch.zeros(4).scatter_add_(0, (x > 0).long(), x)),
    ("index", lambda x: x[(x > 0).long()]),
    ("topk", lambda x: x.topk(2)),
    ("repeat_interleave", lambda x: x.repeat_interleave(3)),
    ("multinomial", lambda x: torch.multinomial(x.softmax(0), 1)),
]


@pytest.mark.parametrize("function", [f for _, f in BREAKERS], ids=[n for n, _ in BREAKERS])
def test_what_cannot_be_captured_is_refused_before_it_runs(function: Callable[[torch.Tensor], Any]) -> None:
    torch.manual_seed(8)
    x = torch.randn(9)
    with pytest.raises(CaptureViolation) as caught:
        OpTrace(CPU, enforce=True).run(lambda: function(x))
    assert caught.value.violation.remedy
    assert caught.value.site is not None
    assert caught.value.site.file == __file__
    assert caught.value.site.line == function.__code__.co_firstlineno
    watching = OpTrace(CPU)
    watching.run(lambda: function(x))
    assert len(watching.violations) >= 1


@pytest.mark.parametrize("function", [f for _, f in SOUND], ids=[n for n, _ in SOUND])
def test_what_can_be_captured_is_not_accused(function: Callable[[torch.Tensor], Any]) -> None:
    torch.manual_seed(9)
    x = torch.randn(9)
    OpTrace(CPU, enforce=True).run(lambda: function(x))


def _copy_args(kind: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    host, meta = torch.zeros(3), torch.zeros(3, device="meta")
    to_copy = torch.ops.aten._to_copy.default
    return {
        "from host": (to_copy, (host,), {"device": CUDA}),
        "nothing from host": (to_copy, (torch.zeros(0),), {"device": CUDA}),
        "cast": (to_copy, (host,), {"dtype": torch.float64}),
        "host to host": (torch.ops.aten.copy_.default, (host, host), {}),
        "other": (to_copy, (meta,), {"device": CPU}),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "is_refused"),
    [("from host", True), ("nothing from host", False), ("cast", False), ("host to host", False), ("other", False)],
)
def test_copies(kind: str, is_refused: bool) -> None:
    op, args, kwargs = _copy_args(kind)
    violation = violation_of(op, args, kwargs, CUDA, frozenset())
    assert (violation is not None) == is_refused
    if violation is not None:
        assert "StaticBuffers.fill" in violation.remedy


def test_a_generator_must_be_registered() -> None:
    generator = torch.Generator()
    draw = lambda: torch.empty(3).normal_(generator=generator)  # noqa: E731
    with pytest.raises(CaptureViolation, match="draw the same numbers"):
        OpTrace(CPU, enforce=True).run(draw)
    OpTrace(CPU, enforce=True, generators=frozenset({generator._cdata})).run(draw)  # type: ignore[attr-defined]


def test_a_violation_names_the_line_inside_nested_calls() -> None:
    def inner(x: torch.Tensor) -> float:
        return float(x.sum())  # the line

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * inner(x)

    with pytest.raises(CaptureViolation) as caught:
        OpTrace(CPU, enforce=True).run(lambda: Model()(torch.ones(3)))
    site = caught.value.site
    assert site is not None
    assert (site.line, site.function) == (_line_of(inner, "the line"), "inner")
    assert "float(x.sum())" in str(site)


def test_a_module_of_torch_alone_still_has_a_site() -> None:
    trace = OpTrace(CPU)
    layer = nn.Linear(2, 2)
    trace.run(lambda: layer(torch.ones(1, 2)))
    assert all(record.site is not None for record in trace.records)


def test_tensors_that_are_read_are_kept_and_those_made_are_not() -> None:
    weight = torch.randn(4)
    trace = OpTrace(CPU)
    result = trace.run(lambda: (weight * 2) + 1)
    assert list(trace.externals) == [storage_key(weight)]
    assert trace.is_born_here(result)
    assert not trace.is_born_here(weight)
    assert len(trace.allocations) >= 1


def test_undeclared_writes_are_found_and_undone() -> None:
    counter, cache = torch.zeros(2), torch.ones(5)

    def step() -> torch.Tensor:
        counter.add_(1)
        cache[1:3].copy_(torch.full((2,), 7.0))
        return counter * 2

    trace = OpTrace(CPU, keep_written=frozenset({counter.untyped_storage()._cdata}))
    trace.run(step)
    (written,) = trace.undeclared_writes()
    assert written.operation == "aten.copy_.default"
    assert written.site is not None
    assert written.site.function == "step"
    trace.undo_writes()
    assert cache.tolist() == [1.0] * 5
    assert counter.tolist() == [1.0, 1.0]


@torch.library.custom_op("ostinato_test::append_row", mutates_args=("cache",))
def _append_row(cache: torch.Tensor, row: torch.Tensor, weight: torch.Tensor) -> None:
    cache[0] = row * weight


def test_the_inputs_and_writes_of_a_custom_operation_are_seen() -> None:
    cache, row, weight = torch.zeros(2, 3), torch.ones(3), torch.full((3,), 2.0)
    trace = OpTrace(CPU)
    trace.run(lambda: _append_row(cache, row, weight))
    assert set(trace.externals) == {storage_key(cache), storage_key(row), storage_key(weight)}
    (written,) = trace.undeclared_writes()
    assert written.operation == "ostinato_test.append_row.default"
    assert cache[0].tolist() == [2.0] * 3
    trace.undo_writes()
    assert cache.eq(0).all()


def _two_traces(step: Callable[[], Any]) -> tuple[OpTrace, OpTrace]:
    traces = OpTrace(CPU), OpTrace(CPU)
    for trace in traces:
        trace.run(step)
    return traces


def test_a_python_counter_in_an_operation_is_found() -> None:
    buffer = torch.zeros(8)
    position = [0]

    def step() -> None:
        position[0] += 1
        buffer[position[0]] = 5  # the counter

    frozen = frozen_difference(*_two_traces(step))
    assert frozen is not None
    record, what = frozen
    assert record.site is not None
    assert record.site.line == _line_of(step, "the counter")
    assert "1 in one call and 2 in the next" in what


def test_a_growing_cache_is_found() -> None:
    cache = [torch.zeros(1, 3)]

    def step() -> torch.Tensor:
        cache[0] = torch.cat([cache[0], torch.ones(1, 3)])
        return cache[0].sum()

    frozen = frozen_difference(*_two_traces(step))
    assert frozen is not None
    assert "shape [1, 3] in one call and [2, 3] in the next" in frozen[1]


def test_equal_calls_have_no_difference() -> None:
    x = torch.randn(4)
    traces = _two_traces(lambda: x.mul(float("nan")).add(1))
    assert frozen_difference(*traces) is None
    assert split_of(*traces) is None


def test_another_branch_is_where_the_calls_split() -> None:
    x, first = torch.ones(3), [True]

    def step() -> torch.Tensor:
        y = x * 2
        if first.pop() if first else False:
            y = y.relu()
        return y + 1

    traces = _two_traces(step)
    assert frozen_difference(*traces) is None
    split = split_of(*traces)
    assert split is not None
    assert [record and record.name for record in split] == ["aten.relu.default", "aten.add.Tensor"]


def test_the_innermost_user_line_of_an_error() -> None:
    def broken() -> None:
        torch.zeros(2) + torch.zeros(3)  # the line

    with pytest.raises(RuntimeError) as caught:
        broken()
    site = error_site(caught.value.__traceback__)
    assert site is not None
    assert site.line == _line_of(broken, "the line")


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ("CUDA error: operation not permitted when stream is capturing", "waits for the device"),
        ("Offset increment outside graph capture encountered unexpectedly.", "rng="),
        ("capturing stream has unjoined work", "wait_stream"),
        ("Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned", "fill"),
        ("CUDA out of memory", "free memory"),
        ("something new", "eager break"),
    ],
)
def test_remedies_for_messages_of_cuda(message: str, word: str) -> None:
    assert word in remedy_for_error(message)
