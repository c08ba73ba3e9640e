"""Every case of the acceptance suite, pretended on the CPU and for real on a GPU.

python -m tests.gpu.check.agreement [FILE]      prints the table, in Markdown
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ostinato.check import Report, Settings, Severity, Subject
from ostinato.check.gpu import check_on_gpu
from ostinato.check.session import check_subject
from tests.unit.check.cases import CASES, Case


@dataclass(frozen=True)
class Row:
    """What both said of one case."""

    case: Case
    pretend: str
    gpu: str
    gpu_lines_agree: bool
    detail: str

    @property
    def agrees(self) -> bool:
        """Whether both call it the same: clean, or something to fix."""
        return (self.pretend == "ok") == (self.gpu == "ok")


def verdict(report: Report) -> str:
    """The worst severity, as the cases write it."""
    worst = max((f.severity for f in report.findings), default=Severity.INFO)
    return {Severity.ERROR: "error", Severity.HAZARD: "hazard"}.get(worst, "ok")


def compare(case: Case) -> Row:
    """Both passes over one case."""
    pretended = check_subject(lambda: Subject.of(*case.make("cuda")), Settings())
    real = check_on_gpu(lambda: Subject.of(*case.make("cuda")), target=case.name)
    lines = {f.where.line for f in real.findings if f.severity >= Severity.HAZARD}
    detail = "; ".join(f"{f.rule.name}: {f.message[:60]}" for f in real.findings if f.severity >= Severity.HAZARD)
    return Row(case, verdict(pretended), verdict(real), lines == case.bad_lines, detail)


def rows() -> list[Row]:
    """All cases that this machine can run."""
    usable = [c for c in CASES if c.name != "other_device" or torch.cuda.device_count() > 1]
    return [compare(case) for case in usable]


def table(found: list[Row]) -> str:
    """The rows in Markdown, with a count of agreements on top."""
    agreeing = sum(row.agrees for row in found)
    same = sum(row.gpu_lines_agree for row in found)
    head = (
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}: verdicts agree in {agreeing} of {len(found)} "
        f"cases, lines are the same in {same}.\n\n"
        "| case | expected | pretend | gpu | same lines | gpu says |\n|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {r.case.name} | {r.case.verdict} | {r.pretend} | {r.gpu} | {'yes' if r.gpu_lines_agree else 'no'} | "
        f"{r.detail.replace('|', '/').replace(chr(10), ' ')} |\n"
        for r in found
    )


if __name__ == "__main__":
    text = table(rows())
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    print(text)
