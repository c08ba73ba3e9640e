"""Scanning many files, on all cores where there are enough of them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ostinato.check.finding import Finding
from ostinato.check.result import PassRun, Report, sorted_findings
from ostinato.check.static.scan import scan_file
from ostinato.errors import CheckError, UsageError

_PARALLEL_FROM = 32
_SKIPPED_DIRS = frozenset({"__pycache__", ".git", ".venv", "node_modules", "build", "dist"})


def python_files(path: Path) -> list[Path]:
    """The Python files of a path, sorted. Raises UsageError if there is nothing."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"no file or directory {path}")
    found = [f for f in sorted(path.rglob("*.py")) if not _SKIPPED_DIRS & set(f.relative_to(path).parts)]
    if not found:
        raise UsageError(f"no Python files under {path}")
    return found


def _scan_or_say(path: Path) -> tuple[list[Finding], str]:
    try:
        return scan_file(path), ""
    except CheckError as error:
        return [], str(error)


def scan_paths(paths: Sequence[Path]) -> Report:
    """The static pass over files and directories. A file that cannot be parsed makes the report partial."""
    start = time.perf_counter()
    files = [f for path in paths for f in python_files(path)]
    num_workers = min(os.cpu_count() or 1, 8)
    if len(files) >= _PARALLEL_FROM and num_workers > 1 and "fork" in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context("fork").Pool(num_workers) as pool:
            results = pool.map(_scan_or_say, files, chunksize=4)
    else:
        results = [_scan_or_say(f) for f in files]
    problems = [text for _, text in results if text]
    num_lines = sum(_count_lines(f) for f in files)
    return Report(
        target=", ".join(map(str, paths)),
        findings=sorted_findings([f for found, _ in results for f in found]),
        passes=(PassRun("static", time.perf_counter() - start, f"{len(files)} files, {num_lines:,} lines"),),
        num_regions=len(files) - len(problems),
        partial="; ".join(problems),
        notes=("nothing was run: values that only a run can tell (positions, caches, flags) are not decided",),
        is_static_only=True,
    )


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
