"""Explicit streams: a graph is captured and replayed on a stream of its own device, whatever device is current."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch

from ostinato.errors import DeviceError


def cuda_device(device: torch.device | str | int | None, what: str) -> torch.device:
    """``device`` with its index. Raises DeviceError, naming ``what`` needs it, when it is not a CUDA device here."""
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{what} needs a CUDA device and there is none here; use EagerCallable to run without a graph"
        )
    resolved = torch.device("cuda" if device is None else device)
    if resolved.type != "cuda":
        raise DeviceError(f"{what} needs a CUDA device, not {resolved}; use EagerCallable to run without a graph")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise DeviceError(f"{what} needs cuda:{index} and this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def new_event() -> torch.cuda.Event:
    """An event without timing, which is what ordering two streams takes."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped


class CaptureStream:
    """A side stream of one device, and the events that order it with whatever stream its caller is on.

    ``with stream:`` makes it current on its device (and that device current), after waiting for the stream that was
    current before, which in turn waits for it at the end. Inside, a replay is one launch without any event.
    """

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        self.device = cuda_device(device, "CaptureStream")
        self.index: int = self.device.index
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.raw: int = self.stream.cuda_stream
        with torch.cuda.device(self.device):
            self._before, self._after = new_event(), new_event()
        self._entered: list[ExitStack] = []

    def is_current(self) -> bool:
        """Whether the device's current stream is this one."""
        return int(torch._C._cuda_getCurrentRawStream(self.index)) == self.raw

    def wait_for_current(self) -> None:
        """What is queued on the device's current stream finishes before what is queued here from now on."""
        if not self.is_current():
            self._before.record(torch.cuda.current_stream(self.index))
            self.stream.wait_event(self._before)

    def signal_current(self) -> None:
        """What is queued here finishes before what is queued on the device's current stream from now on."""
        if not self.is_current():
            self._after.record(self.stream)
            torch.cuda.current_stream(self.index).wait_event(self._after)

    def synchronize(self) -> None:
        """The host waits for this stream."""
        self.stream.synchronize()

    def __enter__(self) -> Self:
        self.wait_for_current()
        stack = ExitStack()
        stack.enter_context(torch.cuda.stream(self.stream))
        self._entered.append(stack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().close()
        self.signal_current()


class GraphPool:
    """A memory pool for graphs of one device, and the one stream on which all of them run.

    Graphs of one pool reuse each other's scratch memory, so they must never run at the same time: that is why the pool
    owns the stream.
    """

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        self.stream = CaptureStream(device)
        self.device = self.stream.device
        self._handle = torch.cuda.graph_pool_handle()
        self._num_graphs = 0

    def acquire(self) -> Any:
        """The handle to capture into; a graph that takes it gives it back with :meth:`release`."""
        self._num_graphs += 1
        return self._handle

    def release(self) -> None:
        """One graph fewer. PyTorch retires a handle with its last graph, so the next one gets a new handle."""
        self._num_graphs -= 1
        if self._num_graphs == 0:
            self._handle = torch.cuda.graph_pool_handle()

    @property
    def memory_bytes(self) -> int:
        """Bytes that the pool holds on its device: scratch and outputs of all its graphs."""
        segments = torch.cuda.memory_snapshot(self._handle)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._handle))
