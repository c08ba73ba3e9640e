"""Settings from the environment, read once. Nothing else in Ostinato reads the environment.

OSTINATO_CACHE     directory for downloaded models (default: XDG_CACHE_HOME/ostinato or ~/.cache/ostinato)
OSTINATO_OFFLINE   1: never use the network; what is not cached is an error

huggingface_hub reads its own variables (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE …).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True)
class Settings:
    """cache_dir: where Ostinato keeps what it downloads. offline: whether the network must not be used."""

    cache_dir: Path
    offline: bool = False

    @property
    def models_dir(self) -> Path:
        """Directory of the known models that were fetched."""
        return self.cache_dir / "models"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Settings that these variables mean. An unknown word for a switch counts as "on": it was set for a reason."""
        own = environment.get("OSTINATO_CACHE")
        shared = environment.get("XDG_CACHE_HOME")
        if own:
            cache_dir = Path(own).expanduser()
        else:
            cache_dir = (Path(shared) if shared else Path.home() / ".cache") / "ostinato"
        return cls(cache_dir, environment.get("OSTINATO_OFFLINE", "").strip().lower() not in _FALSE)


@cache
def settings() -> Settings:
    """The settings of this process."""
    return Settings.from_environment(os.environ)


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a program that Ostinato starts: its own, with ``changes``."""
    return {**os.environ, **changes}
