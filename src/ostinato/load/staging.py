"""From a file to a GPU at the speed of the bus: threads read pieces into pinned memory, which go over meanwhile.

A copy from a mapping would fault in every page by one thread, and then be copied once more by the driver.
"""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from ostinato.errors import CheckpointError

PIECE_BYTES = 16 << 20
_THREADS = 6


class _Lane(threading.local):
    """A thread's pinned buffer, its stream, and the last copy out of the buffer."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.copied = self.stream.record_event()


class Staging:
    """The threads of one device, with a pinned buffer each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="ostinato-load")
        self._lane = _Lane(device)

    def read(self, path: Path, start: int, target: torch.Tensor) -> None:
        """Fill ``target``, contiguous uint8 on the device, with the file's bytes from ``start`` on.

        What the current stream does next sees them. Raises CheckpointError where the file cannot be read.
        """
        current = torch.cuda.current_stream(self._device)
        ready = current.record_event()
        try:
            with path.open("rb", buffering=0) as file:
                pieces = range(0, target.numel(), PIECE_BYTES)
                jobs = [self._threads.submit(self._piece, file.fileno(), start, at, target, ready) for at in pieces]
                wait(jobs)  # nobody may read from a descriptor that is closed
            for job in jobs:
                current.wait_event(job.result())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error

    def _piece(
        self, descriptor: int, start: int, at: int, target: torch.Tensor, ready: torch.cuda.Event
    ) -> torch.cuda.Event:
        lane = self._lane
        count = min(PIECE_BYTES, target.numel() - at)
        lane.copied.synchronize()
        view: Any = lane.buffer.numpy()[:count]  # a buffer, whatever the stubs of older Python say
        done = 0
        while done < count:
            got = os.preadv(descriptor, [view[done:]], start + at + done)
            if got == 0:
                raise OSError(0, "the file ended early: it was changed while it was read")
            done += got
        lane.stream.wait_event(ready)
        with torch.inference_mode(), torch.cuda.stream(lane.stream):  # the target may be an inference tensor
            target[at : at + count].copy_(lane.buffer[:count], non_blocking=True)
        copied: torch.cuda.Event = lane.stream.record_event()
        lane.copied = copied
        return copied


@functools.cache
def staging(device: torch.device) -> Staging:
    """The staging of a device, made when first used and kept: pinning memory takes longer than reading it."""
    return Staging(device)
