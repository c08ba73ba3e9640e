"""Buckets: one captured step per batch size, and the padding of a batch that falls between two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from ostinato.errors import CaptureError, UsageError


class Replayable(Protocol):
    """What a CapturedCallable, an EagerCallable and Breaks have in common."""

    num_replays: int

    def replay(self) -> None: ...

    def close(self) -> None: ...

    @property
    def memory_bytes(self) -> int: ...


R = TypeVar("R", bound=Replayable)
T = TypeVar("T")


class Buckets(Generic[R]):
    """Ordered batch sizes, each with its own graph, made by ``build(size)`` when first used.

    ``build`` closes over one GraphPool, so that all graphs share scratch memory and a stream. A batch of ``n`` runs in
    the smallest bucket that holds it; its slots ``n … size - 1`` are dummies: they compute on inputs of their own and
    write to a page or slot that no request owns.
    """

    def __init__(self, sizes: Iterable[int], build: Callable[[int], R]) -> None:
        self.sizes = tuple(sorted(set(sizes)))
        if not self.sizes or self.sizes[0] < 1:
            raise UsageError(f"bucket sizes are positive numbers, at least one: got {list(self.sizes)}")
        self._build = build
        self._graphs: dict[int, R] = {}
        self._is_closed = False

    @property
    def max_size(self) -> int:
        """The largest batch that any bucket holds."""
        return self.sizes[-1]

    def bucket_for(self, num_rows: int) -> int:
        """The smallest size that holds ``num_rows``. Raises UsageError when none does."""
        if num_rows < 1 or num_rows > self.max_size:
            raise UsageError(f"a batch of {num_rows} fits no bucket: they hold 1 to {self.max_size}")
        return next(size for size in self.sizes if size >= num_rows)

    def graph_for(self, num_rows: int) -> R:
        """The graph of :meth:`bucket_for`, captured now if it is not yet."""
        if self._is_closed:
            raise CaptureError("these buckets were closed: make new ones")
        size = self.bucket_for(num_rows)
        if size not in self._graphs:
            self._graphs[size] = self._build(size)
        return self._graphs[size]

    def capture_all(self) -> None:
        """Captures every bucket, the largest first: the smaller ones then fit into the scratch that it left."""
        for size in reversed(self.sizes):
            self.graph_for(size)

    def padded(self, rows: list[T], dummy: T) -> list[T]:
        """``rows`` brought to their bucket's size with ``dummy``."""
        return rows + [dummy] * (self.bucket_for(len(rows)) - len(rows))

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Sizes whose graph exists."""
        return tuple(sorted(self._graphs))

    @property
    def memory_bytes(self) -> int:
        """Bytes that the graphs added to their pools."""
        return sum(graph.memory_bytes for graph in self._graphs.values())

    def __iter__(self) -> Iterator[R]:
        return iter(self._graphs.values())

    def close(self) -> None:
        """Closes every graph. Calling it again is fine."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
