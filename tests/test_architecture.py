"""Imports point downward only, Triton stays in triton.py, and nothing is imported inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "ostinato"

# What each part may import, itself and ``errors`` aside. A part is a folder or a top-level module.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "quant": set(),
    "graphs": set(),
    "check": {"graphs"},
    "kernels": {"quant", "config"},
    "kv": {"kernels", "quant"},
    "sampling": {"kernels"},
    "layers": {"kernels", "quant", "kv"},
    "models": {"layers", "kv", "kernels", "quant"},
    "load": {"models", "quant", "config"},
    "text": set(),
    "engine": {"load", "models", "sampling", "kv", "graphs", "layers", "kernels", "quant", "config"},
    "llm": {"engine", "text", "sampling", "load", "graphs", "layers", "models", "config"},
    "cli": {"llm", "check", "engine", "load", "models", "sampling", "text", "kv", "quant", "config"},
}


def _parts() -> list[Path]:
    return sorted(p for p in SRC.rglob("*.py") if p != SRC / "__init__.py")


def _part_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
    return found


@pytest.mark.parametrize("path", _parts(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_downward(path: Path) -> None:
    part = _part_of(path)
    assert part in ALLOWED, f"{part} has no place in the layout"
    for line, name in _imports(ast.parse(path.read_text())):
        if name.split(".")[0] == "ostinato" and "." in name:
            target = name.split(".")[1]
            assert target in ALLOWED[part] | {part, "errors"}, f"{path}:{line} imports {name}"
        if name.split(".")[0] == "triton":
            assert path.name == "triton.py", f"{path}:{line} imports Triton outside a triton.py"
        if part == "models" and name.startswith("ostinato.models.") and path.stem not in {"registry", "presets"}:
            allowed = ("ostinato.models.interface", f"ostinato.models.{path.stem.removesuffix('_config')}_")
            assert name.startswith(allowed), f"{path}:{line}: a model imports another"  # a family may have two files


@pytest.mark.parametrize("path", _parts(), ids=lambda p: str(p.relative_to(SRC)))
def test_no_import_hides_in_a_function(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            assert not _imports(function), f"{path}:{function.lineno} imports inside {function.name}"


def test_the_environment_is_read_in_one_place() -> None:
    readers = {
        str(path.relative_to(SRC))
        for path in _parts()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    }
    assert readers <= {"config.py"}, f"the environment is read in {sorted(readers)}; config.py alone may"
