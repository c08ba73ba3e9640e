"""What a function does, operation by operation: the tensors it reads, the ones it makes, and where.

A dispatch mode sees every operation that goes through PyTorch's dispatcher, registered custom operations included. It
does not see a kernel that is launched past it: register such a kernel with ``torch.library``.
"""

from __future__ import annotations

import dataclasses
import linecache
import math
import os
import sys
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ostinato.graphs.rules import Violation, argument_tensors, violation_of

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@dataclasses.dataclass(frozen=True)
class Site:
    """A line of the user's code."""

    file: str
    line: int
    function: str

    @property
    def source(self) -> str:
        """The text of the line, where its file can be read."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        text = f" `{self.source}`" if self.source else ""
        return f"{self.file}:{self.line} in {self.function}{text}"


@dataclasses.dataclass(frozen=True)
class OpRecord:
    """One operation: its name, line, the host values it was given and the shapes of its tensors."""

    name: str
    site: Site | None
    host_values: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclasses.dataclass
class External:
    """A storage that the function uses and did not make. ``tensor`` keeps it alive."""

    tensor: torch.Tensor
    operation: str
    site: Site | None
    is_written: bool = False


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A storage that the function made, in bytes."""

    num_bytes: int
    site: Site | None
    reference: StorageWeakRef

    @property
    def is_alive(self) -> bool:
        """Whether anything still holds it."""
        return not self.reference.expired()  # type: ignore[no-untyped-call]  # torch leaves it untyped


class CaptureViolation(Exception):  # noqa: N818 - not an error of the user's tree: capture() turns it into one
    """Carries a violation out of the function under capture."""

    def __init__(self, violation: Violation, site: Site | None) -> None:
        super().__init__(violation.reason)
        self.violation, self.site = violation, site


class OpTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Records the operations of one call.

    ``enforce``: raise CaptureViolation before an operation that a capture does not survive; otherwise note it in
    ``violations``. ``keep_written``: storages that may be written (their ``_cdata``); any other external storage is
    copied before its first write, and :meth:`undo_writes` puts the copies back.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        enforce: bool = False,
        generators: frozenset[int] = frozenset(),
        keep_written: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.device, self.enforce, self.generators, self.keep_written = device, enforce, generators, keep_written
        self.records: list[OpRecord] = []
        self.externals: dict[int, External] = {}
        self.allocations: dict[int, Allocation] = {}
        self.violations: list[tuple[Violation, Site | None]] = []
        self.failed: OpRecord | None = None
        self._before_write: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, function: Callable[[], Any]) -> Any:
        """Calls ``function`` under the trace."""
        with self:
            return _run_user_function(function)

    def undo_writes(self) -> None:
        """Puts back what the call wrote into storages that it was not allowed to write."""
        for view, copy in self._before_write.values():
            view.copy_(copy)

    def undeclared_writes(self) -> list[External]:
        """External storages that were written and are not in ``keep_written``."""
        return [external for key, external in self.externals.items() if key in self._before_write]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        site = current_site()
        record = OpRecord(str(func), site, _host_values((args, kwargs), self.device), _shapes((args, kwargs)))
        violation = violation_of(func, args, kwargs, self.device, self.generators)
        if violation is not None:
            self.violations.append((violation, site))
            if self.enforce:
                raise CaptureViolation(violation, site)
        self._note_inputs(func, args, kwargs, record)
        try:
            result = func(*args, **kwargs)
        except Exception:
            self.failed = self.failed or record
            raise
        self.records.append(record)
        self._note_results(result, site)
        return result

    def _note_inputs(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], record: OpRecord) -> None:
        written = {id(tensor) for tensor in _written_tensors(func, args, kwargs)}
        for tensor in argument_tensors((args, kwargs)):
            key = storage_key(tensor)
            if key is None or self._is_born_here(key):
                continue
            external = self.externals.setdefault(key, External(tensor, record.name, record.site))
            if id(tensor) in written:
                if not external.is_written and key not in self.keep_written:
                    external.operation, external.site = record.name, record.site
                    if not self.enforce:
                        view = _whole_storage(tensor)
                        self._before_write[key] = (view, view.clone())
                external.is_written = True

    def _note_results(self, result: Any, site: Site | None) -> None:
        for tensor in argument_tensors(result):
            key = storage_key(tensor)
            if key is not None and key not in self.externals and not self._is_born_here(key):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self.allocations[key] = Allocation(storage.nbytes(), site, reference)

    def _is_born_here(self, key: int) -> bool:
        """A storage's address is handed out again once it is freed, so a dead one says nothing about a live one."""
        allocation = self.allocations.get(key)
        return allocation is not None and allocation.is_alive

    def is_born_here(self, tensor: torch.Tensor) -> bool:
        """Whether this call made the storage of ``tensor``."""
        key = storage_key(tensor)
        return key is not None and self._is_born_here(key)


