"""Streams and events of the pretended device, with what a capture demands of them.

A capture begins on one stream. Another stream takes part after it waited for the capturing one (the fork), and must be
waited for by it before the capture ends (the join).
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from ostinato.check.finding import Frame, Severity
from ostinato.check.frames import user_stack
from ostinato.check.pretend.world import World

_IDS = itertools.count(1)


class StreamState:
    """Which stream is current, which take part in the capture, and which of those still have to be joined."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.default = PretendStream.made(world)
        self.current = self.default
        self.origin: PretendStream | None = None
        self.forked: dict[int, tuple[Frame, ...]] = {}
        world.observers.append(self._on_region)

    def _on_region(self, event: str) -> None:
        if event == "begin":
            self.origin, self.forked = self.current, {}
            return
        for stack in self.forked.values():
            self.world.report(
                "STREAM_FORK",
                Severity.ERROR,
                "this stream is not joined before the capture ends",
                "Stream.wait_stream",
                stack=stack,
            )
        self.origin, self.forked = None, {}

    def takes_part(self, stream: PretendStream) -> bool:
        """Whether a stream is being captured."""
        return self.origin is not None and (stream is self.origin or id(stream) in self.forked)

    def wait(self, waiting: PretendStream, awaited: PretendStream | None) -> None:
        """``waiting`` waits for what ``awaited`` has done so far: this forks, or joins."""
        if self.origin is None or awaited is None or waiting is awaited:
            return
        if self.takes_part(awaited):
            if not self.takes_part(waiting):
                self.forked[id(waiting)] = user_stack()
            if waiting is self.origin or id(awaited) in self.forked:
                self.forked.pop(id(awaited), None)
        elif self.takes_part(waiting):
            self.world.report(
                "STREAM_FORK",
                Severity.ERROR,
                "the capture waits for work of a stream that takes no part in it",
                "Stream.wait_stream",
            )

    def enter(self, stream: PretendStream) -> None:
        """Make a stream current; inside a region it must take part."""
        self.current = stream
        if self.world.watching and not self.takes_part(stream):
            self.world.report(
                "STREAM_FORK",
                Severity.ERROR,
                "work on a stream that did not wait for the capturing one",
                "torch.cuda.stream",
            )


class PretendEvent:
    """``torch.cuda.Event``."""

    world: ClassVar[World]
    streams: ClassVar[StreamState]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Timing and interprocess flags do not matter here."""
        self._stream: PretendStream | None = None
        self.cuda_event = next(_IDS)

    def record(self, stream: PretendStream | None = None) -> None:
        """Remember the stream."""
        self._stream = stream or self.streams.current

    def wait(self, stream: PretendStream | None = None) -> None:
        """Let a stream wait for this event."""
        self.streams.wait(stream or self.streams.current, self._stream)

    def synchronize(self) -> None:
        """The host waits."""
        self.world.report("STREAM_SYNC", Severity.ERROR, "the host waits for an event", "Event.synchronize")

    def query(self) -> bool:
        """The host asks."""
        self.world.report("STREAM_SYNC", Severity.ERROR, "the host asks for an event's state", "Event.query")
        return True

    def elapsed_time(self, other: PretendEvent) -> float:
        """The host reads timestamps."""
        self.world.report("STREAM_SYNC", Severity.ERROR, "the host reads an event's time", "Event.elapsed_time")
        return 1.0


class PretendStream:
    """``torch.cuda.Stream``."""

    world: ClassVar[World]
    streams: ClassVar[StreamState]

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.priority = priority
        self.cuda_stream = self.stream_id = next(_IDS)
        self.device = self.world.normalise(device) or self.world.current_device
        self.device_index = self.device.index or 0
        self._previous: list[PretendStream] = []

    @classmethod
    def made(cls, world: World) -> PretendStream:
        """A stream for a world whose stream state is still being made."""
        stream = cls.__new__(cls)
        stream.priority, stream.cuda_stream, stream.stream_id = 0, 0, 0
        stream.device, stream.device_index, stream._previous = world.current_device, 0, []
        return stream

    def synchronize(self) -> None:
        """The host waits."""
        self.world.report("STREAM_SYNC", Severity.ERROR, "the host waits for a stream", "Stream.synchronize")

    def query(self) -> bool:
        """The host asks."""
        self.world.report("STREAM_SYNC", Severity.ERROR, "the host asks for a stream's state", "Stream.query")
        return True

    def is_capturing(self) -> bool:
        """Whether a region is under way."""
        return self.world.in_region

    def wait_stream(self, stream: PretendStream) -> None:
        """Wait for another stream on the device."""
        self.streams.wait(self, stream)

    def wait_event(self, event: PretendEvent) -> None:
        """Wait for an event on the device."""
        event.wait(self)

    def record_event(self, event: PretendEvent | None = None) -> PretendEvent:
        """Record an event on this stream."""
        event = event or PretendEvent()
        event.record(self)
        return event

    def __enter__(self) -> PretendStream:
        """Make this stream current."""
        self._previous.append(self.streams.current)
        self.streams.enter(self)
        return self

    def __exit__(self, *error: object) -> None:
        """Make the stream before current again."""
        self.streams.current = self._previous.pop()


class StreamContext:
    """``torch.cuda.stream``."""

    def __init__(self, stream: PretendStream | None) -> None:
        self._stream = stream

    def __enter__(self) -> PretendStream | None:
        """Make the stream current; None changes nothing."""
        return self._stream.__enter__() if self._stream is not None else None

    def __exit__(self, *error: object) -> None:
        """Make the stream before current again."""
        if self._stream is not None:
            self._stream.__exit__(*error)


def make_classes(world: World) -> tuple[type[PretendStream], type[PretendEvent], StreamState]:
    """The classes to put into ``torch.cuda``, bound to this world. They stay classes, for annotations."""
    stream = type("Stream", (PretendStream,), {"world": world})
    event = type("Event", (PretendEvent,), {"world": world})
    state = StreamState(world)
    setattr(stream, "streams", state)  # noqa: B010 - the class is made here, and mypy does not know its attributes
    setattr(event, "streams", state)  # noqa: B010 - as above
    state.default.__class__ = stream
    return stream, event, state
