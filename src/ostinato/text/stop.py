"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Iterable

from ostinato.errors import SamplingError


class StopStrings:
    """Cuts a stream where the first stop string is complete, however the text is cut into pieces.

    Text that may be the beginning of a stop string is held back until it is clear. Of several stop strings that
    end at the same character the longest counts. The stop string itself is never given out.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if "" in self._stops:
            raise SamplingError("a stop string cannot be empty")
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that is now sure to be part of the answer, whether a stop string has come). Nothing after a stop."""
        if self.stopped:
            return "", True
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]], True
        keep = self._unclear(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The answer has ended: what was held back is text after all."""
        rest, self._held = self._held, ""
        return rest

    def _unclear(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for size in range(longest, 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
