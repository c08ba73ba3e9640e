"""What ``capture`` hands over, and its twin without a graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

import torch

from ostinato.errors import CaptureError
from ostinato.graphs.inputs import StaticInputs
from ostinato.graphs.report import CaptureReport
from ostinato.graphs.static import check_outputs
from ostinato.graphs.streams import CaptureStream, GraphPool
from ostinato.graphs.tree import tensors


class CapturedCallable:
    """A graph with everything that it needs to stay right. Made by :func:`ostinato.graphs.capture`.

    ``inputs`` and ``outputs`` are trees of static tensors: the same memory on every replay, so an output that must
    outlive the next replay has to be copied. The next replay waits for what the caller's current stream has queued.
    """

    def __init__(
        self,
        name: str,
        graph: torch.cuda.CUDAGraph,
        pool: GraphPool,
        inputs: StaticInputs,
        outputs: Any,
        keep_alive: list[Any],
    ) -> None:
        self.name = name
        self.num_replays = 0
        self.stream: CaptureStream = pool.stream
        self.device = pool.device
        self._pool: GraphPool | None = pool
        self._graph: torch.cuda.CUDAGraph | None = graph
        self._inputs: StaticInputs | None = inputs
        self._outputs = outputs
        self._keep_alive = keep_alive
        self._report: CaptureReport | None = None
        self._launch: Callable[[], None] = graph.replay
        self._index, self._raw_stream = pool.stream.index, pool.stream.raw
        self._current_raw: Callable[[int], int] = torch._C._cuda_getCurrentRawStream

    def replay(self) -> None:
        """Launches the graph on its own stream; reads the static inputs as they are.

        No allocation, no synchronization. Where the graph's stream is already current (inside ``with graph.stream:``)
        this is the launch alone; elsewhere events order it with the device's current stream.
        """
        if self._current_raw(self._index) == self._raw_stream:
            self._launch()
        else:
            with self.stream:
                self._launch()
        self.num_replays += 1

    def launch(self) -> None:
        """Launches the graph on the current stream of its device, which the caller has made sure is right."""
        self._launch()
        self.num_replays += 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Brings new inputs to the static ones, replays, and returns the static outputs.

        Raises StaleInputError when an input does not have the captured shape, dtype, device, host value or (for
        StaticBuffers) address.
        """
        inputs = self.inputs_or_closed()
        with self.stream:
            inputs.load(inputs.tree_of_call(args, kwargs))
            self._launch()
        self.num_replays += 1
        return self._outputs

    def inputs_or_closed(self) -> StaticInputs:
        """The static inputs. Raises CaptureError after :meth:`close`."""
        if self._inputs is None:
            self._refuse_closed()
        assert self._inputs is not None
        return self._inputs

    @property
    def inputs(self) -> Any:
        """The tree of tensors that the graph reads."""
        return self.inputs_or_closed().tree

    @property
    def outputs(self) -> Any:
        """The tree of tensors that the graph writes."""
        self.inputs_or_closed()
        return self._outputs

    def check(self) -> None:
        """Raises StaleInputError when a buffer that the graph reads in place was rebound."""
        self.inputs_or_closed().check()

    def report(self) -> CaptureReport:
        """What was captured."""
        assert self._report is not None, "capture() sets the report before it hands the callable over"
        return self._report

    def set_report(self, report: CaptureReport) -> None:
        """For ``capture`` alone."""
        self._report = report

    @property
    def memory_bytes(self) -> int:
        """Bytes that the graph added to its pool."""
        return 0 if self._report is None or self._graph is None else self._report.memory_bytes

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._graph is None

    def close(self) -> None:
        """Waits for the last replay, then frees the graph and everything that it kept. Calling it again is fine."""
        if self._graph is None:
            return
        self.stream.synchronize()
        self._launch = self._refuse_closed
        self._graph.reset()
        assert self._pool is not None
        self._pool.release()
        self._graph = self._inputs = self._outputs = self._pool = None
        self._keep_alive = []

    def _refuse_closed(self) -> None:
        raise CaptureError(f"{self.name} was closed: capture it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EagerCallable:
    """The interface of a CapturedCallable without a graph: ``replay()`` calls the function on the static inputs.

    For the CPU, and for measuring a graph against eager. It is asked for by name and never taken in place of a graph.
    ``outputs`` (optional) are buffers into which the results are copied, as in ``capture``; without them
    :attr:`outputs` is whatever the last call returned, and None before the first. ``stream`` is a context that does
    nothing: eager work runs on the current stream.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        example_inputs: Any,
        *,
        device: torch.device | None = None,
        outputs: Any = None,
        name: str | None = None,
    ) -> None:
        self.name = name or callable_name(fn)
        self.num_replays = 0
        self.stream: AbstractContextManager[None] = nullcontext()
        self._fn: Callable[..., Any] | None = fn
        self._inputs: StaticInputs | None = StaticInputs(example_inputs, device)
        self.device = self._inputs.device
        self._declared = outputs
        self._outputs = outputs

    def replay(self) -> None:
        """Calls the function on the static inputs as they are."""
        if self._fn is None:
            self._refuse_closed()
        result = self.inputs_or_closed().call(self._fn)
        self._outputs = result if self._declared is None else into_outputs(self._declared, result, self.name)
        self.num_replays += 1

    launch = replay

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a CapturedCallable: the same checks, then the function."""
        inputs = self.inputs_or_closed()
        inputs.load(inputs.tree_of_call(args, kwargs))
        self.replay()
        return self._outputs

    def inputs_or_closed(self) -> StaticInputs:
        """The static inputs. Raises CaptureError after :meth:`close`."""
        if self._inputs is None:
            self._refuse_closed()
        assert self._inputs is not None
        return self._inputs

    @property
    def inputs(self) -> Any:
        """The tree of tensors that the function reads."""
        return self.inputs_or_closed().tree

    @property
    def outputs(self) -> Any:
        """What the last replay wrote."""
        self.inputs_or_closed()
        return self._outputs

    def check(self) -> None:
        """Raises StaleInputError when a buffer that is read in place was rebound."""
        self.inputs_or_closed().check()

    @property
    def memory_bytes(self) -> int:
        """0: there is no pool."""
        return 0

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._fn is None

    def close(self) -> None:
        """Drops the function and its buffers. Calling it again is fine."""
        self._fn = self._inputs = self._outputs = self._declared = None

    def _refuse_closed(self) -> None:
        raise CaptureError(f"{self.name} was closed: make it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def into_outputs(declared: Any, result: Any, label: str) -> Any:
    """Copies the tensors of ``result`` into the declared buffers, in order, and returns the buffers.

    Raises CaptureError when their number, shapes, dtypes or devices differ.
    """
    buffers, values = list(tensors(declared, "outputs")), list(tensors(result, "result"))
    check_outputs(buffers, values, label)
    with torch.no_grad():
        for (_, buffer), (_, value) in zip(buffers, values, strict=True):
            if buffer.data_ptr() != value.data_ptr():
                buffer.copy_(value)
    return declared


def callable_name(fn: Callable[..., Any]) -> str:
    """What to call a function in messages."""
    return str(getattr(fn, "__qualname__", type(fn).__name__))
