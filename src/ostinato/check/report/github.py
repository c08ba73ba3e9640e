"""GitHub workflow annotations: one ``::error`` or ``::warning`` line each, capped, with a summary."""

from __future__ import annotations

from pathlib import Path

from ostinato.check.finding import Severity
from ostinato.check.result import Report

_COMMANDS = {Severity.ERROR: "error", Severity.HAZARD: "warning", Severity.WARNING: "notice"}
_MAX_ANNOTATIONS = 10  # of each kind and step: GitHub drops the rest without a word


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def to_github(report: Report, root: Path | None = None) -> str:
    """The report as workflow commands, at most ten of each kind."""
    root = (root or Path.cwd()).resolve()
    lines: list[str] = []
    counts: dict[str, int] = {}
    for finding in report.at_least(Severity.WARNING):
        command = _COMMANDS[finding.severity]
        counts[command] = counts.get(command, 0) + 1
        if counts[command] > _MAX_ANNOTATIONS:
            continue
        path = Path(finding.where.file)
        file = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        title = f"{finding.rule.code} {finding.rule.title}"
        text = _data(f"{finding.message}. Remedy: {finding.remedy}")
        lines.append(f"::{command} file={_property(file)},line={finding.where.line},title={_property(title)}::{text}")
    hidden = sum(max(0, n - _MAX_ANNOTATIONS) for n in counts.values())
    more = f" ({hidden} of them not annotated)" if hidden else ""
    for problem in filter(None, (report.partial, report.internal)):
        lines.append(f"::error title=ostinato check::{_data(problem)}")
    lines.append(f"::notice title=ostinato check::{_data(report.summary() + more)}")
    return "\n".join(lines) + "\n"
