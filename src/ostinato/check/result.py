"""The report: what was found, what was run, and what stays unknown. It never says that something is safe."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ostinato.check.finding import Finding, Frame, Severity
from ostinato.errors import CheckError


class ExitCode(enum.IntEnum):
    """Exit codes of ``ostinato check`` and ``ostinato scan``."""

    CLEAN = 0
    FINDINGS = 1
    USAGE = 2
    PARTIAL = 3
    INTERNAL = 4
    NOTHING_CHECKED = 5


@dataclass(frozen=True, slots=True)
class PassRun:
    """One pass that ran. ``seconds`` is wall time; ``detail`` says over what."""

    name: str
    seconds: float
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a check gives back.

    ``num_regions`` counts the calls of the region that finished; ``partial`` says why not everything could be run;
    ``opaque_ops`` maps custom operations to how often they ran.
    """

    target: str
    findings: tuple[Finding, ...]
    passes: tuple[PassRun, ...] = ()
    num_regions: int = 0
    num_ops: int = 0
    partial: str = ""
    internal: str = ""
    notes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    opaque_ops: Mapping[str, int] = field(default_factory=dict)
    not_reached: tuple[Frame, ...] = ()
    torch_version: str = ""
    printed: str = ""
    is_static_only: bool = False

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of this severity or worse that are not suppressed."""
        return tuple(f for f in self.findings if f.severity >= severity and f.suppressed is None)

    def exit_code(self, fail_on: Severity = Severity.HAZARD) -> ExitCode:
        """0 clean at this level, 1 findings, 3 partial, 4 internal, 5 nothing checked."""
        if self.internal:
            return ExitCode.INTERNAL
        if self.partial:
            return ExitCode.PARTIAL
        if self.num_regions == 0:
            return ExitCode.NOTHING_CHECKED
        return ExitCode.FINDINGS if self.at_least(fail_on) else ExitCode.CLEAN

    def summary(self) -> str:
        """One line: what was found, over what, and what stays unknown."""
        counts = Counter(f.severity for f in self.findings if f.suppressed is None)
        named = [
            f"{counts[s]} {s.label}{'s' if counts[s] != 1 and s is not Severity.INFO else ''}"
            for s in reversed(Severity)
            if counts[s]
        ]
        found = ", ".join(named) or "no violation"
        if self.is_static_only:
            return f"{found} in {self.num_regions} files that were read; nothing was run"
        unknown = [f"{len(self.opaque_ops)} opaque operations"] if self.opaque_ops else []
        if self.not_reached:
            unknown.append(f"{len(self.not_reached)} branches not reached")
        suffix = f"; {', '.join(unknown)}" if unknown else ""
        return f"{found} in {self.num_regions} calls ({self.num_ops} operations){suffix}"


def sorted_findings(findings: list[Finding]) -> tuple[Finding, ...]:
    """The worst first; within a severity by file and line, so that a file's findings stay together."""
    return tuple(sorted(findings, key=lambda f: (-f.severity, f.where.file, f.where.line, f.rule.code)))


def merged(reports: list[tuple[str, Report]], target: str) -> Report:
    """Several variants as one report: the same finding in several of them names them."""
    if not reports:
        raise CheckError(f"{target}: no variant could be run")
    found: dict[tuple[str, str, int, str], Finding] = {}
    for variant, report in reports:
        for finding in report.findings:
            key = (finding.rule.code, finding.where.file, finding.where.line, finding.op)
            before = found.get(key)
            names = f"{before.variant}, {variant}" if before is not None else variant
            base = finding if before is None or finding.severity > before.severity else before
            found[key] = replace(base, variant=names)
    ran = {(f.rule.code, f.where.file, f.where.line) for f in found.values() if f.found_by != "static"}
    kept = [f for f in found.values() if f.found_by != "static" or (f.rule.code, f.where.file, f.where.line) not in ran]
    return replace(
        reports[0][1],
        target=target,
        findings=sorted_findings(kept),
        passes=tuple(replace(p, name=f"{p.name} ({v})") for v, r in reports for p in r.passes),
        num_regions=sum(r.num_regions for _, r in reports),
        num_ops=sum(r.num_ops for _, r in reports),
        partial="; ".join(f"{v}: {r.partial}" for v, r in reports if r.partial),
        notes=tuple(f"{v}: {n}" for v, r in reports for n in r.notes),
        not_reached=tuple(dict.fromkeys(f for _, r in reports for f in r.not_reached)),
    )


def with_gpu(report: Report, real: Report) -> Report:
    """A report of the CPU passes together with one of the GPU; what both found is listed once."""
    seen = {(f.rule.code, f.where.file, f.where.line) for f in report.findings}
    new = [f for f in real.findings if (f.rule.code, f.where.file, f.where.line) not in seen]
    return Report(
        target=report.target,
        findings=sorted_findings([*report.findings, *new]),
        passes=(*report.passes, *real.passes),
        num_regions=report.num_regions,
        num_ops=report.num_ops,
        partial="; ".join(filter(None, (report.partial, real.partial))),
        internal=report.internal,
        notes=(*report.notes, *real.notes),
        assumptions=report.assumptions,
        opaque_ops=report.opaque_ops,
        not_reached=report.not_reached,
        torch_version=report.torch_version,
        printed=report.printed,
    )
