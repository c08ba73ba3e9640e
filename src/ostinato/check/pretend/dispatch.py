"""The dispatch mode of the pretence: it sees every ATen call, places its results, classifies and records it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ostinato.check.finding import Severity
from ostinato.check.pretend.classify import classify, op_base
from ostinato.check.pretend.flatten import tensors
from ostinato.check.pretend.missing import MadeUp, needs_fallback, without_cpu_kernel
from ostinato.check.pretend.world import UNPLACED, World, storage_key

_FRESH = frozenset({"lift_fresh", "lift_fresh_copy"})


class PretendDispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Runs each operation on the CPU and lets its results inherit the pretended device of its operands."""

    def __init__(self, world: World) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._world = world
        self._made_up = MadeUp()
        world.run_op = self._run

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the call; ``types`` is unused."""
        kwargs = dict(kwargs or {})
        world = self._world
        if world.muted or func.namespace == "prim":  # prim.device and the like: questions, not operations
            return self._run(func, args, kwargs)
        inputs = tensors((args, kwargs))
        recorder = world.recorder if world.watching else None
        if recorder is not None:
            recorder.before(func, args, kwargs, inputs)
        sizes = _out_sizes(world, func, args, kwargs) if world.watching else []
        result = self._run(func, args, kwargs)
        outputs = tensors(result)
        if op_base(func) not in _FRESH:
            self._place(inputs, outputs)
        if world.watching:
            classify(world, func, args, kwargs, inputs, outputs)
            _report_resized(world, func, sizes)
            if recorder is not None:
                recorder.after(func, args, kwargs, inputs, outputs, result)
        return result

    def _run(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except self._made_up.data_dependent as error:
            return self._made_up.result(func, args, error)
        except (NotImplementedError, RuntimeError) as error:
            if not needs_fallback(error):
                raise
            return without_cpu_kernel(self._world, func, args, kwargs)

    def _place(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        world = self._world
        placing = world.placing[-1] if world.placing else UNPLACED
        device = next((d for d in map(world.device_of, inputs) if d is not None), None)
        if placing.explicit or not inputs:
            device = placing.device
        if device is None and not world.watching:
            return
        owned = {storage_key(t) for t in inputs}
        for output in outputs:
            if storage_key(output) not in owned or storage_key(output) is None:
                world.put(output, device)


def _out_sizes(
    world: World, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[tuple[torch.Tensor, int]]:
    """The output buffers that the caller gave, with their bytes before the call."""
    found = [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
    if op_base(func) == "resize_":
        found.append(args[0])
    return [(t, t.untyped_storage().nbytes()) for t in found if isinstance(t, torch.Tensor) and world.on_device(t)]


def _report_resized(world: World, func: torch._ops.OpOverload, sizes: list[tuple[torch.Tensor, int]]) -> None:
    for tensor, before in sizes:
        after = tensor.untyped_storage().nbytes()
        if before and after > before:
            world.report(
                "OUT_RESIZED",
                Severity.HAZARD,
                f"the buffer held {before:,} bytes and the result needs {after:,}: PyTorch moved it, "
                "and a kernel that does not check would write past its end",
                str(func),
            )
