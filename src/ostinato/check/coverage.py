"""Which lines of the checked code ran in the region, and which branches of those functions did not."""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from ostinato.check.finding import Frame
from ostinato.check.frames import is_folded


class LinesRun:
    """Lines that ran, by file. Does nothing while another tracer (a debugger, coverage) is installed."""

    def __init__(self) -> None:
        self.lines: dict[str, set[int]] = {}
        self.is_active = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note every line that runs while the context lasts."""
        if sys.gettrace() is not None:
            self.is_active = False
            yield
            return
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if is_folded(file):
            return None
        lines = self.lines.setdefault(os.path.abspath(file), set())
        lines.add(frame.f_lineno)

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return step

        return step

    def branches_not_reached(self) -> list[Frame]:
        """The first line of each branch that did not run, in functions that did."""
        # A nested function's branches are also its outer one's: the inner wins.
        found: dict[tuple[str, int], Frame] = {}
        for file, lines in sorted(self.lines.items()):
            for function, start, branches in function_branches(file):
                if start & lines:
                    found |= {
                        (file, first): Frame(file, first, function) for first, body in branches if not body & lines
                    }
        return list(found.values())

    def functions_run(self, file: str) -> set[int]:
        """Every line of a file that belongs to a function that ran."""
        lines = self.lines.get(file, set())
        inside: set[int] = set()
        for _, body, _ in _functions(file):
            if body & lines:
                inside |= body
        return inside


def _span(nodes: list[ast.stmt]) -> set[int]:
    return set(range(nodes[0].lineno, (nodes[-1].end_lineno or nodes[-1].lineno) + 1)) if nodes else set()


@cache
def _functions(file: str) -> tuple[tuple[str, frozenset[int], tuple[tuple[int, frozenset[int]], ...]], ...]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            branches = []
            for inner in ast.walk(node):
                if isinstance(inner, ast.If | ast.While | ast.For):
                    for body in (inner.body, inner.orelse):
                        if body and not (len(body) == 1 and isinstance(body[0], ast.If | ast.Pass)):
                            branches.append((body[0].lineno, frozenset(_span(body))))
            found.append((node.name, frozenset(_span(node.body)), tuple(branches)))
    return tuple(found)


def function_branches(file: str) -> tuple[tuple[str, frozenset[int], tuple[tuple[int, frozenset[int]], ...]], ...]:
    """For each function of a file: its name, its lines, and its branches as (first line, lines)."""
    return _functions(file)
