"""SARIF 2.1.0: stable rule ids, relative addresses, the stack as a code flow, fingerprints, suppressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ostinato import __version__
from ostinato.check.finding import Finding, Frame, Severity
from ostinato.check.result import Report
from ostinato.check.rules import Rule, all_rules, explain

_LEVELS = {Severity.ERROR: "error", Severity.HAZARD: "warning", Severity.WARNING: "warning", Severity.INFO: "note"}
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def _address(file: str, root: Path) -> dict[str, Any]:
    path = Path(file)
    if path.is_absolute() and path.is_relative_to(root):
        return {"uri": path.relative_to(root).as_posix(), "uriBaseId": "%SRCROOT%"}
    return {"uri": path.as_uri() if path.is_absolute() else path.as_posix()}


def _location(frame: Frame, root: Path) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": _address(frame.file, root)}}
    if frame.line > 0:
        region: dict[str, Any] = {"startLine": frame.line}
        if frame.source:
            region["snippet"] = {"text": frame.source}
        location["physicalLocation"]["region"] = region
    if frame.function:
        location["logicalLocations"] = [{"name": frame.function, "kind": "function"}]
    return location


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": "".join(part.capitalize() for part in rule.name.split("_")),
        "shortDescription": {"text": rule.title},
        "help": {"text": rule.remedy, "markdown": explain(rule.code)},
        "properties": {"ruleName": rule.name},
    }


def _result(finding: Finding, root: Path, indices: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": finding.rule.code,
        "ruleIndex": indices[finding.rule.code],
        "level": _LEVELS[finding.severity],
        "message": {"text": f"{finding.message}. Remedy: {finding.remedy}."},
        "locations": [_location(finding.where, root)],
        "partialFingerprints": {"ostinato/v1": finding.fingerprint},
        "occurrenceCount": max(1, finding.count),
        "properties": {
            "severity": finding.severity.label,
            "certainty": finding.certainty.value,
            "op": finding.op,
            "pass": finding.found_by,
            "assumed": list(finding.assumed),
        },
    }
    if len(finding.stack) > 1:
        steps = [{"location": _location(f, root)} for f in reversed(finding.stack)]
        result["codeFlows"] = [{"threadFlows": [{"locations": steps}]}]
    if finding.suppressed is not None:
        kind = "external" if finding.suppressed == "in the baseline" else "inSource"
        result["suppressions"] = [{"kind": kind, "justification": finding.suppressed}]
    return result


def to_sarif(report: Report, root: Path | None = None) -> str:
    """The report as SARIF. ``root`` is what addresses are relative to; default the current directory."""
    root = (root or Path.cwd()).resolve()
    rules = all_rules()
    indices = {rule.code: i for i, rule in enumerate(rules)}
    notifications = [
        {"level": "error", "message": {"text": text}} for text in (report.partial, report.internal) if text
    ] + [{"level": "note", "message": {"text": text}} for text in report.notes]
    run = {
        "tool": {"driver": {"name": "ostinato", "version": __version__, "rules": [_rule(r) for r in rules]}},
        "originalUriBaseIds": {"%SRCROOT%": {"uri": root.as_uri() + "/"}},
        "columnKind": "unicodeCodePoints",
        "invocations": [
            {
                "executionSuccessful": not (report.partial or report.internal),
                "toolExecutionNotifications": notifications,
            }
        ],
        "results": [_result(f, root, indices) for f in report.findings],
        "properties": {"summary": report.summary(), "target": report.target},
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"
