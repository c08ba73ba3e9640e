"""The tape pass: capture and replay, emulated on the CPU.

A recorded call is run again, operation by operation, over the tensors of the capture, as a graph would: arguments are
copied into the static inputs, host values stay as they were, every temporary is filled with 0xFF bytes before. Its
outputs and the state that it leaves are compared with an eager call on the same arguments and state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ostinato.check.finding import Frame
from ostinato.check.pretend.world import World, storage_key
from ostinato.check.record import External, Recorder
from ostinato.errors import CheckError
from ostinato.graphs.verify import Mismatch, compare_outputs, poison_

_SHAPE_CHANGED = "the operation gives shape {new} at replay and gave {old} at capture"


@dataclass(frozen=True, slots=True)
class TapeMismatch:
    """A replay that is not what eager computed. ``where`` is the first operation whose result differs, if known."""

    call: int
    message: str
    where: Frame | None


def output_tensors(result: Any) -> list[torch.Tensor]:
    """The tensors that a call returned, also inside of objects that keep them in ``__dict__`` (model outputs)."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, dict | list | tuple):
            found.extend(output_tensors(list(leaf.values()) if isinstance(leaf, dict) else list(leaf)))
    return found


class Tape:
    """A captured call that can be replayed. Made from a recorder with ``keep=True`` and what the call returned."""

    def __init__(self, world: World, recorder: Recorder, arguments: Sequence[torch.Tensor], result: Any) -> None:
        if not recorder.keep:
            raise CheckError("a tape needs a recorder that keeps its tensors")
        self.world = world
        self.recorder = recorder
        self.arguments = list(arguments)
        with world.mute():
            self.outputs = [t.detach() for t in output_tensors(result)]

    @property
    def state(self) -> list[External]:
        """The device storages from outside the call that it read or wrote, static inputs included."""
        return [e for e in self.recorder.externals.values() if e.alias is not None]

    def restore(self) -> None:
        """Undo what the call wrote: a real capture computes nothing."""
        with self.world.mute(), torch.no_grad():
            for external in self.state:
                _write(external.alias, external.before)

    def save(self) -> list[torch.Tensor]:
        """The bytes of the state now."""
        with self.world.mute():
            return [e.alias.clone() for e in self.state if e.alias is not None]

    def load(self, saved: Sequence[torch.Tensor]) -> None:
        """Write saved bytes back."""
        with self.world.mute(), torch.no_grad():
            for external, bytes_before in zip(self.state, saved, strict=True):
                _write(external.alias, bytes_before)

    def fill_inputs(self, values: Sequence[torch.Tensor]) -> None:
        """Copy fresh arguments into the static inputs, as ``copy_`` before a replay does."""
        with self.world.mute(), torch.no_grad():
            for static, value in zip(self.arguments, values, strict=True):
                if static.shape == value.shape and self.world.on_device(static):
                    static.detach().copy_(value.detach())

    def poison(self) -> None:
        """Fill every temporary of the capture with 0xFF bytes."""
        with self.world.mute(), torch.no_grad():
            for tensor in self.recorder.born.values():
                if self.world.on_device(tensor) and tensor.untyped_storage().nbytes():
                    poison_(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))

    def replay(self) -> None:
        """Run every operation again, over the tensors of the capture.

        Raises CheckError if an operation cannot repeat what it did, for instance with another shape.
        """
        self.poison()
        with self.world.mute(), torch.inference_mode():
            for op in self.recorder.tape:
                if op.is_uninitialised:
                    continue
                try:
                    result = self.world.run_op(op.func, op.args, op.kwargs)
                except (RuntimeError, IndexError, ValueError, NotImplementedError) as error:
                    raise CheckError(
                        f"{op.func} fails at replay ({_one_line(error)}): {op.where.file}:{op.where.line}"
                    ) from error
                fresh = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
                for kept, new in zip(op.outputs, fresh, strict=False):
                    if storage_key(kept) == storage_key(new):
                        continue
                    if kept.shape != new.shape:
                        text = _SHAPE_CHANGED.format(new=list(new.shape), old=list(kept.shape))
                        raise CheckError(f"{text}: {op.where.file}:{op.where.line}")
                    kept.copy_(new)

    def freed(self) -> list[External]:
        """Storages from outside that nobody but this tape keeps alive."""
        with self.world.mute():
            unseen = _unseen_owners()
        own: dict[int, int] = {}
        for alias in self.recorder._aliases:
            key = storage_key(alias)
            if key is not None:
                own[key] = own.get(key, 0) + 1
        found: list[External] = []
        for external in self.state:
            assert external.alias is not None
            key = storage_key(external.alias)
            if key is None or external.first_read.line == 0:
                continue
            if torch._C._storage_Use_Count(key) <= own.get(key, 0) + 1 + unseen:
                found.append(external)
        return found


