"""Kernels are tested wherever the tests run: in Triton's interpreter without a GPU, compiled with one.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set here, before a test imports a kernel's module.
Tests call the launcher in ``<op>/triton.py`` itself, on tensors of the ``device`` fixture: for CPU tensors the public
op would call the reference.
"""

import os
import sys

import pytest
import torch

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
