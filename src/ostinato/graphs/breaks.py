"""Eager breaks: what must stay outside a graph, by name, between two graphs, with events on explicit streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from ostinato.errors import CaptureError
from ostinato.graphs.callable import CapturedCallable
from ostinato.graphs.streams import CaptureStream, new_event


@dataclasses.dataclass(frozen=True)
class Segment:
    """One part of the step. ``reason`` says why an eager one cannot be captured; captured ones have none."""

    name: str
    run: Callable[[], None]
    stream: CaptureStream
    graph: CapturedCallable | None
    reason: str
    done: torch.cuda.Event


class Breaks:
    """A step that is graph, eager, graph …, in order, on one device or several.

    Every segment starts after the one before it, wherever that ran. Segments exchange tensors through static buffers:
    an eager segment writes to addresses that the next graph reads.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_replays = 0
        self._segments: list[Segment] = []

    def captured(self, graph: CapturedCallable) -> Self:
        """Adds a graph, which runs on its own stream."""
        return self._add(graph.name, graph.launch, graph.stream, graph, "")

    def eager(self, name: str, run: Callable[[], None], *, stream: CaptureStream, reason: str) -> Self:
        """Adds a break: ``run()`` is called with ``stream`` as the current stream of its device."""
        if not reason:
            raise CaptureError(f"the eager break {name!r} has no reason: say why it cannot be captured")
        return self._add(name, run, stream, None, reason)

    def _add(
        self, name: str, run: Callable[[], None], stream: CaptureStream, graph: CapturedCallable | None, reason: str
    ) -> Self:
        if any(segment.name == name for segment in self._segments):
            raise CaptureError(f"{self.name} has a segment {name!r} already: names tell the segments apart")
        with torch.cuda.device(stream.device):
            self._segments.append(Segment(name, run, stream, graph, reason, new_event()))
        return self

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in order."""
        return tuple(self._segments)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the graphs added to their pools."""
        return sum(segment.graph.memory_bytes for segment in self._segments if segment.graph is not None)

    def replay(self) -> None:
        """Runs the segments. The caller's current streams wait for the last one; the host does not."""
        if not self._segments:
            raise CaptureError(f"{self.name} has no segments: add captured() and eager() parts first")
        for segment in self._segments:
            segment.stream.wait_for_current()
        before: Segment | None = None
        for segment in self._segments:
            if before is not None and before.stream.raw != segment.stream.raw:
                segment.stream.stream.wait_event(before.done)
            with torch.cuda.stream(segment.stream.stream):
                segment.run()
                segment.done.record(segment.stream.stream)
            before = segment
        for segment in self._segments:
            segment.stream.signal_current()
        self.num_replays += 1

    def close(self) -> None:
        """Closes the graphs. Calling it again is fine."""
        for segment in self._segments:
            if segment.graph is not None:
                segment.graph.close()
        self._segments.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
