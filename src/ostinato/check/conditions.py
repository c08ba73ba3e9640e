"""Conditions that the op tables name: when exactly an operation makes the host wait.

Each takes (on_device, args, kwargs) of the ATen call and answers True, False, or None for "cannot be known here".
Sources: the CUDA host code of torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

OnDevice = Callable[[torch.Tensor], bool]
Condition = Callable[[OnDevice, Sequence[Any], Mapping[str, Any]], bool | None]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _no_range(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """histc: min == max means "take them from the data"."""
    low, high = _argument(args, kwargs, 2, "min", 0), _argument(args, kwargs, 3, "max", 0)
    return bool(low == high) and args[0].numel() > 0


def _device_value(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """masked_fill, index_fill: a value tensor on the device is read with item()."""
    value = args[-1] if "value" not in kwargs else kwargs["value"]
    return isinstance(value, torch.Tensor) and on_device(value)


def _same_shape(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """equal: different shapes, or no elements, are answered without the data."""
    return bool(args[0].shape == args[1].shape) and args[0].numel() > 0


def _no_output_size(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """repeat_interleave: output_size spares the read of the sum."""
    return _argument(args, kwargs, 1, "output_size", None) is None


def _not_bfloat16(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """_grouped_mm: a device kernel exists for bfloat16 only; others read the offsets on the host."""
    return bool(args[0].dtype != torch.bfloat16)


def _sorting(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """isin: many test elements are sorted, and without assume_unique made unique first."""
    unique = bool(kwargs.get("assume_unique", False))
    return not unique and bool(args[1].numel() >= 10.0 * args[0].numel() ** 0.145)


def _checks_lengths(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """segment_reduce: lengths are validated on the host unless unsafe=True."""
    return not bool(kwargs.get("unsafe", False))


def _batched(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
    """Solvers choose another library for batches: cannot be known here."""
    return None


def _big_slice(on_device: OnDevice, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """mode: slices over 2048 elements go through thrust, which waits."""
    tensor = args[0]
    dim = _argument(args, kwargs, 1, "dim", -1)
    return bool(tensor.dim() > 0 and tensor.size(dim) > 2048)


CONDITIONS: dict[str, Condition] = {
    "no_range": _no_range,
    "device_value": _device_value,
    "same_shape": _same_shape,
    "no_output_size": _no_output_size,
    "not_bfloat16": _not_bfloat16,
    "sorting": _sorting,
    "checks_lengths": _checks_lengths,
    "big_slice": _big_slice,
    "sometimes": _batched,
}
