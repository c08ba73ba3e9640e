"""One HTML file with everything in it: no scripts from elsewhere, no fonts, no network."""

from __future__ import annotations

import itertools
from html import escape
from pathlib import Path

from ostinato.check.finding import Finding, Frame
from ostinato.check.result import Report
from ostinato.check.rules import explain

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.4rem}
h2{font-size:1.05rem;font-family:ui-monospace,monospace;border-bottom:1px solid #d0d7de;margin-top:2rem}
.f{border-left:4px solid #999;margin:1rem 0;padding:.3rem .9rem;background:#f6f8fa;border-radius:3px}
.error{border-color:#cf222e}.hazard{border-color:#bf8700}.warning{border-color:#0969da}.info{border-color:#8c959f}
pre{background:#fff;border:1px solid #d0d7de;padding:.5rem;overflow-x:auto;font-size:13px;margin:.4rem 0}
.hit{background:#fff3b0;display:block}.fix{color:#116329}.dim{color:#57606a;font-size:13px}
.suppressed{opacity:.55}details summary{cursor:pointer;color:#57606a;font-size:13px}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}.f{background:#161b22}pre{background:#0d1117;
border-color:#30363d}.hit{background:#5a4a00}.fix{color:#56d364}h2{border-color:#30363d}}
"""


def _excerpt(frame: Frame) -> str:
    try:
        lines = Path(frame.file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    rows = []
    for number in range(max(1, frame.line - 2), min(len(lines), frame.line + 2) + 1):
        text = escape(f"{number:>5}  {lines[number - 1]}")
        rows.append(f'<span class="hit">{text}</span>' if number == frame.line else text + "\n")
    return f"<pre>{''.join(rows)}</pre>"


def _finding(finding: Finding) -> str:
    stack = "".join(f"<br>from {escape(f.file)}:{f.line} in {escape(f.function)}" for f in finding.stack[1:])
    count = f" ×{finding.count} per call" if finding.count > 1 else ""
    variant = f" [{escape(finding.variant)}]" if finding.variant else ""
    hidden = (
        f'<div class="dim">suppressed: {escape(finding.suppressed)}</div>' if finding.suppressed is not None else ""
    )
    return (
        f'<div class="f {finding.severity.label}{" suppressed" if hidden else ""}">'
        f"<b>{finding.rule.code} {escape(finding.rule.title)}</b> "
        f'<span class="dim">{finding.severity.label}, {finding.certainty.value}{count}{variant}</span>'
        f"<br>{escape(finding.message)}"
        f'{_excerpt(finding.where)}<div class="fix">→ {escape(finding.remedy)}</div>{hidden}'
        f'<div class="dim">{escape(finding.op)}, found by {escape(finding.found_by)}; '
        f"{escape(', '.join(finding.assumed))}{stack}</div>"
        f"<details><summary>explain</summary><pre>{escape(explain(finding.rule.code))}</pre></details></div>"
    )


def to_html(report: Report) -> str:
    """The report as one self-contained page."""
    ordered = sorted(report.findings, key=lambda f: (f.where.file, f.where.line))
    body = [f"<h1>{escape(report.target)}</h1><p><b>{escape(report.summary())}</b></p>"]
    for problem in filter(None, (report.partial, report.internal)):
        body.append(f'<p class="f error">incomplete: {escape(problem)}</p>')
    for file, group in itertools.groupby(ordered, key=lambda f: f.where.file):
        body.append(f"<h2>{escape(file)}</h2>")
        body.extend(_finding(f) for f in group)
    facts = [f"ran {p.name}: {p.detail}, {p.seconds:.1f} s" for p in report.passes]
    facts += [f"assumed: {', '.join(report.assumptions)}"] if report.assumptions else []
    facts += [f"opaque: {name} ×{count}" for name, count in report.opaque_ops.items()]
    facts += [f"branch not reached: {f.file}:{f.line}" for f in report.not_reached]
    facts += [f"note: {note}" for note in report.notes]
    body.append(
        '<h2>what was run, and what is not known</h2><p class="dim">' + "<br>".join(map(escape, facts)) + "</p>"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(report.target)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
