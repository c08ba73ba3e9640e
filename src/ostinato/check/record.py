"""The operations of one call of the region, in a form in which two calls can be compared, and replayed.

A tensor is named by its role: an argument, an external storage (made outside the call), or the n-th temporary. So the
same step on other tensors gives the same record, and a difference is something that a replay would not follow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from ostinato.check.finding import Frame
from ostinato.check.frames import user_frame
from ostinato.check.pretend.classify import op_base
from ostinato.check.pretend.flatten import leaves
from ostinato.check.pretend.world import StorageEntry, World

Name = tuple[str, int]
_MAX_HOST_VALUES = 64
_UNINITIALISED = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
#: Their results depend on the operands' shapes alone, not on their values.
_VALUE_FREE = _UNINITIALISED | {
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones",
    "new_full",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorOperand:
    """A device tensor as an operand: which storage by role, and which part of it."""

    name: Name
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class HostOperand:
    """A host tensor as an operand: the graph keeps its value. ``value`` is its numbers (at most 64) or their hash."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Any


@dataclass(frozen=True, slots=True)
class Operation:
    """One recorded call. ``reads`` and ``writes`` are the storages by role."""

    name: str
    operands: tuple[Any, ...]
    where: Frame
    reads: tuple[Name, ...]
    writes: tuple[Name, ...]


