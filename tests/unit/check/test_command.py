"""``ostinato check`` in its own process: every way in which checked code can misbehave, and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ostinato.check.isolate import Request, run_isolated
from ostinato.cli.main import execute

CODE = """
import os, signal, sys
import torch

def _calls():
    return [(torch.ones(4, device="cuda"),)]

def clean():
    return (lambda x: x * 2), _calls()

def raises():
    def fn(x):
        raise ValueError("no good")
    return fn, _calls()

def factory_raises():
    raise RuntimeError("broken factory")

def hangs():
    def fn(x):
        x.sum().item()
        while True:
            pass
    return fn, _calls()

def prints():
    def fn(x):
        print("noise")
        return x
    return fn, _calls()

def forks():
    def fn(x):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        return x * 2
    return fn, _calls()

def dies():
    return (lambda x: os._exit(9)), _calls()

def crashes():
    return (lambda x: os.kill(os.getpid(), signal.SIGSEGV)), _calls()

def exits():
    return (lambda x: sys.exit(3)), _calls()

def no_factory():
    return 3

def needs(one, two):
    pass
"""

SCRIPT = """
import torch
x = torch.zeros(2, device="cuda")
position = 0
cache = torch.zeros(8, 2, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    cache[position] = x
    total = cache.sum(0)
for step in range(3):
    x.fill_(step + 1.0)
    position = step
    graph.replay()
    print(total.sum().item())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checked")
    (path / "code.py").write_text(CODE)
    (path / "script.py").write_text(SCRIPT)
    (path / "nothing.py").write_text("import torch\nprint(torch.ones(3, device='cuda').sum())\n")
    (path / "broken.py").write_text("def f(:\n")
    return path


def check(folder, name, **settings):
    return run_isolated(Request(f"{folder}/{name}", threads=1, **settings))


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("clean", 0, ""),
        ("raises", 3, "call 1 raised ValueError: no good"),
        ("factory_raises", 3, "broken factory at"),
        ("forks", 0, ""),
        ("dies", 3, "ended its process with exit code 9"),
        ("crashes", 3, "SIGSEGV"),
        ("exits", 3, "SystemExit: 3"),
    ],
)
def test_misbehaving_code(folder, name, code, text):
    report = check(folder, f"code.py:{name}")
    assert report.exit_code() == code
    assert text in report.partial
    if name == "forks":
        assert any("forked 4 times" in note for note in report.notes)


def test_hanging_code_is_ended_and_what_was_found_is_kept(folder):
    report = check(folder, "code.py:hangs", limit_s=6.0)
    assert report.exit_code() == 3
    assert "not finished within the time limit of 6 s; it is at" in report.partial
    assert [f.rule.name for f in report.findings] == ["D2H_SYNC"]


def test_printing_does_not_spoil_the_report(folder):
    report = check(folder, "code.py:prints")
    assert report.printed == "noise\n" * 4
    assert report.exit_code() == 0


def test_script_with_a_graph_runs_its_tape(folder):
    report = check(folder, "script.py")
    assert {(f.rule.name, f.where.line) for f in report.findings} == {("BAKED_SCALAR", 8)}
    # The replay writes slot 0 each time, as a real one would: 2, 4, 6 and not the running sums 2, 6, 12.
    assert report.printed.split() == ["2.0", "4.0", "6.0"]


def test_script_without_a_region(folder):
    assert check(folder, "nothing.py").exit_code() == 5


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("code.py:no_factory", "returned int: a factory returns"),
        ("code.py:needs", "needs one, two"),
        ("code.py:missing", "has no 'missing'"),
        ("missing.py", "no script"),
    ],
)
def test_usage_mistakes(folder, capsys, target, text):
    assert execute(["check", f"{folder}/{target}"]) == 2
    assert text in capsys.readouterr().err


def test_command_writes_json(folder, capsys):
    assert execute(["check", f"{folder}/script.py", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["code"] == "CG201"


def test_baseline_makes_the_command_succeed(folder, tmp_path, capsys):
    file = tmp_path / "baseline.json"
    assert execute(["check", f"{folder}/script.py", "--write-baseline", str(file)]) == 1
    assert execute(["check", f"{folder}/script.py", "--baseline", str(file)]) == 0
    capsys.readouterr()


def test_scan_and_explain(folder, capsys):
    assert execute(["scan", f"{folder}/code.py"]) == 1
    assert execute(["scan", f"{folder}/broken.py"]) == 3
    assert execute(["scan", f"{folder}/none"]) == 2
    assert execute(["explain", "cg104"]) == 0
    assert "H2D_BLOCKING" in capsys.readouterr().out
    assert execute(["explain", "CG999"]) == 2


PLUGIN_TEST = """
import pytest, torch

def test_clean(graph_check):
    weight = torch.randn(3, 3)
    graph_check(lambda x: x @ weight, calls=[(torch.ones(2, 3),), (torch.zeros(2, 3),)])

def test_faulty(graph_check):
    graph_check(lambda x: x.nonzero(), calls=[(torch.ones(2),)])

@pytest.mark.graph_safe(fail_on="error")
def test_marked():
    return (lambda x: x + 1), [(torch.ones(2),)]

@pytest.mark.graph_safe
def test_marked_faulty():
    return (lambda x: x.sum().item()), [(torch.ones(2),)]
"""


def test_pytest_plugin(tmp_path):
    (tmp_path / "test_steps.py").write_text(PLUGIN_TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "ostinato.check.pytest_plugin",
        "--graph-report=sarif:out.sarif",
    ]
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "2 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "CG102" in done.stdout
    assert "CG101" in done.stdout
    assert json.loads((tmp_path / "out.sarif").read_text())["version"] == "2.1.0"
