"""Install PyTorch for this machine before Ostinato is installed; run by the Makefile with the environment's Python.

Without an NVIDIA GPU the CUDA packages that a plain `pip install torch` brings on Linux are several GB of no use.
So: nothing to do where a fitting PyTorch is there already; on Linux without a GPU the newest CPU build that pip can
find; otherwise, and if pip finds no CPU build, what pip would take by itself. Uses the standard library alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Pip = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]

NO_CPU_BUILD = """\
No NVIDIA GPU here, but pip finds no CPU build of PyTorch. The CUDA build comes, with several GB of packages.
To avoid that, stop here and name an index that has CPU builds (see pytorch.org, "Get started") in PIP_EXTRA_INDEX_URL,
or a folder with such a wheel in PIP_FIND_LINKS, and run this again."""


def run_pip(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """pip of the running Python, its output kept."""
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def torch_requirement(pyproject: Path) -> str:
    """The requirement on torch in pyproject.toml, such as ``torch>=2.11,<2.14``."""
    dependencies: list[str] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(text for text in dependencies if re.match(r"torch\b", text))


def release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` → (2, 13, 0). A pre-release or a development build gives (): it is never chosen."""
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\+[\w.]+)?", version)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def fits(version: str, requirement: str) -> bool:
    """Is ``version`` within the ``>=`` and ``<`` bounds of ``requirement``?"""
    found = release(version)
    bounds = re.findall(r"(>=|<)\s*([\d.]+)", requirement)
    return bool(found) and all((found >= release(b)) if sign == ">=" else (found < release(b)) for sign, b in bounds)


def installed_version() -> str | None:
    """The version of torch in this environment, or None."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    """Does the driver's own tool list a GPU?"""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def candidates(pip: Pip, requirement: str) -> list[str]:
    """What may be a CPU build, best first: versions that say ``+cpu``, then the newest plain one of every 2.x."""
    listing = pip(["index", "versions", "torch"])
    match = re.search(r"Available versions:\s*(.+)", listing.stdout)
    versions = [text.strip() for text in match[1].split(",")] if match else []
    fitting = sorted((v for v in versions if fits(v, requirement)), key=release, reverse=True)
    marked = [version for version in fitting if version.endswith("+cpu")]
    newest: dict[tuple[int, ...], str] = {}
    for version in fitting:
        if "+" not in version:
            newest.setdefault(release(version)[:2], version)
    return [*marked, *newest.values()]


def is_cpu_build(pip: Pip, version: str) -> bool:
    """Would pip install ``torch==version`` without any of NVIDIA's packages? Nothing is installed to find out."""
    tried = pip(["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", f"torch=={version}"])
    if tried.returncode != 0:
        return False
    return not any(name.startswith(("nvidia", "cuda")) for name in report_names(json.loads(tried.stdout)))


def report_names(report: dict[str, Any]) -> list[str]:
    """The names of the packages in an installation report of pip, in lower case."""
    return [str(item["metadata"]["name"]).lower() for item in report["install"]]


def choose(pip: Pip, requirement: str, *, installed: str | None, needs_cpu_build: bool) -> tuple[str | None, str]:
    """(what to hand to `pip install`, or None for nothing; a line or more for the reader)."""
    if installed is not None and fits(installed, requirement):
        return None, f"torch {installed} is installed"
    if not needs_cpu_build:
        return requirement, f"installing {requirement}"
    for version in candidates(pip, requirement):
        if is_cpu_build(pip, version):
            return f"torch=={version}", f"no NVIDIA GPU here: installing the CPU build torch {version}"
    return requirement, NO_CPU_BUILD


def main() -> int:
    requirement = torch_requirement(Path(__file__).resolve().parent.parent / "pyproject.toml")
    # Elsewhere than on Linux the plain builds have no CUDA packages.
    needs_cpu_build = sys.platform == "linux" and not has_nvidia_gpu()
    wanted, line = choose(run_pip, requirement, installed=installed_version(), needs_cpu_build=needs_cpu_build)
    print(line, flush=True)
    if wanted is None:
        return 0
    return subprocess.run([sys.executable, "-m", "pip", "install", wanted], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
