"""The report for people: the first thing to fix on top, then grouped by file. Colour only on a terminal."""

from __future__ import annotations

import itertools
import os
from io import StringIO
from typing import IO

from rich.console import Console
from rich.markup import escape

from ostinato.check.finding import Finding, Severity
from ostinato.check.result import Report

_STYLES = {Severity.ERROR: "bold red", Severity.HAZARD: "bold yellow", Severity.WARNING: "cyan", Severity.INFO: "dim"}
_MAX_STACK = 4


def _short(file: str) -> str:
    relative = os.path.relpath(file)
    return relative if len(relative) < len(file) else file


def _first(report: Report) -> Finding | None:
    """What to fix first: the worst, and of those the most frequent."""
    open_findings = report.at_least(Severity.WARNING)
    return min(open_findings, key=lambda f: (-f.severity, -f.count, f.where.file, f.where.line), default=None)


def _print_finding(console: Console, finding: Finding) -> None:
    count = f" ×{finding.count} per call" if finding.count > 1 else ""
    variant = f" [{finding.variant}]" if finding.variant else ""
    style = _STYLES[finding.severity]
    head = f"{finding.rule.code} {finding.severity.label} ({finding.certainty.value}){count}{variant}"
    console.print(
        f"  [bold]{finding.where.line:>5}[/bold]  [{style}]{escape(head)}[/{style}]  {escape(finding.message)}",
        soft_wrap=True,
    )
    if finding.where.source:
        console.print(f"         [dim]│[/dim] {escape(finding.where.source)}", soft_wrap=True)
    op = f" ({finding.op})" if finding.op not in ("source", "comment") else ""
    console.print(f"         [green]→ {escape(finding.remedy)}[/green][dim]{escape(op)}[/dim]", soft_wrap=True)
    for frame in finding.stack[1 : 1 + _MAX_STACK]:
        console.print(
            f"         [dim]from {escape(_short(frame.file))}:{frame.line} in {escape(frame.function)}[/dim]",
            soft_wrap=True,
        )
    if finding.suppressed is not None:
        console.print(f"         [dim]suppressed: {escape(finding.suppressed)}[/dim]", soft_wrap=True)


def print_report(report: Report, console: Console, *, show: Severity = Severity.WARNING, verbose: bool = False) -> None:
    """Print a report; findings below ``show``, and suppressed ones, only when ``verbose``."""
    first = _first(report)
    if first is not None:
        console.print(
            f"[bold]fix first[/bold]  {escape(_short(first.where.file))}:{first.where.line}  {first.rule.code} "
            f"{escape(first.rule.title)}\n           [green]→ {escape(first.remedy)}[/green]\n",
            soft_wrap=True,
        )
    shown = [f for f in report.findings if verbose or (f.severity >= show and f.suppressed is None)]
    for file, group in itertools.groupby(
        sorted(shown, key=lambda f: (f.where.file, f.where.line)), key=lambda f: f.where.file
    ):
        console.print(f"[bold underline]{escape(_short(file))}[/bold underline]", soft_wrap=True)
        for finding in group:
            _print_finding(console, finding)
        console.print()
    if report.printed:
        num_lines = report.printed.count("\n") or 1
        last = (report.printed.strip().splitlines() or [""])[-1][:120]
        console.print(
            f"[dim]the checked code printed {num_lines} lines; the last: {escape(last)}[/dim]",
            soft_wrap=True,
        )
    for item in report.passes:
        seconds = f", {item.seconds:.1f} s" if item.seconds else ""
        console.print(f"[dim]ran {escape(item.name)}: {escape(item.detail)}{seconds}[/dim]", soft_wrap=True)
    if report.assumptions:
        console.print(f"[dim]assumed: {escape(', '.join(report.assumptions))}[/dim]", soft_wrap=True)
    for name, count in sorted(report.opaque_ops.items()):
        console.print(f"[dim]opaque: {escape(name)} ×{count}[/dim]", soft_wrap=True)
    if report.not_reached:
        places = ", ".join(f"{os.path.basename(f.file)}:{f.line}" for f in report.not_reached[: 1000 if verbose else 6])
        more = (
            f" and {len(report.not_reached) - 6} more (--verbose)"
            if len(report.not_reached) > 6 and not verbose
            else ""
        )
        console.print(f"[dim]branches not reached: {escape(places)}{more}[/dim]", soft_wrap=True)
    for note in report.notes:
        console.print(f"[dim]note: {escape(note)}[/dim]", soft_wrap=True)
    for problem in filter(None, (report.partial, report.internal)):
        console.print(f"[bold red]incomplete:[/bold red] {escape(problem)}", soft_wrap=True)
    if report.num_regions == 0 and not report.partial and not report.internal:
        console.print("[bold red]nothing was checked:[/bold red] no region was reached", soft_wrap=True)
    else:
        console.print(f"[bold]{escape(report.summary())}[/bold]", soft_wrap=True)


def to_text(report: Report, *, verbose: bool = False, stream: IO[str] | None = None) -> str:
    """The report as plain text, without colour."""
    buffer = stream or StringIO()
    print_report(
        report, Console(file=buffer, no_color=True, highlight=False, width=120, force_terminal=False), verbose=verbose
    )
    return buffer.getvalue() if isinstance(buffer, StringIO) else ""
