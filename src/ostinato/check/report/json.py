"""The JSON report. ``schema`` changes when a field changes its meaning or goes; new fields may come without that."""

from __future__ import annotations

import json
from typing import Any

from ostinato.check.finding import Certainty, Finding, Frame, Severity
from ostinato.check.result import PassRun, Report
from ostinato.check.rules import rule
from ostinato.errors import CheckError

SCHEMA = 1


def _frame(frame: Frame) -> dict[str, Any]:
    return {"file": frame.file, "line": frame.line, "function": frame.function, "source": frame.source}


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.rule.code,
        "rule": finding.rule.name,
        "title": finding.rule.title,
        "severity": finding.severity.label,
        "certainty": finding.certainty.value,
        "message": finding.message,
        "op": finding.op,
        **_frame(finding.where),
        "stack": [_frame(f) for f in finding.stack],
        "count": finding.count,
        "pass": finding.found_by,
        "variant": finding.variant,
        "remedy": finding.remedy,
        "assumed": list(finding.assumed),
        "suppressed": finding.suppressed,
        "fingerprint": finding.fingerprint,
    }


def to_json(report: Report) -> str:
    """The report as JSON, indented."""
    data = {
        "schema": SCHEMA,
        "tool": "ostinato",
        "target": report.target,
        "summary": report.summary(),
        "torch": report.torch_version,
        "findings": [_finding(f) for f in report.findings],
        "passes": [{"name": p.name, "seconds": round(p.seconds, 3), "detail": p.detail} for p in report.passes],
        "calls": report.num_regions,
        "operations": report.num_ops,
        "partial": report.partial,
        "internal": report.internal,
        "notes": list(report.notes),
        "assumptions": list(report.assumptions),
        "opaque_ops": dict(report.opaque_ops),
        "branches_not_reached": [_frame(f) for f in report.not_reached],
        "printed": report.printed,
        "static_only": report.is_static_only,
    }
    return json.dumps(data, indent=1) + "\n"


def _read_frame(data: dict[str, Any]) -> Frame:
    return Frame(data["file"], data["line"], data["function"])


def from_json(text: str) -> Report:
    """Read a report that ``to_json`` wrote. Raises CheckError for another schema."""
    data = json.loads(text)
    if data.get("schema") != SCHEMA:
        raise CheckError(f"a report with schema {data.get('schema')}: this version reads {SCHEMA}")
    findings = tuple(
        Finding(
            rule=rule(f["code"]),
            severity=Severity[f["severity"].upper()],
            certainty=Certainty(f["certainty"]),
            message=f["message"],
            op=f["op"],
            where=_read_frame(f),
            found_by=f["pass"],
            stack=tuple(map(_read_frame, f["stack"])),
            count=f["count"],
            assumed=tuple(f["assumed"]),
            suppressed=f["suppressed"],
            variant=f["variant"],
        )
        for f in data["findings"]
    )
    return Report(
        target=data["target"],
        findings=findings,
        passes=tuple(PassRun(p["name"], p["seconds"], p["detail"]) for p in data["passes"]),
        num_regions=data["calls"],
        num_ops=data["operations"],
        partial=data["partial"],
        internal=data["internal"],
        notes=tuple(data["notes"]),
        assumptions=tuple(data["assumptions"]),
        opaque_ops=data["opaque_ops"],
        not_reached=tuple(map(_read_frame, data["branches_not_reached"])),
        torch_version=data["torch"],
        printed=data["printed"],
        is_static_only=data["static_only"],
    )
