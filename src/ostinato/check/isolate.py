"""Checking in a process of its own, with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from ostinato.check.child import USAGE_MARK
from ostinato.check.report import from_json
from ostinato.check.result import Report
from ostinato.errors import UsageError

_GRACE_S = 15.0
_MAX_PRINTED = 20_000


@dataclass(frozen=True, slots=True)
class Request:
    """One check. ``limit_s`` is wall-clock time; ``arch`` the compute capability; ``passes`` is ``cpu``, ``gpu`` or
    ``all`` (the GPU too, where there is one)."""

    target: str
    meta: bool = False
    num_calls: int = 4
    torch_version: str | None = None
    arch: tuple[int, int] = (9, 0)
    arguments: tuple[str, ...] = ()
    cache: str = "all"
    dtype: str | None = None
    passes: str = "all"
    limit_s: float = 120.0
    threads: int = 2


def run_isolated(request: Request) -> Report:
    """Run a check in a child process and read its report.

    What the checked code prints is kept in the report. A child that ends by itself, crashes or does not end gives a
    partial report. Raises UsageError for a target that names nothing.
    """
    with tempfile.TemporaryDirectory(prefix="ostinato-check-") as folder:
        asked, answer, printed = Path(folder) / "request.json", Path(folder) / "result.json", Path(folder) / "printed"
        asked.write_text(json.dumps({name: getattr(request, name) for name in request.__slots__}), encoding="utf-8")
        command = [sys.executable, "-m", "ostinato.check.child", str(asked), str(answer)]
        with printed.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            overran = False
            try:
                process.wait(request.limit_s + _GRACE_S)
            except subprocess.TimeoutExpired:
                overran = True
            finally:
                _end_group(process)
        text = printed.read_bytes()[-_MAX_PRINTED:].decode("utf-8", "replace")
        if answer.is_file():
            report = from_json(answer.read_text(encoding="utf-8"))
            if report.partial.startswith(USAGE_MARK):
                raise UsageError(report.partial.removeprefix(USAGE_MARK))
            return replace(report, printed=text)
    return Report(target=request.target, findings=(), partial=_why(process, overran, request, text), printed=text)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the child and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(process: subprocess.Popen[bytes], overran: bool, request: Request, text: str) -> str:
    if overran:
        return f"killed after {request.limit_s:g} s: it did not react to the time limit, so it hangs in native code"
    code = process.returncode
    last = (text.strip().splitlines() or ["nothing was printed"])[-1][:200]
    if code is not None and code < 0:
        return f"the checked code ended its process with {signal.Signals(-code).name}; the last line it printed: {last}"
    return f"the checked code ended its process with exit code {code} too early; the last line it printed: {last}"