def _unseen_owners() -> int:
    """How many owners PyTorch counts for a storage besides its tensors (its Python object is one)."""
    tensor = torch.empty(4, dtype=torch.uint8)
    alias = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return int(torch._C._storage_Use_Count(alias.untyped_storage()._cdata)) - 2


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _write(alias: torch.Tensor | None, value: torch.Tensor | None) -> None:
    if alias is not None and value is not None and alias.untyped_storage().nbytes() >= value.numel():
        torch.empty(0, dtype=torch.uint8).set_(alias.untyped_storage())[: value.numel()].copy_(value)


def compare_with_eager(
    tape: Tape,
    eager_result: Any,
    state_before: Sequence[torch.Tensor],
    arguments: Sequence[torch.Tensor],
    call: int,
    seed: int,
) -> TapeMismatch | None:
    """Replay on the arguments and the state that an eager call had, and compare outputs and the state left behind.

    The state is left as eager left it. ``seed`` is what the default generator was seeded with before the eager call.
    """
    world = tape.world
    with world.mute():
        expected = [t.detach().clone() for t in output_tensors(eager_result)]
    expected_state = tape.save()
    tape.load(state_before)
    tape.fill_inputs(arguments)
    torch.default_generator.manual_seed(seed)
    problem: str | None = None
    try:
        tape.replay()
    except CheckError as error:
        problem = str(error)
    if problem is None:
        with world.mute():
            mismatch = compare_outputs(expected, tape.outputs)
            if mismatch is None:
                mismatch = _compare_state(tape, expected_state)
            problem = None if mismatch is None else str(mismatch)
    tape.load(expected_state)
    return None if problem is None else TapeMismatch(call, problem, None)


def _compare_state(tape: Tape, expected: Sequence[torch.Tensor]) -> Mismatch | None:
    """Compare the bytes of what the call writes, static inputs left out."""
    inputs = {storage_key(a) for a in tape.arguments}
    for want, external in zip(expected, tape.state, strict=True):
        alias = external.alias
        if alias is None or external.entry.written_call < 0 or storage_key(alias) in inputs:
            continue
        whole = torch.empty(0, dtype=torch.uint8).set_(alias.untyped_storage())
        mismatch = compare_outputs(_as_numbers(want, external), _as_numbers(whole, external), path="state")
        if mismatch is not None:
            return mismatch
    return None


def _as_numbers(raw: torch.Tensor, external: External) -> torch.Tensor:
    return raw.view(external.dtype) if raw.numel() % external.dtype.itemsize == 0 else raw


def cloned(world: World, arguments: Any) -> Any:
    """The arguments with every tensor replaced by a copy in the same place."""

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        device, pinned = world.device_of(leaf), world.is_pinned(leaf)
        with world.mute():
            made = leaf.detach().clone()
        world.put(made, device, pinned=pinned)
        return made.requires_grad_(leaf.requires_grad)

    return tree_map(clone, arguments)
