"""A file mapped into memory, of which only what is being read occupies memory."""

from __future__ import annotations

import mmap
import sys
import warnings
from pathlib import Path

import torch

from ostinato.errors import ModelFileError


class MappedFile:
    """A read-only mapping. It lives as long as a view of it does.

    Raises ``error`` where the file cannot be read.
    """

    def __init__(self, path: Path, error: type[ModelFileError]) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except OSError as problem:
            raise error(f"cannot read {path}: {problem.strerror or problem}") from problem

    @property
    def buffer(self) -> mmap.mmap | bytes:
        """All bytes, for reading a header."""
        return b"" if self._map is None else self._map

    def slice(self, start: int, num_bytes: int) -> torch.Tensor:
        """Bytes [start, start + num_bytes), within the file: a uint8 view that must never be written to."""
        assert 0 <= start <= start + num_bytes <= self.size
        if num_bytes == 0 or self._map is None:
            return torch.empty(0, dtype=torch.uint8)
        with warnings.catch_warnings():
            # A writable mapping would not warn, but Linux counts it against the memory of the machine, and a model
            # that is larger could then not be opened.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=num_bytes)

    def release(self, start: int, num_bytes: int) -> None:
        """Give the pages of these bytes back to the system; they are read again if they are used again."""
        if sys.platform == "linux" and self._map is not None and num_bytes:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, start + num_bytes - first)
