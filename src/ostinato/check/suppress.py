"""Suppressions in the source, and baselines.

``# graph: ok[CG104] reason`` on a line suppresses that rule (or several, with commas; code or name) on that line. The
rule is required; a suppression that suppresses nothing is itself reported. A baseline is a JSON file of fingerprints:
what it lists was there before.
"""

from __future__ import annotations

import io
import json
import re
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ostinato.check.finding import Certainty, Finding, Frame, Severity
from ostinato.check.rules import RULES, rule
from ostinato.errors import UsageError

_COMMENT = re.compile(r"#\s*graph:\s*ok\[([^\]]*)\]\s*(.*)")
_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Suppression:
    """One comment. ``rules`` are codes."""

    line: int
    rules: frozenset[str]
    reason: str


@cache
def suppressions(file: str) -> tuple[Suppression, ...]:
    """The suppressions of a file; none if it cannot be read. Raises UsageError for a rule that does not exist."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ()
    if "graph:" not in text:
        return ()
    found: list[Suppression] = []
    try:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    except (tokenize.TokenError, SyntaxError, IndentationError):
        return ()
    for token in tokens:
        match = _COMMENT.search(token.string)
        if match is None:
            continue
        keys = [k for k in match[1].split(",") if k.strip()]
        if not keys:
            raise UsageError(
                f"{file}:{token.start[0]}: name the rule that is suppressed, as in '# graph: ok[CG104] reason'"
            )
        found.append(Suppression(token.start[0], frozenset(rule(k).code for k in keys), match[2].strip()))
    return tuple(found)


def apply_suppressions(findings: Iterable[Finding], considered: Mapping[str, set[int] | None]) -> list[Finding]:
    """Mark suppressed findings, and report suppressions that were not needed.

    Args:
        findings: what was found.
        considered: for each file the lines that were looked at; None for all of them. Unused suppressions are reported
            on these only.
    """
    result: list[Finding] = []
    used: set[tuple[str, int]] = set()
    for finding in findings:
        match = next(
            (
                s
                for s in suppressions(finding.where.file)
                if s.line == finding.where.line and finding.rule.code in s.rules
            ),
            None,
        )
        if match is not None:
            used.add((finding.where.file, match.line))
            result.append(replace(finding, suppressed=match.reason or "no reason given"))
        else:
            result.append(finding)
    for file, lines in considered.items():
        for item in suppressions(file):
            if (file, item.line) in used or (lines is not None and item.line not in lines):
                continue
            where = Frame(file, item.line, "")
            text = f"nothing to suppress here for {', '.join(sorted(item.rules))}"
            result.append(
                Finding(
                    RULES["UNUSED_SUPPRESSION"],
                    Severity.INFO,
                    Certainty.PROVED,
                    text,
                    "comment",
                    where,
                    "suppressions",
                    (where,),
                )
            )
    return result


def read_baseline(path: Path) -> frozenset[str]:
    """The fingerprints of a baseline. Raises UsageError if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = data["schema"] == _SCHEMA
        fingerprints = frozenset(map(str, data["fingerprints"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no baseline: {error}; write one with --write-baseline") from error
    if not known:
        raise UsageError(f"{path} has schema {data['schema']}, and this version reads {_SCHEMA}: write it again")
    return fingerprints


def write_baseline(path: Path, findings: Iterable[Finding]) -> int:
    """Write the fingerprints of what was found and not suppressed; returns how many."""
    prints = sorted({f.fingerprint for f in findings if f.suppressed is None and f.severity >= Severity.WARNING})
    path.write_text(json.dumps({"schema": _SCHEMA, "fingerprints": prints}, indent=1) + "\n", encoding="utf-8")
    return len(prints)


def apply_baseline(findings: Iterable[Finding], fingerprints: frozenset[str]) -> tuple[Finding, ...]:
    """Mark what the baseline lists as suppressed."""
    return tuple(
        replace(f, suppressed="in the baseline") if f.suppressed is None and f.fingerprint in fingerprints else f
        for f in findings
    )
