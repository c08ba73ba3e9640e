"""One tiny model for all tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a GGUF file with a chat template."""
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture(scope="session")
def tiny_without_template(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a chat template."""
    directory: Path = tmp_path_factory.mktemp("model")
    return str(write_tiny_model(directory / "raw.gguf", template=None))
