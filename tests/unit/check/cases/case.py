"""One case, and what the tables of cases are written with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Make = Callable[[str], tuple[Callable[..., Any], list[tuple[Any, ...]]]]


@dataclass(frozen=True)
class Case:
    """One snippet and what must be said of it."""

    name: str
    make: Make
    verdict: str
    rules: frozenset[str]

    @property
    def path(self) -> Path:
        """The file that holds the snippet."""
        return Path(inspect.getfile(self.make))

    @property
    def bad_lines(self) -> set[int]:
        """The lines of its file that must be reported."""
        source, start = inspect.getsourcelines(self.make)
        return {start + i for i, text in enumerate(source) if text.rstrip().endswith("# BAD")}


def case_of(cases: list[Case]):
    """The decorator ``case(verdict, rules)`` that adds a factory to ``cases``; rules are separated by spaces."""

    def case(verdict: str, rules: str = ""):
        def add(make: Make) -> Make:
            cases.append(Case(make.__name__, make, verdict, frozenset(rules.split())))
            return make

        return add

    return case


def ramp(dev, *shape):
    """float32 from -1 to 1."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(dev)


def ints(dev, *values):
    """int64."""
    return torch.tensor(values).to(dev)


def twice(dev, *shape):
    """Two argument sets of one tensor each, with other values."""
    return [(ramp(dev, *shape),), (ramp(dev, *shape) * 0.5 + 0.1,)]
