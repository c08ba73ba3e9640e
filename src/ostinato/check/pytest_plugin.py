"""The pytest plugin: the fixture ``graph_check``, the marker ``graph_safe``, the option ``--graph-report``.

    def test_step(graph_check):
        graph_check(step, calls=[(x0,), (x1,), (x2,)])

    @pytest.mark.graph_safe(fail_on="error")
    def test_factory():
        return step, [(x0,), (x1,), (x2,)]

Without a GPU the passes are pretend, trace and tape; with CUDA tensors, the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ostinato.check import Report, Severity, check, to_html, to_json, to_sarif, to_text
from ostinato.check.result import merged
from ostinato.errors import OstinatoError, UsageError

_REPORTS = pytest.StashKey[list[Report]]()
_FORMATS = ("sarif", "json", "html")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--graph-report=FORMAT:FILE``."""
    group = parser.getgroup("ostinato", "CUDA graph checks")
    group.addoption(
        "--graph-report",
        metavar="FORMAT:FILE",
        help=f"write the graph checks' findings; FORMAT is {', '.join(_FORMATS)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and refuse a report option that cannot be meant."""
    config.addinivalue_line(
        "markers", "graph_safe(fail_on='hazard'): the test returns (callable, calls), which must be clean"
    )
    config.stash[_REPORTS] = []
    wanted = config.getoption("--graph-report")
    if wanted is not None and (":" not in wanted or wanted.split(":", 1)[0] not in _FORMATS):
        raise pytest.UsageError(
            f"--graph-report={wanted}: write it as FORMAT:FILE, with FORMAT one of {', '.join(_FORMATS)}"
        )


def _judge(report: Report, fail_on: str, config: pytest.Config) -> Report:

    config.stash[_REPORTS].append(report)
    try:
        level = Severity[fail_on.upper()]
    except KeyError as error:
        raise UsageError(f"fail_on={fail_on!r}: use error, hazard, warning or info") from error
    if report.partial or report.internal or report.at_least(level):
        pytest.fail(to_text(report), pytrace=False)
    return report


@pytest.fixture
def graph_check(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``graph_check(fn, calls=[…], fail_on="hazard")`` fails the test if a capture of ``fn`` would fail or replay
    wrongly, and returns the report otherwise."""

    def run(
        fn: Callable[..., Any], args: Sequence[Any] = (), *, calls: Sequence[Any] | None = None, fail_on: str = "hazard"
    ) -> Any:
        return _judge(check(fn, args, calls=calls), fail_on, request.config)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test with the marker returns what is to be checked."""
    marker = pyfuncitem.get_closest_marker("graph_safe")
    if marker is None:
        return (yield)

    function = pyfuncitem.obj
    names = pyfuncitem._fixtureinfo.argnames
    made = function(**{name: pyfuncitem.funcargs[name] for name in names})
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        pytest.fail("a test marked graph_safe returns (callable, [argument sets])", pytrace=False)
    try:
        report = check(made[0], calls=made[1])
    except OstinatoError as error:
        pytest.fail(str(error), pytrace=False)
    _judge(report, marker.kwargs.get("fail_on", "hazard"), pyfuncitem.config)
    pyfuncitem.obj = lambda **kwargs: None
    try:
        return (yield)
    finally:
        pyfuncitem.obj = function


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report that ``--graph-report`` asked for."""
    wanted = session.config.getoption("--graph-report")
    reports = session.config.stash[_REPORTS]
    if wanted is None or not reports:
        return

    kind, file = wanted.split(":", 1)
    report = merged([(r.target, r) for r in reports], "pytest")
    text = {"sarif": to_sarif, "json": to_json, "html": to_html}[kind](report)
    Path(file).write_text(text, encoding="utf-8")
