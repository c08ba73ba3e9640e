"""``torch.Generator`` for the pretended device."""

from __future__ import annotations

from typing import Any

import torch

RealGenerator = torch.Generator


class PretendGenerator(RealGenerator):
    """A generator that says it is on the GPU. ``torch.Generator`` is subclassed, since PyTorch's argument parser checks
    the type before any mode sees the call."""

    is_registered = False
    is_default = False

    def __new__(cls, device: Any = None) -> Any:
        """A host generator for a host device, a pretended one for a GPU."""
        if device is None or not str(device).startswith("cuda"):
            return RealGenerator()
        return RealGenerator.__new__(cls)

    def __init__(self, device: Any = None) -> None:
        """``device`` was used by ``__new__``."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # read-only there too, which the stubs do not say
        """The pretended device."""
        return torch.device("cuda", 0)
