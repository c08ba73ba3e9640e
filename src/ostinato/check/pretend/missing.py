"""Results for operations that cannot be computed: no CPU kernel, or no data under FakeTensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from ostinato.check.finding import Severity
from ostinato.check.frames import user_frame
from ostinato.check.pretend.world import World

_MISSING = (
    "not implemented for",
    "not implemented on",
    "BF16",
    "Could not run",
    "Expected self.dtype",
    "only supported on",
)
_TRUE_TRIPS = 3


def needs_fallback(error: Exception) -> bool:
    """Whether an error says that the CPU lacks a kernel (for this dtype), rather than that the call is wrong."""
    return isinstance(error, NotImplementedError) or any(text in str(error) for text in _MISSING)


class MadeUp:
    """Under FakeTensors there are no data. A bool is True three times at a line, then False, so that no loop is
    endless; sizes are half of the largest."""

    data_dependent = (DataDependentOutputException, DynamicOutputShapeException)

    def __init__(self) -> None:
        self._trips: dict[tuple[str, int], int] = {}

    def result(self, func: torch._ops.OpOverload, args: tuple[Any, ...], error: Exception) -> Any:
        """A plausible result of a data-dependent operation."""
        name = func._schema.name.split("::")[-1]
        tensor = next(a for a in tree_leaves(args) if isinstance(a, torch.Tensor))
        if isinstance(error, DataDependentOutputException):
            if name in ("equal", "allclose"):
                return True
            where = user_frame()
            trips = self._trips[where.file, where.line] = self._trips.get((where.file, where.line), 0) + 1
            if tensor.dtype == torch.bool:
                return trips <= _TRUE_TRIPS
            return 1.0 if tensor.is_floating_point() else 1
        rows = max(1, tensor.numel() // 2)
        if name in ("nonzero", "argwhere"):
            return tensor.new_empty((rows, tensor.dim()), dtype=torch.long)
        if name == "_unique2":
            inverse = tensor.new_empty(tensor.shape, dtype=torch.long)
            return tensor.new_empty(rows), inverse, tensor.new_empty(rows, dtype=torch.long)
        if name in ("unique_consecutive", "unique_dim", "unique_dim_consecutive"):
            counts = tensor.new_empty(rows, dtype=torch.long)
            return tensor.new_empty(rows), tensor.new_empty(tensor.shape, dtype=torch.long), counts
        is_count = name in ("bincount", "repeat_interleave")
        return tensor.new_empty(rows, dtype=torch.long if is_count else tensor.dtype)


def without_cpu_kernel(
    world: World, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Compute in another dtype, or keep the shape alone and say so."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    first = next((t for t in tensors if t.is_floating_point()), tensors[0])
    wide = torch.bfloat16 if "grouped_mm" in str(func) else torch.float64

    def widen(leaf: Any) -> Any:
        if (
            isinstance(leaf, torch.Tensor)
            and (leaf.is_floating_point() or wide is torch.float64)
            and leaf.dtype != torch.bool
        ):
            return leaf.to(wide)
        return leaf

    with world.mute():
        try:
            result = func(*tree_map(widen, args), **{k: tree_map(widen, v) for k, v in kwargs.items()})
            return tree_map(
                lambda o: o.to(first.dtype) if isinstance(o, torch.Tensor) and o.dtype == wide else o, result
            )
        except (NotImplementedError, RuntimeError, TypeError):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = [mode.from_tensor(t) for t in tensors]
                table = dict(zip(map(id, tensors), fake, strict=True))
                as_fake = tree_map(lambda leaf: table.get(id(leaf), leaf), (args, dict(kwargs)))
                shapes = func(*as_fake[0], **as_fake[1])
    world.report("VALUE_LOST", Severity.INFO, f"the CPU has no kernel for {func}: zeros were used", str(func))
    with world.mute():
        return tree_map(lambda o: torch.zeros(o.shape, dtype=o.dtype) if isinstance(o, torch.Tensor) else o, shapes)
