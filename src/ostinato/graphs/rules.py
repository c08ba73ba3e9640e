"""What a capture does not survive, told from one operation's arguments before it runs.

These are the causes that can be named with certainty: raising here leaves CUDA's capture intact, where letting the
operation run would end it with an error that hides its own cause. Whatever else CUDA refuses is translated from its
message by :func:`remedy_for_error`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_aten = torch.ops.aten

ITEM = "keep the value in a tensor: torch.where for a branch, a device scalar for arithmetic; read it after the replay"
DYNAMIC = "use a fixed shape: torch.where or a multiplication by the mask, scatter_add_ into a fixed buffer, topk"
TO_HOST = "return the tensor and copy it after the replay, or copy into pinned memory with non_blocking=True"
FROM_HOST = "put the value into a static buffer before the replay (StaticBuffers.fill), or make it on the device once"
CROSS_DEVICE = "put an eager break (Breaks) between two captures, one per device"
UNREGISTERED = "name the generator in capture(..., rng=(generator,)), so that every replay advances it"

_DATA_DEPENDENT = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten._unique.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim_consecutive.default,
    _aten.bincount.default,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_VALUE_READ = {
    _aten.masked_fill.Tensor,
    _aten.masked_fill_.Tensor,
    _aten.index_fill.int_Tensor,
    _aten.index_fill_.int_Tensor,
}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


@dataclasses.dataclass(frozen=True)
class Violation:
    """One operation that a capture does not survive: its name, why, and what to write in its place."""

    operation: str
    reason: str
    remedy: str


def argument_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments: they come bare, or in lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from argument_tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from argument_tensors(item)


def generator_key(generator: torch.Generator) -> int:
    """Identifies the generator behind a Python object: PyTorch makes a new object at every look-up."""
    key: int = generator._cdata  # type: ignore[attr-defined]  # there, and missing from the stubs
    return key


def violation_of(
    op: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device, generators: frozenset[int]
) -> Violation | None:
    """Why ``op`` on these arguments cannot be captured on ``device``, or None.

    ``generators`` holds the :func:`generator_key` of the generators that the graph may draw from.
    """
    name = str(op)
    inputs = list(argument_tensors(args)) + list(argument_tensors(kwargs))
    for tensor in inputs:
        if tensor.device.type == device.type and tensor.device != device:
            reason = f"it uses a tensor of {tensor.device} in a capture on {device}"
            return Violation(name, reason, CROSS_DEVICE)
    if op in _COPIES:
        return _copy_violation(op, args, kwargs, device)
    on_device = [tensor for tensor in inputs if tensor.device == device]
    if not on_device:
        return None
    if op is _aten._local_scalar_dense.default:
        return Violation(
            name, "it reads a value to the host (.item(), int(), float(), bool(), an if on a tensor)", ITEM
        )
    if op in _DATA_DEPENDENT:
        return Violation(name, "the shape of its result depends on the data", DYNAMIC)
    if op in _INDEXED and any(_is_mask(index) for index in argument_tensors(args[1])):
        return Violation(name, "a boolean mask as an index has a shape that depends on the data", DYNAMIC)
    if op is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return Violation(name, "repeats in a tensor give a shape that depends on the data", "give output_size=")
    if op in _VALUE_READ and isinstance(args[-1], torch.Tensor) and args[-1].device == device:
        return Violation(name, "it reads its fill value to the host", "use torch.where(mask, value, x)")
    generator = kwargs.get("generator")
    if (
        isinstance(generator, torch.Generator)
        and generator.device == device
        and generator_key(generator) not in generators
    ):
        return Violation(
            name, "its generator is not registered: every replay would draw the same numbers", UNREGISTERED
        )
    return None


def _copy_violation(op: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> Violation | None:
    if op is _aten.copy_.default:
        target, source = args[0].device, args[1]
        non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
        pinned_target = target.type == "cpu" and args[0].is_pinned()
    else:
        source = args[0]
        wanted = kwargs.get("device")
        target = source.device if wanted is None else torch.device(wanted)
        non_blocking, pinned_target = bool(kwargs.get("non_blocking", False)), False
    if target.type == source.device.type and target.index in (None, source.device.index):
        return None
    name = str(op)
    if device.type not in (target.type, source.device.type) or source.numel() == 0:
        return None
    if target.type == source.device.type:
        return Violation(name, f"it copies from {source.device} to {target}", CROSS_DEVICE)
    if source.device == device:
        if non_blocking and pinned_target:
            return None
        return Violation(name, "it copies to the host and waits for the device", TO_HOST)
    if source.is_pinned():
        return None
    return Violation(name, "it copies from ordinary host memory, which waits and would freeze the value", FROM_HOST)


def _is_mask(index: torch.Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


_REMEDIES = (
    ("pinned", FROM_HOST),
    ("offset increment", UNREGISTERED),
    ("increase offset", UNREGISTERED),
    ("philox", UNREGISTERED),
    ("generator", UNREGISTERED),
    ("unjoined", "make the capture's stream wait for the side stream (wait_stream) before the function returns"),
    ("uncaptured work", "record that event inside the capture, or wait for it before the capture begins"),
    ("legacy stream", "run the work on the current stream: it went to the default stream"),
    ("out of memory", "free memory, or capture a smaller bucket: a graph's scratch cannot shrink during a capture"),
    ("not permitted when stream is capturing", "take this call out of the captured function: it waits for the device"),
)
_DEFAULT_REMEDY = "take this call out of the captured function, or put an eager break (Breaks) there"


def remedy_for_error(message: str) -> str:
    """What to do about a message of CUDA or PyTorch that ended a capture."""
    lowered = message.lower()
    return next((remedy for key, remedy in _REMEDIES if key in lowered), _DEFAULT_REMEDY)
