"""Static buffers: tensors whose address, shape and dtype a captured graph has burnt in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Self

import torch

from ostinato.errors import CaptureError, StaleInputError

HostValue = bool | int | float | Sequence[Any]
Index = int | slice | EllipsisType | tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class TensorSignature:
    """What a graph knows of a tensor: replay is right only while all of it holds. ``address`` in bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr())

    def layout_difference(self, other: TensorSignature) -> str | None:
        """How ``other`` differs in shape, dtype or device, as ``shape [3] where the graph has [4]``, or None."""
        if other.shape != self.shape:
            return f"shape {list(other.shape)} where the graph has {list(self.shape)}"
        if other.dtype != self.dtype:
            return f"{other.dtype} where the graph has {self.dtype}"
        if other.device != self.device:
            return f"device {other.device} where the graph has {self.device}"
        return None

    def difference(self, other: TensorSignature) -> str | None:
        """As :meth:`layout_difference`, and strides and address too: whether ``other`` is the very same memory."""
        if (layout := self.layout_difference(other)) is not None:
            return layout
        if other.stride != self.stride:
            return f"strides {list(other.stride)} where the graph has {list(self.stride)}"
        if other.address != self.address:
            return f"address {other.address:#x} where the graph reads {self.address:#x}"
        return None


@dataclasses.dataclass(frozen=True)
class StaticBuffers:
    """Base of a frozen dataclass whose fields are all tensors with a fixed address, shape and dtype, on one device.

    Subclass it with ``@dataclass(frozen=True, eq=False)``. ``capture`` reads such buffers in place: write to them with
    :meth:`fill` from the host, and with :meth:`store` from inside the captured function. A field cannot be rebound;
    one rebound by force is found by :meth:`check`, which every capture and every checked replay calls.
    """

    def __post_init__(self) -> None:
        signatures = {}
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if not isinstance(tensor, torch.Tensor):
                raise CaptureError(
                    f"{self._label(field.name)} is {tensor!r}: every static buffer is a tensor; allocate it first"
                )
            signatures[field.name] = TensorSignature.of(tensor)
        devices = {signature.device for signature in signatures.values()}
        if len(devices) > 1:
            raise CaptureError(
                f"{type(self).__name__} spans {sorted(map(str, devices))}: static buffers of one step are on one device"
            )
        object.__setattr__(self, "_signatures", signatures)

    @classmethod
    def sharing(
        cls, source: StaticBuffers | Mapping[str, torch.Tensor], names: Iterable[str], **own: torch.Tensor
    ) -> Self:
        """A new set whose buffers ``names`` are the very tensors of ``source``, and whose others are ``own``.

        Raises CaptureError for a name that ``source`` or this class does not have, and for a field left without a
        tensor: a share that matches nothing never passes in silence.
        """
        available = source.tensors() if isinstance(source, StaticBuffers) else dict(source)
        fields = {field.name for field in dataclasses.fields(cls)}
        shared = dict(own)
        for name in names:
            if name not in available:
                raise CaptureError(f"cannot share {name!r}: the source has only {sorted(available)}")
            if name not in fields:
                raise CaptureError(f"cannot share {name!r}: {cls.__name__} has only {sorted(fields)}")
            if name in own:
                raise CaptureError(f"{cls.__name__}.{name} is both shared and given: choose one")
            shared[name] = available[name]
        if missing := sorted(fields - shared.keys()):
            raise CaptureError(f"{cls.__name__} is left without {missing}: share them or give them")
        if unknown := sorted(shared.keys() - fields):
            raise CaptureError(f"{cls.__name__} has no buffer {unknown}: it has {sorted(fields)}")
        return cls(**shared)

    @property
    def device(self) -> torch.device:
        """The one device that all buffers are on."""
        return next(iter(self.signatures.values())).device

    @property
    def signatures(self) -> dict[str, TensorSignature]:
        """What each buffer was when this set was made, by name."""
        signatures: dict[str, TensorSignature] = object.__getattribute__(self, "_signatures")
        return signatures

    def tensors(self) -> dict[str, torch.Tensor]:
        """The buffers by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def check(self) -> None:
        """Raises StaleInputError when a buffer is no longer the tensor that it was."""
        for name, signature in self.signatures.items():
            tensor = getattr(self, name)
            if not isinstance(tensor, torch.Tensor):
                raise StaleInputError(
                    f"{self._label(name)} was overwritten with {tensor!r}: buffers are filled, never rebound"
                )
            if (difference := signature.difference(TensorSignature.of(tensor))) is not None:
                raise StaleInputError(f"{self._label(name)} was rebound: {difference}; use fill() or store()")

    def fill(self, name: str, value: torch.Tensor | HostValue, *, index: Index = ...) -> None:
        """Writes ``value`` into buffer ``name`` (or into ``buffer[index]``) without waiting for the device.

        A tensor must have exactly the shape and dtype of what it replaces; one on the host goes through pinned staging.
        A number is written to every element. Numbers and lists must suit the dtype: a fraction for an integer buffer is
        refused. The copy runs on the current stream of the buffer's device. Raises StaleInputError, and CaptureError
        inside a capture, where the value would be frozen.
        """
        whole = self._buffer(name)
        if whole.is_cuda and torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                f"fill({name!r}) inside a capture would freeze the host's value: fill before the replay, and use "
                f"store({name!r}, tensor) inside the captured function"
            )
        target = whole[index]
        if isinstance(value, bool | int | float):
            self._check_numbers(name, target, [value])
            target.fill_(value)
            return
        if not isinstance(value, torch.Tensor):
            self._check_numbers(name, target, value)
            value = torch.tensor(value, dtype=target.dtype)
        self._check_layout(name, target, value)
        if whole.is_cuda and value.device.type == "cpu" and not value.is_pinned():
            # The pinned block goes back to PyTorch's host cache, which hands it out again only after this copy.
            value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
        target.copy_(value, non_blocking=True)

    def store(self, name: str, value: torch.Tensor) -> None:
        """Copies a device tensor into buffer ``name``, for use inside a captured function.

        Shape, dtype and device must be equal: nothing is broadcast, narrowed or cast. Raises StaleInputError.
        """
        target = self._buffer(name)
        self._check_layout(name, target, value)
        if value.device != target.device:
            raise StaleInputError(f"{self._label(name)} is on {target.device} and the value on {value.device}")
        target.copy_(value)

    def _buffer(self, name: str) -> torch.Tensor:
        if name not in self.signatures:
            raise CaptureError(f"{type(self).__name__} has no buffer {name!r}: it has {sorted(self.signatures)}")
        tensor = getattr(self, name)
        if not isinstance(tensor, torch.Tensor) or tensor.data_ptr() != self.signatures[name].address:
            self.check()
        buffer: torch.Tensor = tensor
        return buffer

    def _check_layout(self, name: str, target: torch.Tensor, value: torch.Tensor) -> None:
        if value.shape != target.shape:
            raise StaleInputError(
                f"{self._label(name)} takes shape {list(target.shape)}, not {list(value.shape)}: nothing is broadcast"
            )
        if value.dtype != target.dtype:
            raise StaleInputError(f"{self._label(name)} takes {target.dtype}, not {value.dtype}: cast it first")

    def _check_numbers(self, name: str, target: torch.Tensor, value: Any) -> None:
        """A fraction in an integer buffer, or a number in a boolean one, would be cut off in silence."""
        if isinstance(value, Sequence):
            for item in value:
                self._check_numbers(name, target, item)
            return
        fits = isinstance(value, bool) or target.is_floating_point() or target.is_complex()
        if not fits and not (isinstance(value, int) and target.dtype != torch.bool):
            raise StaleInputError(f"{self._label(name)} takes {target.dtype}, not the number {value!r}")

    def _label(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"


def check_outputs(
    declared: Sequence[tuple[str, torch.Tensor]], returned: Sequence[tuple[str, torch.Tensor]], label: str
) -> None:
    """Raises CaptureError unless every returned tensor has a declared buffer of its shape, dtype and device.

    A kernel that writes a wider result than its buffer corrupts what lies behind it, and the error surfaces elsewhere.
    """
    if len(declared) != len(returned):
        raise CaptureError(f"{label} returns {len(returned)} tensors and has {len(declared)} output buffers")
    for (where, buffer), (_, tensor) in zip(declared, returned, strict=True):
        difference = TensorSignature.of(buffer).layout_difference(TensorSignature.of(tensor))
        if difference is not None:
            difference = difference.replace("where the graph has", "for a buffer of")
            raise CaptureError(f"{label}: {where} would be written with {difference}; give it a buffer of that size")
