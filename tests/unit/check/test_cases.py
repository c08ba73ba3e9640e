"""The acceptance suite, on every mode that needs no GPU."""

from __future__ import annotations

import pytest

from ostinato.check import Settings, Severity, Subject
from ostinato.check.session import check_subject
from tests.unit.check.cases import CASES, Case
from tests.unit.check.modes import scanned_lines

_STATIC = scanned_lines()


def _judge(case: Case, report) -> None:
    bad = [f for f in report.findings if f.severity >= Severity.HAZARD]
    lines = {f.where.line for f in bad}
    told = "\n".join(f"{f.where.line} {f.rule.name} {f.severity.label} {f.message}" for f in bad)
    assert lines == case.bad_lines, told
    assert not report.partial or "made-up values" in report.partial
    if case.verdict == "error":
        assert {f.where.line for f in bad if f.severity is Severity.ERROR} == case.bad_lines, told
    if case.verdict != "ok":
        assert case.rules & {f.rule.name for f in bad}, told


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_pretend_is_exact(case):
    _judge(case, check_subject(lambda: Subject.of(*case.make("cuda")), Settings()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_meta_is_exact(case):
    _judge(case, check_subject(lambda: Subject.of(*case.make("cuda")), Settings(meta=True, coverage=False)))


def test_static_finds_what_the_source_tells_and_raises_no_false_alarm():
    """What cannot be seen in the source: formatting outside of f-strings, tensors behind Python's max and indexing of
    lists, state, positions, flags, optimizers. The figures are a floor, and a ceiling for false alarms."""
    errors = [c for c in CASES if c.verdict == "error"]
    found = [c for c in errors if c.bad_lines <= _STATIC[c.path]]
    assert len(found) >= 25
    wrong = []
    for case in (c for c in CASES if c.verdict == "ok"):
        code = case.make.__code__
        inner = next(k for k in code.co_consts if hasattr(k, "co_name") and k.co_name == "fn")
        lines = {line for _, _, line in inner.co_lines() if line is not None}
        if lines & _STATIC[case.path]:
            wrong.append(case.name)
    assert set(wrong) <= {"lazy_upload", "empty_literal"}  # an upload that only the warm-up makes; one of no bytes


def test_every_verdict_and_most_rules_are_in_the_suite():
    assert {c.verdict for c in CASES} == {"ok", "error", "hazard"}
    assert len(set().union(*(c.rules for c in CASES))) >= 18
