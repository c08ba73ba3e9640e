"""The eleven ways in which captures have gone wrong for others: each is impossible here, or caught with its line."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ostinato.errors import CaptureError, CaptureRefusedError, ReplayMismatchError, StaleInputError
from ostinato.graphs import Breaks, GraphPool, StaticBuffers, capture

CUDA = torch.device("cuda", 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Buffers(StaticBuffers):
    tokens: torch.Tensor
    hidden: torch.Tensor


def _buffers() -> Buffers:
    return Buffers(torch.zeros(4, dtype=torch.int64, device=CUDA), torch.zeros(4, 8, device=CUDA))


def _x() -> torch.Tensor:
    torch.manual_seed(12)
    return torch.randn(4, 8, device=CUDA)


def _refused(function: Callable[..., Any], line: str, *words: str, **options: Any) -> None:
    """Capture refuses ``function``, naming the source line that holds ``line``, and the GPU still works afterwards."""
    with pytest.raises(CaptureRefusedError) as caught:
        capture(function, (_x(),), name="step", **options)
    message = str(caught.value)
    lines, start = inspect.getsourcelines(function)
    number = start + next(index for index, text in enumerate(lines) if line in text)
    assert f"{__file__}:{number} " in message, message
    for word in ("Remedy: ", *words):
        assert word in message, message
    _assert_gpu_is_well()


def _assert_gpu_is_well() -> None:
    assert not torch.cuda.is_current_stream_capturing()
    x = _x()
    step = capture(lambda t: t * 3, (x,))
    assert torch.equal(step(x + 1), (x + 1) * 3)
    step.close()


def test_01_the_stream_of_the_graph_is_explicit_and_ordered_with_the_callers() -> None:
    """Other devices are in test_capture.py, for every device that there is."""
    x = _x()

    def slow(t: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            t = t * 1.0
        return t + 1

    step = capture(slow, (x,))
    streams = [torch.cuda.Stream() for _ in range(3)]
    for turn in range(30):
        with torch.cuda.stream(streams[turn % 3]):
            value = torch.full((4, 8), float(turn), device=CUDA)
            # The next turn overwrites the output: the copy is ordered before it only by the events.
            seen = step(value).clone()
            streams[turn % 3].synchronize()
            assert seen.eq(turn + 1.0).all()
    step.close()


def test_02_tensors_made_just_before_capture_stay_alive() -> None:
    weight = torch.randn(512, 512, device=CUDA, dtype=torch.bfloat16)
    holder = [weight.to(torch.float32)]
    expected = holder[0].clone()
    x = torch.randn(2, 512, device=CUDA)
    step = capture(lambda t: t @ holder[0], (x,))
    holder.clear()
    holder.append(torch.zeros(1, device=CUDA))
    torch.cuda.synchronize()
    garbage = [torch.full((512, 512), float("nan"), device=CUDA) for _ in range(64)]
    torch.testing.assert_close(step(x), x @ expected)
    del garbage
    step.close()


def test_03_an_output_wider_than_its_buffer_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"shape \[4, 8\] for a buffer of \[4, 4\]"):
        capture(lambda x: x + 1, (_x(),), outputs=torch.empty(4, 4, device=CUDA))
    buffers = _buffers()
    with pytest.raises(StaleInputError, match=r"Buffers.hidden takes shape \[4, 8\], not \[4, 16\]"):
        capture(lambda b: b.store("hidden", torch.zeros(4, 16, device=CUDA)), (buffers,))
    _assert_gpu_is_well()


def test_04_a_buffer_overwritten_with_none_is_found() -> None:
    buffers = _buffers()
    step = capture(lambda b: b.hidden + 1, (buffers,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        buffers.hidden = None  # type: ignore[misc, assignment]  # the fault under test
    object.__setattr__(buffers, "hidden", None)
    with pytest.raises(StaleInputError, match=r"Buffers.hidden was overwritten with None"):
        step.check()
    with pytest.raises(StaleInputError, match=r"overwritten with None"):
        capture(lambda b: b.tokens + 1, (buffers,))
    step.close()


def test_05_item_in_a_diagnostic() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.abs().max().item()  # the diagnostic
        if not bool(y.isfinite().all()):
            raise ValueError
        return y

    _refused(step, "the diagnostic", "_local_scalar_dense", ".item()", "1 more such operations", "isfinite")


def test_05_an_item_that_is_swallowed_is_still_refused() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        try:
            x.sum().item()  # the diagnostic
        except Exception:
            return x * 2
        return x * 2

    _refused(step, "the diagnostic", "_local_scalar_dense")


def test_06_shapes_that_depend_on_data() -> None:
    def with_nonzero(x: torch.Tensor) -> torch.Tensor:
        return x.flatten().nonzero().sum()  # the line

    def with_mask(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0].sum()  # the line

    def with_bincount(x: torch.Tensor) -> torch.Tensor:
        return torch.bincount(x.flatten().abs().long())  # the line

    for function in (with_nonzero, with_mask, with_bincount):
        _refused(function, "the line", "depends on the data", "scatter_add_")
    sound = capture(
        lambda x: torch.zeros(8, device=CUDA).scatter_add_(
            0, x.flatten().abs().long() % 8, torch.ones(32, device=CUDA)
        ),
        (_x(),),
    )
    sound.close()


def test_07_python_numbers_written_into_buffers() -> None:
    buffer, position = torch.zeros(8, device=CUDA), [0]

    def one(x: torch.Tensor) -> torch.Tensor:
        buffer[0] = 5.0  # the line
        return x + buffer[0]

    def several(x: torch.Tensor) -> torch.Tensor:
        position[0] += 1
        buffer[0:2] = float(position[0])  # the line
        return x + buffer[0]

    def indexed(x: torch.Tensor) -> torch.Tensor:
        position[0] = (position[0] + 1) % 8
        buffer[position[0]].copy_(x[0, 0])  # the line
        return x + buffer

    _refused(one, "the line", "ordinary host memory", "StaticBuffers.fill", state=buffer)
    _refused(several, "the line", "in one call and", "device tensor", state=buffer)
    _refused(indexed, "the line", "in one call and", "device tensor", state=buffer)

    def fills(b: Buffers) -> torch.Tensor:
        b.fill("tokens", 3)
        return b.tokens + 1

    with pytest.raises(CaptureRefusedError, match=r"would freeze the host's value"):
        capture(fills, (_buffers(),))
    _assert_gpu_is_well()


def test_08_allocations_and_copies_inside_the_step() -> None:
    def allocates(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.zeros(1024, 1024, device=CUDA)  # the line
        return x + scratch[0, 0]

    step = capture(allocates, (_x(),))
    largest = step.report().largest_allocations[0]
    assert largest.num_bytes == 4 * 1024 * 1024
    assert "torch.zeros(1024, 1024" in largest.site
    step.close()
    _refused(allocates, "the line", "4194304 bytes in every step", max_allocation_bytes=1024 * 1024)

    def to_host(x: torch.Tensor) -> torch.Tensor:
        return x + x.cpu().sum().item()  # the line

    def from_host(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(8).to(CUDA)  # the line

    _refused(to_host, "the line", "copies to the host")
    _refused(from_host, "the line", "StaticBuffers.fill")

    def repeats(x: torch.Tensor) -> torch.Tensor:
        return torch.repeat_interleave(x, torch.ones(4, dtype=torch.int64, device=CUDA), dim=0)  # the line

    _refused(repeats, "the line", "output_size=")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_08_a_tensor_of_another_device_needs_a_break() -> None:
    def crosses(x: torch.Tensor) -> torch.Tensor:
        return x.to("cuda:1") * 2  # the line

    _refused(crosses, "the line", "Breaks")
    there = torch.zeros(4, 8, device="cuda:1")
    with pytest.raises(CaptureError, match="move it there first"):
        capture(lambda a, b: (a, b), (_x(), there))
    here = _x()
    first = capture(lambda t: t.mul_(2), _as_buffers(here), name="first")
    second = capture(lambda t: t.add_(1), _as_buffers(there), name="second")
    with Breaks("step") as step:
        step.captured(first)
        step.eager("move", lambda: there.copy_(here, non_blocking=True), stream=first.stream, reason="other device")
        step.captured(second)
        step.replay()
    assert torch.equal(there.cpu(), (_x() * 2 + 1).cpu())


@dataclasses.dataclass(frozen=True, eq=False)
class One(StaticBuffers):
    tensor: torch.Tensor

    def mul_(self, value: float) -> torch.Tensor:
        return self.tensor.mul_(value)

    def add_(self, value: float) -> torch.Tensor:
        return self.tensor.add_(value)


def _as_buffers(tensor: torch.Tensor) -> tuple[One]:
    return (One(tensor),)


def test_09_branches_of_the_host_on_tensors() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line
            return x * 2
        return x

    _refused(branches, "the line", "torch.where")

    def on_offset(x: torch.Tensor) -> torch.Tensor:
        offsets = x[0].long()
        return x * 2 if offsets[0] != 0 else x  # the line

    _refused(on_offset, "the line", "torch.where")


def test_10_sharing_by_a_name_that_matches_nothing() -> None:
    with pytest.raises(CaptureError, match=r"cannot share 'hiddens': the source has only \['hidden', 'tokens'\]"):
        Buffers.sharing(_buffers(), ["hiddens"], tokens=_buffers().tokens)
    prefill = _buffers()
    decode = Buffers.sharing(prefill, ["hidden"], tokens=_buffers().tokens)
    pool = GraphPool(CUDA)
    write = capture(lambda b: b.store("hidden", b.tokens.view(4, 1).expand(4, 8).float()), (prefill,), pool=pool)
    read = capture(lambda b: b.hidden.sum(1), (decode,), pool=pool)
    prefill.fill("tokens", [1, 2, 3, 4])
    write.replay()
    read.replay()
    assert read.outputs.tolist() == [8.0, 16.0, 24.0, 32.0]
    write.close()
    read.close()


def test_11_a_scale_computed_in_warm_up_and_kept() -> None:
    kept: dict[str, Any] = {}

    def keeps_tensor(x: torch.Tensor) -> torch.Tensor:
        if "scale" not in kept:
            kept["scale"] = x.abs().amax()  # the line
        return x / kept["scale"]

    _refused(keeps_tensor, "the line", "warm-up made here and kept")

    def keeps_number(x: torch.Tensor) -> torch.Tensor:
        if "number" not in kept:
            kept["number"] = x.abs().max().item()  # the line
        return x / kept["number"]

    _refused(keeps_number, "the line", "only the first call does this")

    def follows(x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().amax()

    capture(follows, (_x(),)).close()


def test_state_that_is_rebound_instead_of_written() -> None:
    state = [torch.zeros(4, 8, device=CUDA)]

    def step(x: torch.Tensor) -> torch.Tensor:
        state[0] = state[0] + x  # the line
        return state[0] * 1

    _refused(step, "the line", "warm-up made here and kept")


def test_state_that_is_written_and_not_declared() -> None:
    cache = torch.zeros(4, 8, device=CUDA)

    def step(x: torch.Tensor) -> torch.Tensor:
        cache.add_(x)  # the line
        return cache * 2

    _refused(step, "the line", "state=(tensor,)")
    assert cache.eq(0).all(), "a refused capture leaves the caller's tensors as they were"
    capture(step, (_x(),), state=cache).close()
    assert cache.eq(0).all()


def test_a_cache_that_grows() -> None:
    cache = [torch.zeros(1, 8, device=CUDA)]

    def step(x: torch.Tensor) -> torch.Tensor:
        cache[0] = torch.cat([cache[0], x])  # the line
        return cache[0].sum(0)

    _refused(step, "the line")


def test_a_generator_that_is_not_registered() -> None:
    generator = torch.Generator(CUDA)

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + torch.empty_like(x).normal_(generator=generator)  # the line

    _refused(step, "the line", "rng=(generator,)")


def test_calls_of_cuda_itself_are_refused_with_their_cause() -> None:
    def waits(x: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()  # the line
        return x * 2

    _refused(waits, "the line", "capturing", "waits for the device")

    def forks(x: torch.Tensor) -> torch.Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return x * 2

    with pytest.raises(CaptureRefusedError, match=r"unjoined|wait_stream"):
        capture(forks, (_x(),))
    _assert_gpu_is_well()


def test_a_users_own_error_in_the_capture_keeps_its_cause() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not in a capture, please")  # the line
        return x * 2

    _refused(fails, "the line", "ValueError: not in a capture, please")


def test_a_python_flag_that_changes_is_a_mismatch() -> None:
    calls = [0]

    def step(x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        # Warm-up is calls 1 to 3, the capture is call 4, verification comes after it.
        return x * 2 if calls[0] <= 4 else x * 3

    with pytest.raises(ReplayMismatchError, match=r"replay 1 on fresh inputs differs from eager: output"):
        capture(step, (_x(),))


def test_a_kernel_that_leaves_part_of_its_output_unwritten() -> None:
    """Half of the output comes from uninitialised memory, which eager finds by luck and a replay does not."""

    def step(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(4, 16, device=CUDA)
        if not torch.cuda.is_current_stream_capturing():
            out.zero_()
        out[:, :8].copy_(x)
        return out

    with pytest.raises(ReplayMismatchError, match=re.escape("output at [0, 8]")) as caught:
        capture(step, (_x(),))
    assert "the replay wrote nothing there" in str(caught.value)
