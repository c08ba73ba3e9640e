"""One ATen call inside the region: would it stop a capture?

The op table knows what an operation does by itself; here stands what depends on where its operands are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ostinato.check.conditions import CONDITIONS
from ostinato.check.finding import Certainty, Severity
from ostinato.check.op_table import declared_effect
from ostinato.check.pretend.transfer import report_transfer
from ostinato.check.pretend.world import World

_KNOWN_NAMESPACES = frozenset(
    {"aten", "prims", "prim", "quantized", "torchvision", "higher_order", "profiler", "debugprims"}
)
_INDEX_WRITES = frozenset({"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"})
_INDEX_READS = frozenset({"index", "_unsafe_index"})
_COPIES = frozenset({"copy_", "copy", "_to_copy", "to"})
#: Operations that take host tensors by design.
_TAKES_HOST = frozenset(
    {
        "set_", "resize_", "_pack_padded_sequence", "_pad_packed_sequence", "tensor_split", "_ctc_loss", "lstm", "gru",
        "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "_cudnn_rnn", "lift_fresh", "_assert_tensor_metadata", "pin_memory",
        "_pin_memory", "is_pinned", "record_stream", "_nested_view_from_buffer",
    }
)  # fmt: skip
_ALIASES = frozenset({"detach", "alias", "view", "lift_fresh", "lift_fresh_copy", "_pin_memory", "is_pinned"})
_LARGE_BYTES = 64 * 1024
_FILLS = frozenset(
    {"zeros", "ones", "full", "zero_", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
)


def op_base(func: torch._ops.OpOverload) -> str:
    """``index_put_`` of ``aten.index_put_.default``."""
    return func._schema.name.split("::")[-1]


def _is_mask(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)


def _is_masked_fill(world: World, base: str, args: Sequence[Any], indices: list[torch.Tensor]) -> bool:
    """``x[mask] = number``: PyTorch turns it into masked_fill_, which needs no shape from the data."""
    if base not in _INDEX_WRITES or len(args) < 3 or len(indices) != 1:
        return False
    value, accumulates = args[2], len(args) > 3 and bool(args[3])
    return isinstance(value, torch.Tensor) and value.numel() == 1 and not world.on_device(value) and not accumulates


def _classify_index(world: World, name: str, base: str, args: Sequence[Any]) -> None:
    target = args[0]
    indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
    masks = [i for i in indices if _is_mask(i) and world.on_device(i)]
    if masks:
        if not _is_masked_fill(world, base, args, indices):
            world.report(
                "DYNAMIC_SHAPE",
                Severity.ERROR,
                "indexing with a boolean mask calls nonzero, whose size the host waits for",
                name,
            )
    elif base in _INDEX_WRITES and world.on_device(target):
        value = args[2]
        if isinstance(value, torch.Tensor) and not world.on_device(value):
            world.report("H2D_PAGEABLE", Severity.ERROR, "a host value is copied to the device", name)
    if world.on_device(target) and any(not world.on_device(i) for i in indices):
        world.report("H2D_PAGEABLE", Severity.ERROR, "a host index tensor is copied to the device", name)
    if not world.on_device(target) and any(world.on_device(i) for i in indices):
        world.report("D2H_SYNC", Severity.ERROR, "a device index is read to index a host tensor", name)


def _classify_table(world: World, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Report what the op table says; True if this operation is settled by that."""
    name = str(func)
    effect = world.table.effects.get(name)
    if effect is None:
        if (
            func.namespace == "aten"
            and torch.Tag.dynamic_output_shape in func.tags
            and op_base(func) not in _INDEX_READS
        ):
            world.report("DYNAMIC_SHAPE", Severity.ERROR, "the output size depends on device data", name)
            return True
        return False
    holds: bool | None = True
    if effect.when != "always":
        holds = CONDITIONS[effect.when](world.on_device, args, kwargs)
    if holds is None:
        world.report(effect.rule, Severity.WARNING, effect.why, name, certainty=Certainty.CONDITIONAL)
    elif holds:
        world.report(effect.rule, Severity.ERROR, effect.why, name)
    return bool(holds) or holds is None


def _classify_custom(world: World, func: torch._ops.OpOverload) -> bool:
    """An operation that PyTorch does not know: what did its author declare? True if it is custom."""
    if func.namespace in _KNOWN_NAMESPACES:
        return False
    op = op_base(func)
    declared = declared_effect(func.namespace, op)
    name = str(func)
    if declared == "sync" or torch.Tag.cudagraph_unsafe in func.tags:
        world.report("D2H_SYNC", Severity.ERROR, "declared by its author as unsafe in a capture", name)
    elif declared == "dynamic" or torch.Tag.dynamic_output_shape in func.tags:
        world.report(
            "DYNAMIC_SHAPE", Severity.ERROR, "declared by its author: the output size depends on device data", name
        )
    elif declared is None and func.namespace not in world.table.device_namespaces:
        world.opaque_ops[name] = world.opaque_ops.get(name, 0) + 1
        world.report("OPAQUE_OP", Severity.INFO, "a custom operation: what it does on the host is not known", name)
    return True


def _classify_cost(world: World, name: str, base: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """Large fills and repeats: they run again at every replay."""
    if not outputs:
        return
    num_bytes = max(o.numel() * o.element_size() for o in outputs)
    if num_bytes < _LARGE_BYTES:
        return
    if base in _FILLS:
        world.report("STEP_ALLOCATION", Severity.WARNING, f"every replay writes {num_bytes:,} constant bytes", name)
    elif base in ("repeat", "repeat_interleave") and inputs:
        world.report(
            "STEP_ALLOCATION", Severity.WARNING, f"every replay repeats a tensor into {num_bytes:,} bytes", name
        )


def classify(
    world: World,
    func: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> None:
    """Report what this call does to a capture. ``inputs`` and ``outputs`` are its tensors, flattened."""
    name, base = str(func), op_base(func)
    device_inputs = [t for t in inputs if world.on_device(t)]
    host_inputs = [t for t in inputs if not world.on_device(t)]
    touched = device_inputs or [t for t in outputs if world.on_device(t)]
    if touched and world.region_device is not None:
        foreign = {str(world.device_of(t)) for t in touched} - {str(world.region_device)}
        if foreign:
            world.report(
                "WRONG_DEVICE",
                Severity.HAZARD,
                f"works on {', '.join(sorted(foreign))} while a stream of {world.region_device} captures: "
                "it is not in the graph",
                name,
            )
    if not device_inputs:
        if inputs and outputs and base not in _ALIASES:
            world.report("HOST_COMPUTE", Severity.INFO, "a host tensor operation runs at capture only", name)
        elif not inputs and any(world.on_device(o) for o in outputs):
            _classify_cost(world, name, base, [], outputs)
        return
    if _classify_custom(world, func) or _classify_table(world, func, args, kwargs):
        return
    if base in _INDEX_READS or base in _INDEX_WRITES:
        _classify_index(world, name, base, args)
    elif base in _COPIES:
        if base == "copy_":
            non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            report_transfer(world, args[1], args[0], non_blocking, name)
    elif host_inputs and base not in _TAKES_HOST:
        if any(t.dim() > 0 for t in host_inputs):
            world.report("DEVICE_MISMATCH", Severity.ERROR, "a host tensor is mixed with device tensors", name)
        else:
            world.report(
                "HOST_COMPUTE", Severity.INFO, "a 0-dim host tensor is read at capture: the graph keeps its value", name
            )
    _classify_cost(world, name, base, inputs, outputs)
