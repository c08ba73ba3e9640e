"""What is checked: a callable, the arguments of its successive calls, and how plain objects get onto the device."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ostinato.check.pretend.world import World
from ostinato.errors import UsageError

_MAX_DEPTH = 40
_MAX_OBJECTS = 200_000


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call. Tensors are static inputs, refreshed by ``copy_`` before a replay; Python numbers are
    host values that change from call to call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """A callable and its calls.

    Args:
        fn: the region that would be captured.
        calls: at least one; each a ``Call``, a tuple of positional arguments, or a mapping of keyword arguments.
        static: tensors besides the arguments that the host refreshes between replays, by name: the region must read
            each of them.
    """

    fn: Callable[..., Any]
    calls: tuple[Call, ...]
    static: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, fn: Callable[..., Any], calls: Sequence[Any], static: Mapping[str, torch.Tensor] | None = None
    ) -> Subject:
        """Make a subject from loosely written calls. Raises UsageError if there is none, or fn cannot be called."""
        if not callable(fn):
            raise UsageError(f"what should be checked is a {type(fn).__name__}, which cannot be called")
        made: list[Call] = []
        for call in calls:
            if isinstance(call, Call):
                made.append(call)
            elif isinstance(call, Mapping):
                made.append(Call((), dict(call)))
            elif isinstance(call, tuple | list):
                made.append(Call(tuple(call)))
            else:
                made.append(Call((call,)))
        if not made:
            raise UsageError("no argument sets: give at least one tuple of arguments")
        return cls(fn, tuple(made), dict(static or {}))


def adopt(world: World, subject: Subject) -> int:
    """Declare everything that a callable made before the pretence reaches to be on the device; returns how many.

    Arguments, parameters, buffers and tensors in attributes and closures are taken to be on the device. Free 0-dim
    tensors are left on the host: they are usually counters.
    """
    seen: dict[int, Any] = {}  # the objects too: a freed one's id is used again
    count = 0

    def put(tensor: torch.Tensor) -> None:
        nonlocal count
        if not world.on_device(tensor):
            world.put(tensor, world.current_device)
            count += 1

    def visit(value: Any, depth: int, is_free: bool) -> None:
        if id(value) in seen or depth > _MAX_DEPTH or len(seen) > _MAX_OBJECTS:
            return
        seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            if not is_free or value.dim() > 0 or isinstance(value, torch.nn.Parameter):
                put(value)
        elif isinstance(value, torch.nn.Module):
            for tensor in itertools.chain(value.parameters(), value.buffers()):
                put(tensor)
            for module in value.modules():
                for item in vars(module).values():
                    visit(item, depth + 1, is_free=True)
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item, depth + 1, is_free)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                visit(item, depth + 1, is_free)
        elif isinstance(value, functools.partial):
            visit((value.func, value.args, value.keywords), depth + 1, is_free)
        elif isinstance(value, types.MethodType):
            visit((value.__self__, value.__func__), depth + 1, is_free)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                visit(_cell_contents(cell), depth + 1, is_free=True)
            for name in value.__code__.co_names:
                item = value.__globals__.get(name)
                if isinstance(item, torch.Tensor | torch.nn.Module):
                    visit(item, depth + 1, is_free=True)
        elif not isinstance(value, type | types.ModuleType | str | bytes | int | float | torch.device | torch.dtype):
            for item in _attributes(value):
                visit(item, depth + 1, is_free)

    for call in subject.calls:
        visit((call.args, dict(call.kwargs)), 0, is_free=False)
    visit(dict(subject.static), 0, is_free=False)
    visit(subject.fn, 0, is_free=True)
    return count


def _attributes(value: Any) -> list[Any]:
    """What an object keeps, in its ``__dict__`` and in its slots."""
    found = list(value.__dict__.values()) if "__dict__" in dir(value) else []
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and name in dir(value):
                found.append(getattr(value, name, None))
    return found


def _cell_contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
