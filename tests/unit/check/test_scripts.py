"""Unmodified scripts: captures in functions and classes, marked regions, what a replay gives."""

from __future__ import annotations

import pytest

from ostinato.check import Settings, Severity
from ostinato.check.script import check_script, region
from ostinato.check.session import Progress

CLASS = """
import torch

class Runner:
    def __init__(self):
        self.model = torch.nn.Linear(4, 4).cuda().requires_grad_(False)
        self.x = torch.zeros(2, 4, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        self.scale = 1.0
        self.capture()

    def capture(self):
        with torch.cuda.graph(self.graph):
            self.y = self.model(self.x) {factor}

    def run(self, x):
        self.x.copy_(x)
        self.scale += 1.0
        self.graph.replay()
        return self.y

runner = Runner()
y = runner.y
for _ in range(3):
    assert runner.run(torch.ones(2, 4)) is y
    assert torch.isfinite(y).all()
"""

MARKED = """
import torch
from ostinato.check import region

x = torch.ones(3, device="cuda")
for step in range(4):
    with region():
        y = x * {factor}
print(y.sum().item())
"""


def run(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return check_script(path, [], Settings(), Progress())


def names(report):
    return {f.rule.name for f in report.findings if f.severity >= Severity.HAZARD}


def test_capture_in_a_method_is_compared_after_the_method_returned(tmp_path):
    report = run(tmp_path, CLASS.format(factor=""))
    assert not report.partial
    assert names(report) == set()


def test_attribute_that_changes_between_replays_is_found(tmp_path):
    report = run(tmp_path, CLASS.format(factor="* self.scale"))
    assert not report.partial
    assert names(report) == {"BAKED_SCALAR"}


def test_marked_regions_are_compared(tmp_path):
    assert names(run(tmp_path, MARKED.format(factor="2"))) == set()
    assert names(run(tmp_path, MARKED.format(factor="(step + 1)"))) == {"BAKED_SCALAR"}


def test_region_does_nothing_outside_of_a_check():
    with region():
        assert True


@pytest.mark.parametrize(
    ("text", "partial"),
    [
        ("import torch\nraise KeyError('gone')\n", "the script ended with KeyError"),
        ("import sys\nsys.exit(4)\n", "SystemExit: 4"),
    ],
)
def test_scripts_that_end_early(tmp_path, text, partial):
    report = run(tmp_path, text)
    assert partial in report.partial
    assert report.exit_code() == 3


def test_error_inside_a_capture_is_a_finding(tmp_path):
    text = (
        "import torch\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        "    torch.zeros(2, device='cuda')\n"
        "    raise ValueError('in the middle')\n"
    )
    report = run(tmp_path, text)
    assert names(report) == {"RAISED"}
    assert [f.where.line for f in report.findings] == [5]
