"""What a pass found: one frozen ``Finding`` per rule, line and operation."""

from __future__ import annotations

import enum
import hashlib
import linecache
from dataclasses import dataclass

from ostinato.check.rules import Rule


class Severity(enum.IntEnum):
    """How bad a finding is. ERROR: capture fails, or is wrong at once. HAZARD: capture works, a replay may be wrong."""

    INFO = 0
    WARNING = 1
    HAZARD = 2
    ERROR = 3

    @property
    def label(self) -> str:
        """The lower-case name, as reports print it."""
        return self.name.lower()


class Certainty(enum.StrEnum):
    """How sure a finding is: ``proved`` for the path that ran, ``conditional`` on shapes or architecture, ``likely``
    where made-up values chose the path, ``suspect`` where only the source was read."""

    PROVED = "proved"
    CONDITIONAL = "conditional"
    LIKELY = "likely"
    SUSPECT = "suspect"


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of the checked code. ``file`` is an absolute path, ``line`` counts from 1."""

    file: str
    line: int
    function: str

    @property
    def source(self) -> str:
        """The stripped text of the line; empty if the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()


NOWHERE = Frame("?", 0, "?")


@dataclass(frozen=True, slots=True)
class Finding:
    """One violation. ``count`` is the most times it happened in one call; ``stack`` starts at ``where`` and goes
    outwards, with torch's frames left out."""

    rule: Rule
    severity: Severity
    certainty: Certainty
    message: str
    op: str
    where: Frame
    found_by: str
    stack: tuple[Frame, ...] = ()
    count: int = 1
    assumed: tuple[str, ...] = ()
    suppressed: str | None = None
    variant: str = ""

    @property
    def remedy(self) -> str:
        """The one-line remedy of the rule."""
        return self.rule.remedy

    @property
    def fingerprint(self) -> str:
        """Stable across edits elsewhere in the file: rule, file name, function and the normalised text of the line."""
        text = " ".join(self.where.source.split())
        name = self.where.file.replace("\\", "/").rsplit("/", maxsplit=1)[-1]
        return hashlib.sha256(f"{self.rule.code}|{name}|{self.where.function}|{text}".encode()).hexdigest()[:16]
