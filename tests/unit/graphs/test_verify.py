"""Replay verification on CPU tensors: every kind of difference is found, and equal outputs are never accused."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch

from ostinato.graphs.verify import StateSnapshot, compare_outputs, default_tolerance, fresh_like, is_poison, poison_

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.bool,
    torch.complex64,
]


@dataclasses.dataclass(frozen=True)
class StepOutput:
    logits: torch.Tensor
    extra: dict[str, Any]


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype.is_complex:
        return torch.randn(*shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.rand(*shape) < 0.5
    if dtype.is_floating_point:
        return torch.randn(*shape).to(dtype)
    return torch.randint(0, 100, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_outputs_agree_and_poisoned_ones_do_not(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    expected = _random(dtype, 3, 7)
    assert compare_outputs(expected, expected.clone()) is None
    poisoned = poison_(expected.clone())
    mismatch = compare_outputs(expected, poisoned)
    assert mismatch is not None
    assert mismatch.kind == ("nan" if dtype.is_complex else "not_written")


def test_the_path_of_the_first_difference_is_named() -> None:
    expected = StepOutput(torch.zeros(2, 3), {"pair": Pair(torch.ones(4), torch.ones(4)), "count": 3})
    actual = StepOutput(torch.zeros(2, 3), {"pair": Pair(torch.ones(4), torch.ones(4)), "count": 3})
    assert compare_outputs(expected, actual) is None
    actual.extra["pair"].second[2] = 1.5
    mismatch = compare_outputs(expected, actual)
    assert mismatch is not None
    assert (mismatch.path, mismatch.kind, mismatch.index) == ("output.extra['pair'].second", "values", (2,))
    assert mismatch.max_abs == 0.5
    assert mismatch.num_wrong == 1
    assert "eager gives 1 and the replay 1.5" in str(mismatch)


@pytest.mark.parametrize(
    ("expected", "actual", "kind"),
    [
        (torch.zeros(2), torch.zeros(3), "shape"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "dtype"),
        (torch.zeros(2), 0.0, "structure"),
        ((torch.zeros(2),), (torch.zeros(2), torch.zeros(2)), "structure"),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, "structure"),
        ((torch.zeros(1), 3), (torch.zeros(1), 4), "host_value"),
        (torch.zeros(2), torch.tensor([0.0, float("nan")]), "nan"),
        (torch.zeros(2), torch.tensor([0.0, float("inf")]), "values"),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")]), "values"),
        (torch.tensor([float("nan")]), torch.tensor([0.0]), "values"),
        (torch.tensor([5]), torch.tensor([6]), "values"),
    ],
)
def test_every_kind_of_difference(expected: Any, actual: Any, kind: str) -> None:
    mismatch = compare_outputs(expected, actual)
    assert mismatch is not None
    assert mismatch.kind == kind


def test_the_same_nan_and_the_same_infinity_are_equal() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert compare_outputs(special, special.clone()) is None


def test_the_default_tolerance_admits_a_reordered_sum_and_no_wrong_term() -> None:
    torch.manual_seed(2)
    terms = torch.randn(1024, 33)
    forward, backward, dropped = torch.zeros(33), torch.zeros(33), torch.zeros(33)
    for index in range(1024):
        forward += terms[index]
        backward += terms[1023 - index]
        dropped += terms[index] if index else 0.0
    assert not torch.equal(forward, backward)
    assert compare_outputs(forward, backward) is None
    assert compare_outputs(forward, dropped) is not None
    assert default_tolerance(torch.arange(3)).atol == 0.0


def test_explicit_tolerances_are_used() -> None:
    assert compare_outputs(torch.ones(3), torch.ones(3) * 1.01, rtol=0.02, atol=0.0) is None
    assert compare_outputs(torch.ones(3), torch.ones(3) * 1.01, rtol=0.001, atol=0.0) is not None


def test_poison_of_a_strided_view_stays_inside_it() -> None:
    whole = torch.zeros(4, 6, dtype=torch.bfloat16)
    poison_(whole[:, 1:3])
    assert is_poison(whole).sum() == 8
    assert not whole[:, [0, 3, 4, 5]].isnan().any()


def test_snapshot_restores_state_and_names_what_changed() -> None:
    torch.manual_seed(3)
    cache, counter = torch.randn(8, 4), torch.zeros(3, dtype=torch.int64)
    before = cache.clone()
    snapshot = StateSnapshot({"cache": cache, "same": cache, "counter": counter})
    assert snapshot.num_bytes == 8 * 4 * 4 + 3 * 8
    assert snapshot.changed() == []
    cache[3].fill_(float("nan"))
    assert snapshot.changed() == ["state['cache']"]
    snapshot.restore()
    assert torch.equal(cache, before)
    assert snapshot.changed() == []


def test_snapshot_of_a_slice_saves_and_restores_only_the_slice() -> None:
    cache = torch.arange(10.0)
    snapshot = StateSnapshot(cache[2:5])
    cache.fill_(-1.0)
    snapshot.restore()
    assert cache.tolist() == [-1, -1, 2, 3, 4, -1, -1, -1, -1, -1]


def test_fresh_inputs_differ_and_stay_valid() -> None:
    torch.manual_seed(4)
    example = {
        "x": torch.randn(5, 7),
        "positive": torch.rand(64) + 0.5,
        "zeros": torch.zeros(9),
        "index": torch.arange(20, dtype=torch.int32),
        "mask": torch.tensor([0.0, -float("inf"), 0.0, 0.0]),
        "flag": torch.tensor([True, False] * 8),
        "half": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "n": 7,
    }
    fresh, again = fresh_like(example, seed=5), fresh_like(example, seed=5)
    assert compare_outputs(fresh, again, rtol=0.0, atol=0.0) is None
    assert compare_outputs(fresh, fresh_like(example, seed=6)) is not None
    for name in ("x", "positive", "zeros", "index", "half"):
        assert compare_outputs(example[name], fresh[name]) is not None, name
        assert fresh[name].dtype == example[name].dtype
    assert sorted(fresh["index"].tolist()) == list(range(20))
    assert (fresh["positive"] >= 0).all()
    assert fresh["mask"].isneginf().tolist() == [False, True, False, False]
    assert fresh["flag"].sum() == 8
    assert fresh["n"] == 7


def test_fresh_inputs_keep_strides() -> None:
    example = torch.randn(4, 6).t()
    assert fresh_like(example, seed=1).stride() == example.stride()
