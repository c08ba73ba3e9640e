"""Static buffers: what is written is what was meant, and nothing is ever rebound, narrowed or shared by accident."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ostinato.errors import CaptureError, StaleInputError
from ostinato.graphs import EagerCallable, StaticBuffers


@dataclasses.dataclass(frozen=True, eq=False)
class StepBuffers(StaticBuffers):
    tokens: torch.Tensor
    temperature: torch.Tensor
    stopped: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class KVBuffers(StaticBuffers):
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def _buffers(slots: int = 4) -> StepBuffers:
    return StepBuffers(
        tokens=torch.zeros(slots, dtype=torch.int64),
        temperature=torch.zeros(slots, dtype=torch.float32),
        stopped=torch.zeros(slots, dtype=torch.bool),
    )


def test_fill_writes_tensors_lists_and_numbers_at_the_same_address() -> None:
    buffers = _buffers()
    address = buffers.tokens.data_ptr()
    buffers.fill("tokens", torch.tensor([4, 5, 6, 7]))
    buffers.fill("tokens", 9, index=1)
    buffers.fill("tokens", [10, 11], index=slice(2, 4))
    buffers.fill("temperature", 0.8)
    buffers.fill("stopped", [True, False, True, False])
    assert buffers.tokens.tolist() == [4, 9, 10, 11]
    assert buffers.tokens.data_ptr() == address
    assert buffers.temperature.tolist() == pytest.approx([0.8] * 4)
    assert buffers.stopped.tolist() == [True, False, True, False]
    buffers.check()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokens", torch.zeros(3, dtype=torch.int64), "takes shape [4], not [3]"),
        ("tokens", torch.zeros(1, dtype=torch.int64), "nothing is broadcast"),
        ("tokens", torch.zeros(4, dtype=torch.int32), "takes torch.int64, not torch.int32"),
        ("tokens", 1.5, "not the number 1.5"),
        ("tokens", [1, 2.5, 3, 4], "not the number 2.5"),
        ("stopped", 1, "takes torch.bool, not the number 1"),
        ("temperature", [0.5, 0.5], "takes shape [4], not [2]"),
    ],
)
def test_fill_refuses_what_would_be_cut_or_broadcast(name: str, value: object, text: str) -> None:
    buffers = _buffers()
    with pytest.raises(StaleInputError) as caught:
        buffers.fill(name, value)  # type: ignore[arg-type]  # wrong values are the point
    assert text in str(caught.value)
    assert f"StepBuffers.{name}" in str(caught.value)


def test_an_unknown_buffer_is_named_with_those_that_exist() -> None:
    with pytest.raises(CaptureError, match=r"no buffer 'token': it has \['stopped', 'temperature', 'tokens'\]"):
        _buffers().fill("token", 1)


def test_store_copies_only_equal_layouts() -> None:
    buffers = _buffers()
    buffers.store("temperature", torch.arange(4.0))
    assert buffers.temperature.tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(StaleInputError, match="takes shape"):
        buffers.store("temperature", torch.zeros(8))
    with pytest.raises(StaleInputError, match="cast it first"):
        buffers.store("temperature", torch.zeros(4, dtype=torch.bfloat16))


def test_a_buffer_must_be_allocated() -> None:
    with pytest.raises(CaptureError, match=r"KVBuffers\.v_cache is None: every static buffer is a tensor"):
        KVBuffers(k_cache=torch.zeros(2), v_cache=None)  # type: ignore[arg-type]  # the fault under test


def test_a_buffer_cannot_be_rebound() -> None:
    buffers = _buffers()
    with pytest.raises(dataclasses.FrozenInstanceError):
        buffers.tokens = torch.zeros(4, dtype=torch.int64)  # type: ignore[misc]  # the fault under test


@pytest.mark.parametrize("value", [None, torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)])
def test_a_buffer_rebound_by_force_is_found(value: torch.Tensor | None) -> None:
    buffers = _buffers()
    step = EagerCallable(lambda b: b.tokens + 1, (buffers,))
    step(buffers)
    object.__setattr__(buffers, "tokens", value)
    for use in (buffers.check, step.check, lambda: step(buffers), lambda: buffers.fill("tokens", 1)):
        with pytest.raises(StaleInputError, match="tokens"):
            use()


def test_buffers_of_one_step_are_on_one_device() -> None:
    with pytest.raises(CaptureError, match=r"spans \['cpu', 'meta'\]"):
        KVBuffers(k_cache=torch.zeros(2), v_cache=torch.zeros(2, device="meta"))


def test_sharing_is_by_name_and_shares_the_memory() -> None:
    prefill = KVBuffers(k_cache=torch.zeros(3), v_cache=torch.zeros(3))
    decode = KVBuffers.sharing(prefill, ["k_cache"], v_cache=torch.zeros(3))
    prefill.k_cache.fill_(2.0)
    assert decode.k_cache.tolist() == [2.0] * 3
    assert decode.v_cache.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("names", "own", "text"),
    [
        (["key_cache"], {}, "cannot share 'key_cache': the source has only ['k_cache', 'v_cache']"),
        (["k_cache"], {}, "left without ['v_cache']"),
        (["k_cache", "v_cache"], {"v_cache": torch.zeros(3)}, "both shared and given"),
        (["k_cache", "v_cache"], {"extra": torch.zeros(3)}, "has no buffer ['extra']"),
    ],
)
def test_sharing_that_matches_nothing_is_an_error(names: list[str], own: dict[str, torch.Tensor], text: str) -> None:
    source = KVBuffers(k_cache=torch.zeros(3), v_cache=torch.zeros(3))
    with pytest.raises(CaptureError) as caught:
        KVBuffers.sharing(source, names, **own)
    assert text in str(caught.value)


def test_sharing_a_name_that_the_class_lacks_is_an_error() -> None:
    with pytest.raises(CaptureError, match="KVBuffers has only"):
        KVBuffers.sharing({"page_table": torch.zeros(3)}, ["page_table"])
