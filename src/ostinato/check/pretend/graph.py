"""``torch.cuda.CUDAGraph`` and ``torch.cuda.graph`` of the pretended device: a capture is a region whose operations go
onto a tape, and ``replay()`` runs the tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ostinato.check.finding import NOWHERE, Severity
from ostinato.check.frames import raised_at
from ostinato.check.pretend.generator import PretendGenerator
from ostinato.check.pretend.streams import PretendStream, StreamState
from ostinato.check.pretend.world import World


class CaptureObserver(Protocol):
    """Who records captures and replays: the script pass."""

    def begin(self, graph: Any) -> None:
        """A capture begins."""

    def end(self, graph: Any) -> None:
        """A capture ends."""

    def replay(self, graph: Any) -> None:
        """A replay is asked for."""


class _Graph:
    """``torch.cuda.CUDAGraph``."""

    world: World
    streams: StreamState
    observer: CaptureObserver | None = None

    def __init__(self, keep_graph: bool = False) -> None:
        self.keep_graph = keep_graph
        self._region: Any = None
        self._generators: list[PretendGenerator] = []
        self.is_captured = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        """Begin the region."""
        self._region = self.world.region()
        self._region.__enter__()
        if type(self).observer is not None:
            type(self).observer.begin(self)  # type: ignore[union-attr]  # narrowed one line above, on the class

    def capture_end(self) -> None:
        """End the region."""
        if self._region is None:
            return
        if type(self).observer is not None:
            type(self).observer.end(self)  # type: ignore[union-attr]  # as above
        region, self._region, self.is_captured = self._region, None, True
        region.__exit__(None, None, None)

    def replay(self) -> None:
        """Run the tape, if somebody recorded one."""
        if self.world.in_region:
            self.world.report("STREAM_SYNC", Severity.ERROR, "a graph is replayed inside a capture", "CUDAGraph.replay")
        elif type(self).observer is not None:
            type(self).observer.replay(self)  # type: ignore[union-attr]  # as above

    def register_generator_state(self, generator: Any) -> None:
        """From here on the generator may be used in the region."""
        if isinstance(generator, PretendGenerator):
            generator.is_registered = True

    def instantiate(self) -> None:
        """Nothing to do."""

    def reset(self) -> None:
        """Forget the capture."""
        self.is_captured = False

    def pool(self) -> tuple[int, int]:
        """A pool handle."""
        return (0, 1)

    def enable_debug_mode(self) -> None:
        """Nothing to do."""

    def debug_dump(self, path: str) -> None:
        """Nothing to write."""


class _GraphContext:
    """``torch.cuda.graph``."""

    world: World
    streams: StreamState
    default_capture_stream: PretendStream | None = None

    def __init__(
        self, cuda_graph: _Graph, pool: Any = None, stream: PretendStream | None = None, **kwargs: Any
    ) -> None:
        self.cuda_graph = cuda_graph
        self._stream = stream
        self._previous: PretendStream | None = None

    def __enter__(self) -> None:
        """Begin the capture on its stream."""
        self._previous = self.streams.current
        if self._stream is not None:
            self.streams.current = self._stream
        self.cuda_graph.capture_begin()

    def __exit__(self, *error: object) -> None:
        """End it. An error that ends the capture is a finding."""
        if isinstance(error[1], BaseException):
            stack = raised_at(error[1].__traceback__) or (NOWHERE,)
            text = f"{type(error[1]).__name__}: {error[1]}".splitlines()[0]
            self.world.report("RAISED", Severity.ERROR, text, type(error[1]).__name__, stack=stack)
        self.cuda_graph.capture_end()
        if self._previous is not None:
            self.streams.current = self._previous


def make_graph_classes(
    world: World, streams: StreamState
) -> tuple[type[_Graph], type[_GraphContext], Callable[..., Any]]:
    """The classes to put into ``torch.cuda``, and ``make_graphed_callables``, bound to this world."""
    graph = type("CUDAGraph", (_Graph,), {"world": world, "streams": streams})
    context = type("graph", (_GraphContext,), {"world": world, "streams": streams})
    world.graph_class = graph

    def make_graphed_callables(callables: Any, sample_args: Any, num_warmup_iters: int = 3, **kwargs: Any) -> Any:
        many = isinstance(callables, tuple | list)
        for function, arguments in zip(
            callables if many else [callables], sample_args if many else [sample_args], strict=True
        ):
            for _ in range(num_warmup_iters):
                function(*arguments)
            with world.region(), torch.enable_grad():
                function(*arguments)
        return callables

    return graph, context, make_graphed_callables
