"""Triton's interpreter made to refuse what a GPU forgives: access to memory outside a launch's arguments.

A read just past a buffer finds whatever lies there, mostly zeros and now and then NaN. The interpreter does what it is
told too, so a test on it fails once in many runs. After ``install`` it fails at once, and says how far off it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class OutOfBoundsError(AssertionError):
    """A kernel's unmasked lane lies in none of its arguments."""


def extents(arguments: object) -> list[tuple[int, int]]:
    """First byte and the one behind the last, of each tensor in a launch's arguments, as its shape and strides say."""
    if isinstance(arguments, (tuple, list)):
        return [extent for argument in arguments for extent in extents(argument)]
    tensor = getattr(arguments, "base", arguments)  # of a descriptor, or of a tensor under another element type
    if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
        return []
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return [(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())]


def merged(ranges: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the union of ranges, ascending."""
    union: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    both = np.array(union, dtype=np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


class Launch:
    """The extents of the arguments of the launch that runs now."""

    def __init__(self) -> None:
        self.starts, self.ends = merged([])

    def begin(self, arguments: object) -> None:
        self.starts, self.ends = merged(extents(arguments))

    def check(self, action: str, pointers: Any, mask: np.ndarray) -> None:
        """Raise OutOfBoundsError if a lane of pointers under mask (integers or booleans) lies in no extent."""
        at, masked = np.broadcast_arrays(pointers.data, mask)
        at = at[masked != 0].astype(np.uint64)
        if at.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        owner = np.searchsorted(self.starts, at, side="right") - 1
        inside = owner >= 0
        inside[inside] = at[inside] + np.uint64(size) <= self.ends[owner[inside]]
        if not inside.all():
            wrong = int(np.argmin(inside))
            where = "before every argument"
            if owner[wrong] >= 0:
                where = f"{int(at[wrong]) - int(self.ends[owner[wrong]])} bytes past an argument's end"
            raise OutOfBoundsError(f"a kernel {action} {size} bytes {where}; lanes outside: {(~inside).sum()}")


def install() -> None:
    """Make the interpreter check every access from now on."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    now = Launch()
    to_host = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    update, swap = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def checked_to_host(self: Any, given: Any, named: Any) -> Any:
        host = to_host(self, given, named)
        now.begin([*host[0], *host[1].values()])
        return host

    def checked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        now.check("reads", pointers, mask.data)
        return load(self, pointers, mask, *more)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        now.check("writes", pointers, mask.data)
        return store(self, pointers, value, mask, *more)

    def checked_update(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        now.check("updates", pointers, mask.data)
        return update(self, operation, pointers, value, mask, *more)

    def checked_swap(self: Any, pointers: Any, *more: Any) -> Any:
        now.check("swaps", pointers, np.True_)
        return swap(self, pointers, *more)

    GridExecutor._init_args_hst = checked_to_host
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    InterpreterBuilder.create_atomic_rmw = checked_update
    InterpreterBuilder.create_atomic_cas = checked_swap
