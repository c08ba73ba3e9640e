"""Kernels are tested wherever the tests run: in Triton's interpreter without a GPU, compiled with one.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set here, before a test imports a kernel's module.
Tests call the launcher in ``<op>/triton.py`` itself, on tensors of the ``device`` fixture: for CPU tensors the public
op would call the reference.
"""

import os
import sys
from typing import Any

import pytest
import torch

from . import memcheck

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("Triton was imported before tests/unit/kernels/conftest.py: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def interpreter_reads_bounds() -> None:
    """Triton 3.6's interpreter takes loop bounds by int() of a one-element array, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


@pytest.fixture(autouse=True, scope="session")
def kernels_access_their_arguments_alone() -> None:
    """Every test of a kernel in the interpreter is one of its accesses too."""
    if not torch.cuda.is_available():
        memcheck.install()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is seen: room is made full of NaN, or of -77."""

    empty = torch.empty

    def full_of_poison(*arguments: Any, **options: Any) -> torch.Tensor:
        made = empty(*arguments, **options)
        return made.fill_(torch.nan if made.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", full_of_poison)
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda like, dtype=None: full_of_poison(like.shape, dtype=dtype or like.dtype, device=like.device),
    )
