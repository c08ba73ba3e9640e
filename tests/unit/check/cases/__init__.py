"""Classified snippets: the checker's acceptance suite, one file per group of faults.

Each case is a factory ``make(dev) -> (fn, argument sets)``. ``fn(*args)`` is the region; tensors in the argument sets
are static inputs, Python numbers are host values that change from call to call. Lines that must be reported end in
``# BAD``, and no other line may be.

verdict ``ok``: nothing at hazard or error level. ``error``: an error on every BAD line. ``hazard``: at least a hazard.
``rules``: any of these is a right answer.
"""

from __future__ import annotations

from . import between_calls, data_shapes, host_reads, host_to_device, ordinary_code, streams
from .case import Case, ints, ramp, twice

__all__ = ["CASES", "Case", "ints", "ramp", "twice"]

CASES: list[Case] = [
    *host_reads.CASES,
    *data_shapes.CASES,
    *host_to_device.CASES,
    *streams.CASES,
    *between_calls.CASES,
    *ordinary_code.CASES,
]
