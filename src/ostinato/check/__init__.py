"""Everything that would break or falsify a CUDA graph capture, found without a GPU. Knows no language model.

    report = check(fn, calls=[(x0,), (x1,), (x2,)])
    print(to_text(report))

``ostinato check`` and ``ostinato scan`` are the same from the command line; ``docs/capture-rules.md`` explains the
rules.
"""

from ostinato.check.api import check, check_factory
from ostinato.check.finding import Certainty, Finding, Frame, Severity
from ostinato.check.op_table import declare_op
from ostinato.check.report import to_github, to_html, to_json, to_sarif, to_text
from ostinato.check.result import ExitCode, Report
from ostinato.check.rules import Rule, all_rules, explain, rule
from ostinato.check.script import region
from ostinato.check.session import Settings
from ostinato.check.static import scan_paths
from ostinato.check.subject import Call, Subject

__all__ = [
    "Call",
    "Certainty",
    "ExitCode",
    "Finding",
    "Frame",
    "Report",
    "Rule",
    "Settings",
    "Severity",
    "Subject",
    "all_rules",
    "check",
    "check_factory",
    "declare_op",
    "explain",
    "region",
    "rule",
    "scan_paths",
    "to_github",
    "to_html",
    "to_json",
    "to_sarif",
    "to_text",
]