def storage_key(tensor: torch.Tensor) -> int | None:
    """Identifies the storage of a strided tensor for as long as it lives; None where there is no storage to name."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    key: int = tensor.untyped_storage()._cdata
    return key


def frozen_difference(earlier: OpTrace, later: OpTrace) -> tuple[OpRecord, str] | None:
    """The first operation that got another host value or shape in ``later``, while both did the same operations.

    Returns the record in ``later`` and a description; None when they agree for as long as their operations do.
    """
    for before, after in zip(earlier.records, later.records, strict=False):
        if before.name != after.name or before.site != after.site:
            return None
        if before.host_values != after.host_values:
            was = _first_difference(before.host_values, after.host_values)
            return after, f"got the host value {was[0]!r} in one call and {was[1]!r} in the next"
        if before.shapes != after.shapes:
            was = _first_difference(before.shapes, after.shapes)
            return after, f"got a tensor of shape {list(was[0])} in one call and {list(was[1])} in the next"
    return None


def split_of(earlier: OpTrace, later: OpTrace) -> tuple[OpRecord | None, OpRecord | None] | None:
    """Where the two calls first did different operations: one record each (None where a call had ended), or None."""
    for before, after in zip(earlier.records, later.records, strict=False):
        if before.name != after.name or before.site != after.site:
            return before, after
    shorter = min(len(earlier.records), len(later.records))
    if len(earlier.records) == len(later.records):
        return None
    return next(iter(earlier.records[shorter:]), None), next(iter(later.records[shorter:]), None)


def current_site() -> Site | None:
    """The innermost line of the function under trace that is neither PyTorch's nor this package's.

    A function that is PyTorch's own all the way down (an ``nn.Module``) gives its innermost line there.
    """
    frame: FrameType | None = sys._getframe(1)
    inside_torch: FrameType | None = None
    while frame is not None and frame.f_code is not _run_user_function.__code__:
        file = frame.f_code.co_filename
        if not file.startswith(_HERE):
            if not file.startswith(_TORCH):
                return _site(frame, frame.f_lineno)
            if inside_torch is None and "_dispatch" not in file and not file.endswith("_ops.py"):
                inside_torch = frame
        frame = frame.f_back
    return _site(inside_torch, inside_torch.f_lineno) if inside_torch is not None else None


def error_site(trace: TracebackType | None) -> Site | None:
    """The innermost user line that an exception came through."""
    found: Site | None = None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((_HERE, _TORCH)):
            found = _site(trace.tb_frame, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _run_user_function(function: Callable[[], Any]) -> Any:
    """Marks in the stack where the user's code begins."""
    return function()


def _site(frame: FrameType, line: int) -> Site:
    return Site(frame.f_code.co_filename, line, frame.f_code.co_name)


def _whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _written_tensors(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    written: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written.extend(argument_tensors(value))
    return written


def _host_values(value: Any, device: torch.device) -> tuple[Any, ...]:
    """Everything in the arguments that a capture freezes: numbers, strings, zero-dimensional tensors of the host."""
    if isinstance(value, list | tuple):
        return tuple(item for part in value for item in _host_values(part, device))
    if isinstance(value, dict):
        return tuple(item for part in value.values() for item in _host_values(part, device))
    if isinstance(value, torch.Tensor):
        is_host_scalar = value.device.type == "cpu" and device.type != "cpu" and value.dim() == 0
        return (value.item(),) if is_host_scalar else ()
    if isinstance(value, bool | int | float | complex | str):
        # NaN differs from itself; its name does not.
        return (str(value),) if isinstance(value, float) and math.isnan(value) else (value,)
    return ()


def _shapes(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in argument_tensors(value))


def _first_difference(left: Sequence[Any], right: Sequence[Any]) -> tuple[Any, Any]:
    return next(((a, b) for a, b in zip(left, right, strict=False) if a != b), (left, right))
