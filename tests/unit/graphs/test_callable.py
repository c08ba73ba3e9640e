"""The interface of a captured callable, shown on its eager twin, which makes the same checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ostinato.errors import CaptureError, DeviceError, StaleInputError
from ostinato.graphs import CaptureStream, EagerCallable, GraphPool, StaticBuffers, capture


@dataclasses.dataclass(frozen=True, eq=False)
class Counter(StaticBuffers):
    count: torch.Tensor


def test_inputs_are_copied_and_the_caller_keeps_its_own() -> None:
    torch.manual_seed(7)
    x = torch.randn(3, 5)
    double = EagerCallable(lambda t: t * 2, (x,))
    static = double.inputs[0]
    assert static.data_ptr() != x.data_ptr()
    other = torch.randn(3, 5)
    assert torch.equal(double(other), other * 2)
    assert double.inputs[0] is static
    with double.stream:
        double.replay()
    assert double.num_replays == 2
    assert torch.equal(double.outputs, other * 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(3, 4), "input[0] has shape [3, 4] where the graph has [3, 5]"),
        (torch.zeros(3, 5, dtype=torch.float64), "torch.float64 where the graph has torch.float32"),
        (torch.zeros(3, 5, device="meta"), "device meta where the graph has cpu"),
        (None, "input[0] is None where the graph reads a tensor"),
    ],
)
def test_stale_inputs_are_refused_before_anything_is_copied(value: Any, text: str) -> None:
    step = EagerCallable(lambda t: t + 1, (torch.full((3, 5), 4.0),))
    with pytest.raises(StaleInputError) as caught:
        step(value)
    assert text in str(caught.value)
    assert step.inputs[0].eq(4.0).all()
    assert step.num_replays == 0


def test_host_values_are_frozen_and_a_change_is_refused() -> None:
    step = EagerCallable(lambda x, scale: x * scale, {"x": torch.ones(2), "scale": 3})
    assert step(x=torch.ones(2), scale=3).tolist() == [3.0, 3.0]
    with pytest.raises(StaleInputError, match=r"input\['scale'\] is 4 and was frozen at capture as 3"):
        step(x=torch.ones(2), scale=4)
    with pytest.raises(StaleInputError, match="was not there at capture"):
        step(x=torch.ones(2), scale=3, bias=torch.ones(2))
    with pytest.raises(StaleInputError, match="have names"):
        step(torch.ones(2), 3)


def test_static_buffers_are_read_in_place_and_no_others_are_taken() -> None:
    counter = Counter(torch.zeros(1, dtype=torch.int64))
    step = EagerCallable(lambda c: c.count.add_(1), counter)
    step.replay()
    step(counter)
    assert counter.count.item() == 2
    with pytest.raises(StaleInputError, match="address"):
        step(Counter(torch.zeros(1, dtype=torch.int64)))


def test_declared_outputs_receive_the_result() -> None:
    out = torch.empty(2, 3)
    step = EagerCallable(lambda x: x + 1, (torch.zeros(2, 3),), outputs=out)
    assert step(torch.ones(2, 3)) is out
    assert out.eq(2.0).all()


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (6,)])
def test_an_output_buffer_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    step = EagerCallable(lambda x: x + 1, (torch.zeros(2, 3),), outputs=torch.empty(shape))
    with pytest.raises(CaptureError, match=r"shape \[2, 3\] for a buffer of \["):
        step.replay()


def test_an_output_without_a_buffer_is_refused() -> None:
    step = EagerCallable(lambda x: (x, x + 1), (torch.zeros(2),), outputs=torch.empty(2))
    with pytest.raises(CaptureError, match="returns 2 tensors and has 1 output buffers"):
        step.replay()


def test_use_after_close_is_an_error() -> None:
    with EagerCallable(lambda x: x, (torch.zeros(2),), name="step") as step:
        step.replay()
    assert step.is_closed
    for use in (step.replay, step.launch, step.check, lambda: step(torch.zeros(2)), lambda: step.outputs):
        with pytest.raises(CaptureError, match="step was closed"):
            use()
    step.close()


def test_examples_without_a_tensor_need_a_device() -> None:
    with pytest.raises(CaptureError, match="name the device"):
        EagerCallable(lambda: None, ())
    EagerCallable(lambda: None, (), device=torch.device("cpu")).replay()


def test_capture_on_the_cpu_is_an_error_and_no_fallback() -> None:
    with pytest.raises(DeviceError, match="EagerCallable"):
        capture(lambda x: x + 1, (torch.zeros(2),))
    with pytest.raises(DeviceError, match="EagerCallable"):
        CaptureStream("cpu")
    with pytest.raises(DeviceError, match="EagerCallable"):
        GraphPool("cpu")


def test_one_warm_up_call_is_too_few() -> None:
    with pytest.raises(CaptureError, match="at least 2"):
        capture(lambda x: x, (torch.zeros(2),), warmup=1)
