"""Every case of the acceptance suite in the modes that need no GPU.

python -m tests.unit.check.modes        prints the table, in Markdown
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ostinato.check import Report, Settings, Severity, Subject
from ostinato.check.session import check_subject
from ostinato.check.static import scan_file
from tests.unit.check.cases import CASES, Case


def told(report: Report, case: Case) -> str:
    """``exact`` if the reported lines are the BAD lines and no others; else what was missed or too much."""
    lines = {f.where.line for f in report.findings if f.severity >= Severity.HAZARD}
    return _compared(lines, case)


def _compared(lines: set[int], case: Case) -> str:
    missed, extra = len(case.bad_lines - lines), len(lines - case.bad_lines)
    if not missed and not extra:
        return "exact"
    return ", ".join(filter(None, (f"{missed} missed" if missed else "", f"{extra} too many" if extra else "")))


def scanned_lines() -> dict[Path, set[int]]:
    """What the static pass reports in each file of cases."""
    return {path: {f.where.line for f in scan_file(path)} for path in {case.path for case in CASES}}


def table() -> str:
    """One row per case: pretend, pretend --meta, static."""
    scanned = scanned_lines()
    rows = []
    counts: Counter[str] = Counter()
    for case in CASES:
        inner = next(k for k in case.make.__code__.co_consts if getattr(k, "co_name", "") == "fn")
        lines = {line for _, _, line in inner.co_lines() if line is not None} & scanned[case.path]
        cells = {
            "pretend": told(check_subject(lambda c=case: Subject.of(*c.make("cuda"))), case),
            "meta": told(check_subject(lambda c=case: Subject.of(*c.make("cuda")), Settings(meta=True)), case),
            "static": _compared(lines, case),
        }
        counts.update(name for name, cell in cells.items() if cell == "exact")
        rows.append(f"| {case.name} | {case.verdict} | {cells['pretend']} | {cells['meta']} | {cells['static']} |")
    head = ", ".join(f"{name} {counts[name]} of {len(CASES)}" for name in ("pretend", "meta", "static"))
    return (
        f"Exact, line by line: {head}.\n\n| case | expected | pretend | --meta | static |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
    )


if __name__ == "__main__":
    print(table())
