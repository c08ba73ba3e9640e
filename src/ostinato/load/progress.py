"""How a download tells of its progress; whoever shows it decides how that looks."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """Told of one download at a time."""

    def start(self, label: str, total_bytes: int | None) -> None:
        """A download begins; its size is None where it is not known."""
        ...

    def update(self, done_bytes: int) -> None:
        """So many bytes of it have arrived."""
        ...

    def stop(self) -> None:
        """It ended, well or not."""
        ...


class SilentProgress:
    """Shows nothing."""

    def start(self, label: str, total_bytes: int | None) -> None:
        pass

    def update(self, done_bytes: int) -> None:
        pass

    def stop(self) -> None:
        pass


class BarProgress:
    """A bar with bytes, speed and time left, on ``console`` (default: standard error)."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._task: TaskID | None = None

    def start(self, label: str, total_bytes: int | None) -> None:
        self._bar.start()
        self._task = self._bar.add_task(label, total=total_bytes)

    def update(self, done_bytes: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=done_bytes)

    def stop(self) -> None:
        self._bar.stop()
        self._task = None
