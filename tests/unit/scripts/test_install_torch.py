"""Which PyTorch is chosen, with a pip that only pretends."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
REQUIREMENT = "torch>=2.11,<2.14"
CUDA = ["torch", "filelock", "nvidia-cublas-cu12", "triton"]
CPU = ["torch", "filelock", "sympy"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "scripts" / "install_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakePip:
    """Knows versions, and what installing each would bring; ``calls`` are the versions that were tried."""

    def __init__(self, brings: dict[str, list[str]], *, index: bool = True) -> None:
        self.brings = brings
        self.index = index
        self.calls: list[str] = []

    def __call__(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        def answer(code: int, text: str) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess([*arguments], code, stdout=text, stderr="")

        if arguments[0] == "index":
            listing = f"torch (9)\nAvailable versions: {', '.join(self.brings)}\n  LATEST: 9\n"
            return answer(0, listing) if self.index else answer(1, "")
        assert "--dry-run" in arguments, "choosing must not install anything"
        version = arguments[-1].removeprefix("torch==")
        self.calls.append(version)
        report = {"install": [{"metadata": {"name": name, "version": "1"}} for name in self.brings.get(version, [])]}
        return answer(0 if version in self.brings else 1, json.dumps(report))


def _choose(script: ModuleType, pip: FakePip, installed: str | None = None, needs_cpu_build: bool = True) -> str | None:
    wanted: str | None
    wanted, line = script.choose(pip, REQUIREMENT, installed=installed, needs_cpu_build=needs_cpu_build)
    assert line
    return wanted


def test_a_marked_cpu_build_comes_first_though_newer_plain_ones_exist(script: ModuleType) -> None:
    pip = FakePip({"2.15.0": CUDA, "2.13.1": CUDA, "2.13.0+cpu": CPU, "2.13.0": CPU, "2.12.1": CUDA})
    assert _choose(script, pip) == "torch==2.13.0+cpu"
    assert pip.calls == ["2.13.0+cpu"]


def test_a_plain_build_counts_only_without_cuda_packages(script: ModuleType) -> None:
    pip = FakePip({"2.14.0": CPU, "2.13.1": CUDA, "2.13.0": CUDA, "2.12.1": CPU, "2.12.0": CPU, "2.11.0": CPU})
    assert _choose(script, pip) == "torch==2.12.1"
    assert pip.calls == ["2.13.1", "2.12.1"]


def test_a_marked_build_that_still_brings_cuda_is_passed_over(script: ModuleType) -> None:
    assert _choose(script, FakePip({"2.13.0+cpu": CUDA, "2.11.0": CPU})) == "torch==2.11.0"


def test_no_cpu_build_is_said_plainly(script: ModuleType) -> None:
    pip = FakePip({"2.13.0": CUDA, "2.12.0": CUDA})
    wanted, line = script.choose(pip, REQUIREMENT, installed=None, needs_cpu_build=True)
    assert wanted == REQUIREMENT
    assert "no CPU build" in line
    assert "PIP_EXTRA_INDEX_URL" in line


def test_a_pip_that_cannot_list_versions(script: ModuleType) -> None:
    assert _choose(script, FakePip({"2.13.0+cpu": CPU}, index=False)) == REQUIREMENT


def test_with_a_gpu_pip_takes_what_it_likes(script: ModuleType) -> None:
    pip = FakePip({"2.13.0+cpu": CPU})
    assert _choose(script, pip, needs_cpu_build=False) == REQUIREMENT
    assert pip.calls == []


@pytest.mark.parametrize(
    ("installed", "done"),
    [("2.13.0+cu130", True), ("2.11.0", True), ("2.14.0", False), ("2.10.2", False), ("2.13.0rc1", False)],
)
def test_what_is_installed_stays_if_it_fits(script: ModuleType, installed: str, done: bool) -> None:
    assert (_choose(script, FakePip({"2.13.0+cpu": CPU}), installed=installed) is None) == done


def test_the_requirement_is_the_projects(script: ModuleType) -> None:
    assert script.torch_requirement(ROOT / "pyproject.toml").startswith("torch>=")


def test_no_driver_means_no_gpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not script.has_nvidia_gpu()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA'\n")
    tool.chmod(0o755)
    assert script.has_nvidia_gpu()
    tool.write_text("#!/bin/sh\necho 'GPU 0: gone'\nexit 9\n")
    assert not script.has_nvidia_gpu()