@dataclass(slots=True)
class TapeOp:
    """One call that a replay repeats, over the tensors of the capture."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor]
    where: Frame
    is_uninitialised: bool = False


@dataclass(slots=True)
class External:
    """A storage from outside the call: what reads it first, and (for a replay) its bytes before the call."""

    entry: StorageEntry
    first_read: Frame
    shape: tuple[int, ...]
    dtype: torch.dtype
    alias: torch.Tensor | None = None
    before: torch.Tensor | None = None


class Recorder:
    """Records one call.

    Args:
        world: the pretence.
        arguments: the tensors that are static inputs, in a fixed order.
        keep: keep the tensors too, for a replay; costs the memory of every intermediate result.
    """

    def __init__(self, world: World, arguments: Sequence[torch.Tensor] = (), *, keep: bool = False) -> None:
        self.world = world
        self.keep = keep
        self.operations: list[Operation] = []
        self.tape: list[TapeOp] = []
        self.externals: dict[int, External] = {}
        self.born: dict[int, torch.Tensor] = {}
        self.used_arguments: set[int] = set()
        self.num_arguments = len(arguments)
        self._names: dict[int, Name] = {}
        self._num_temporaries = 0
        self._pending: tuple[tuple[Any, ...], tuple[Name, ...], Any, Any] | None = None
        self._aliases: list[torch.Tensor] = []
        for index, tensor in enumerate(arguments):
            self._names.setdefault(world.entry(tensor).serial, ("arg", index))
            if keep:
                self._remember(world.entry(tensor), tensor, first_read=Frame("?", 0, "?"))

    # ------------------------------------------------------------------ names
    def _remember(self, entry: StorageEntry, tensor: torch.Tensor, first_read: Frame) -> External:
        external = External(entry, first_read, tuple(tensor.shape), tensor.dtype)
        self.externals[entry.serial] = external
        if self.keep and entry.device is not None and tensor.layout == torch.strided:
            with self.world.mute(), torch.no_grad():
                storage = tensor.untyped_storage()
                external.alias = torch.empty(0, dtype=torch.uint8).set_(storage)
                external.before = external.alias.clone()
        return external

    def _name(self, tensor: torch.Tensor) -> Name:
        entry = self.world.entry(tensor)
        name = self._names.get(entry.serial)
        if name is None:
            if entry.born_call == self.world.call:
                name = self._new_temporary(tensor)
            else:
                name = ("ext", entry.serial)
                self._remember(entry, tensor, user_frame())
            self._names[entry.serial] = name
        if name[0] == "arg":
            self.used_arguments.add(name[1])
        return name

    def _new_temporary(self, tensor: torch.Tensor) -> Name:
        self._num_temporaries += 1
        if self.keep and tensor.layout == torch.strided:
            with self.world.mute():
                self.born[self.world.entry(tensor).serial] = tensor.detach()
        return ("tmp", self._num_temporaries)

    # ------------------------------------------------------------------ operands
    def _host_value(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, FakeTensor):
            constant = tensor.constant
            if constant is None:
                entry = self.world.entry(tensor)
                changes = entry.written_call == self.world.call != entry.born_call
                return ("written in call", self.world.call) if changes else "no data"
            tensor = constant
        with self.world.mute(), torch._C._DisableTorchDispatch():
            plain = tensor.detach().contiguous()
            if plain.numel() <= _MAX_HOST_VALUES:
                return tuple(plain.flatten().tolist())
            return hash(ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()))

    def _operand(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if self.world.on_device(leaf):
                strided = leaf.layout == torch.strided
                return TensorOperand(
                    self._name(leaf),
                    tuple(leaf.shape),
                    tuple(leaf.stride()) if strided else (),
                    int(leaf.storage_offset()) if strided else 0,
                    leaf.dtype,
                )
            return HostOperand(tuple(leaf.shape), leaf.dtype, self._host_value(leaf))
        if isinstance(leaf, int | float | complex | bool | str | torch.dtype | torch.device | type(None)):
            return leaf
        return type(leaf).__name__

    def _frozen(self, func: Any, leaf: Any, is_reread: bool) -> Any:
        """An operand as the graph keeps it: device tensors by address, host tensors by value."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        with self.world.mute():
            if self.world.on_device(leaf) or is_reread:
                alias = leaf.detach()
                self._aliases.append(alias)
                return alias
            return leaf.detach().clone()

    # ------------------------------------------------------------------ the dispatcher's hooks
    def before(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: list[torch.Tensor]
    ) -> None:
        """Called before the operation runs: host values are read now, and state is saved."""
        operands = tuple(self._operand(leaf) for leaf in leaves((args, dict(kwargs))))
        reads = tuple(o.name for o in operands if isinstance(o, TensorOperand))
        frozen_args: Any = ()
        frozen_kwargs: Any = {}
        if self.keep:
            is_reread = op_base(func) == "copy_" and bool(inputs) and self.world.on_device(inputs[0])
            frozen_args = tree_map(lambda x: self._frozen(func, x, is_reread), args)
            frozen_kwargs = tree_map(lambda x: self._frozen(func, x, is_reread), dict(kwargs))
        self._pending = (operands, reads, frozen_args, frozen_kwargs)

    def after(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        result: Any,
    ) -> None:
        """Called when the operation has run."""
        if self._pending is None:
            return
        operands, reads, frozen_args, frozen_kwargs = self._pending
        self._pending = None
        world = self.world
        if not reads and not any(world.on_device(o) for o in outputs):
            for entry in _written(world, func, args, kwargs):
                entry.written_call = world.call
            return
        writes = tuple(self._name(o) for o in outputs if world.on_device(o))
        where = user_frame()
        self._follow(func, args, kwargs, inputs, outputs, where)
        base = op_base(func)
        if base not in ("lift_fresh", "detach", "alias"):
            self.operations.append(Operation(str(func), operands, where, reads, writes))
        if self.keep:
            with world.mute():
                kept = [o.detach() if o.layout == torch.strided else o for o in outputs]
            self._aliases.extend(kept)
            self.tape.append(TapeOp(func, frozen_args, frozen_kwargs, kept, where, base in _UNINITIALISED))

    def transfer(self, op: str, source: torch.Tensor, target: torch.Tensor) -> None:
        """A copy between host and device that did not pass the dispatcher."""
        if not self.world.on_device(target):
            if self.world.on_device(source):
                self._name(source)
            return
        operand = "pinned" if self.world.is_pinned(source) else self._operand(source)
        name = self._name(target)
        self.operations.append(Operation(op, (operand, tuple(target.shape)), user_frame(), (), (name,)))
        if self.keep:
            with self.world.mute():
                pair = (target.detach(), source.detach())
            self._aliases.append(pair[0])
            self.tape.append(TapeOp(torch.ops.aten.copy_.default, pair, {}, [pair[0]], user_frame()))

    def _follow(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        where: Frame,
    ) -> None:
        """What comes from the values of the arguments, and which storages are written."""
        world = self.world
        entries = [world.entry(t) for t in inputs]
        derived = op_base(func) not in _VALUE_FREE and any(
            e.from_inputs or self._names.get(e.serial, ("", 0))[0] == "arg" for e in entries
        )
        for entry in _written(world, func, args, kwargs):
            entry.written_call = world.call
            entry.from_inputs = entry.from_inputs or derived
        for output in outputs:
            entry = world.entry(output)
            if entry.born_call == world.call and entry.born_at.line == 0:
                entry.from_inputs, entry.born_at = derived, where

    def argument_names(self, num_static: int, static_names: Sequence[str]) -> list[tuple[str, bool]]:
        """For each static input its name, and whether it was declared by name (those stand last)."""
        num_plain = self.num_arguments - num_static
        return [(f"argument {i}", False) for i in range(num_plain)] + [(name, True) for name in static_names]


def _written(
    world: World, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[StorageEntry]:
    found: list[StorageEntry] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found.extend(world.entry(t) for t in leaves(value) if isinstance(t, torch.Tensor))
    return found
