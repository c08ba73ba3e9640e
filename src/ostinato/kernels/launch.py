"""The host side of launching kernels: what the device can do, and the options that follow from it.

Every kernel runs under programmatic dependent launch (PDL) on compute capability 9.0 and later: it lets the next
kernel of the stream start at once (``trigger(PDL)``, its first statement), may read weights, and waits
(``wait(PDL)``) before it touches anything that an earlier kernel wrote or may still read. In a chain of small kernels
this hides the launch and the first memory latency of each behind the one before it.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def _properties(index: int) -> tuple[str, int, int, int]:
    found = torch.cuda.get_device_properties(index)
    return found.name, found.major, found.minor, found.multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def gpu_name(device: torch.device) -> str:
    """The GPU's marketing name, as in ``NVIDIA H200``; ``cpu`` where the interpreter runs the kernels."""
    return _properties(_index(device))[0] if device.type == "cuda" else "cpu"


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability (major, minor); (0, 0) where the interpreter runs the kernels."""
    return _properties(_index(device))[1:3] if device.type == "cuda" else (0, 0)


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 where the interpreter runs the kernels."""
    return _properties(_index(device))[3] if device.type == "cuda" else 1


_WITH_PDL = {"PDL": True, "launch_pdl": True}
_FIRST = {"PDL": True}
_WITHOUT_PDL = {"PDL": False}


def launch_options(device: torch.device, *, first: bool = False) -> dict[str, bool]:
    """Keyword arguments for every kernel launch: the constexpr ``PDL`` and, on 9.0 and later, ``launch_pdl``.

    first: the kernel begins a step. It starts when everything before it is done, so that what follows it may read ahead
    of its own wait what only earlier steps have written.
    """
    if capability(device) < (9, 0):
        return _WITHOUT_PDL
    return _FIRST if first else _WITH_PDL
