"""Buffers that are allocated, then set to None, while some method asks ``is None`` to choose its path.

A capture keeps whichever path was there: if the None came in between, that is the other one, and nothing says so.
"""

from __future__ import annotations

import ast
import re

from ostinato.check.finding import Certainty, Finding, Frame, Severity
from ostinato.check.rules import RULES

_ALLOCATIONS = frozenset(
    [
        "empty",
        "zeros",
        "ones",
        "full",
        "empty_like",
        "zeros_like",
        "ones_like",
        "randn",
        "rand",
        "new_empty",
        "new_zeros",
        "empty_strided",
    ]
)


_CLEARED = re.compile(r"self\.(\w+) = None\b")
_MADE = re.compile(r"self\.(\w+) = [\w.]*\b(?:" + "|".join(sorted(_ALLOCATIONS)) + r")\(")


def scan_module(tree: ast.Module, source: str, file: str) -> list[Finding]:
    """Findings in every class of a module. The text is asked first, since hardly a file has both patterns."""
    if not set(_CLEARED.findall(source)) & set(_MADE.findall(source)):
        return []
    return [f for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for f in scan_class(node, file)]


def _self_attribute(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _is_allocation(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ALLOCATIONS


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _asked(test: ast.expr) -> str | None:
    """The attribute of which a condition asks whether it is there."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test = test.operand
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is | ast.IsNot) and _is_none(test.comparators[0]):
        test = test.left
    return _self_attribute(test)


def scan_class(node: ast.ClassDef, file: str) -> list[Finding]:
    """Findings in one class: allocated in one place, None after it in another, and asked for in a third."""
    allocated: dict[str, tuple[str, int]] = {}
    cleared: dict[str, tuple[str, int]] = {}
    asked: dict[str, tuple[str, int]] = {}
    for method in node.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        for inner in ast.walk(method):
            if isinstance(inner, ast.Assign):
                for target in inner.targets:
                    name = _self_attribute(target)
                    if name is None:
                        continue
                    if _is_allocation(inner.value):
                        allocated.setdefault(name, (method.name, inner.lineno))
                    elif _is_none(inner.value):
                        cleared[name] = (method.name, inner.lineno)
            elif isinstance(inner, ast.If | ast.IfExp):
                name = _asked(inner.test)
                if isinstance(inner, ast.If) and all(isinstance(n, ast.Raise) for n in inner.body):
                    continue  # says so instead of taking another path
                if name is not None and method.name != "__init__":
                    asked.setdefault(name, (method.name, inner.lineno))
    found: list[Finding] = []
    for name, (method_name, line) in asked.items():
        if name not in allocated or name not in cleared:
            continue
        made, gone = allocated[name], cleared[name]
        is_after = gone[1] > made[1] if gone[0] == made[0] else made[0] == "__init__" and gone[0] != "__init__"
        if is_after and method_name not in (gone[0], made[0]):
            where = Frame(file, line, method_name)
            text = (
                f"self.{name} is allocated at line {made[1]} and set to None at line {gone[1]}: "
                "this branch silently takes the other path"
            )
            found.append(
                Finding(
                    RULES["FALLBACK"], Severity.HAZARD, Certainty.SUSPECT, text, "source", where, "static", (where,)
                )
            )
    return found
