"""The report in five forms."""

from ostinato.check.report.github import to_github
from ostinato.check.report.html import to_html
from ostinato.check.report.json import from_json, to_json
from ostinato.check.report.sarif import to_sarif
from ostinato.check.report.terminal import print_report, to_text

__all__ = ["from_json", "print_report", "to_github", "to_html", "to_json", "to_sarif", "to_text"]
