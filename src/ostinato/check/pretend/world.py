"""The pretended device: which storages are on it, what the region is, and what was found in it.

Tensors stay plain CPU tensors with real data. What is on the device is a property of *storages*, so that views,
detached aliases and ``nn.Parameter`` inherit it; a weak reference keeps a storage's address from being used again
while its entry lives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ostinato.check.finding import NOWHERE, Certainty, Finding, Frame, Severity
from ostinato.check.frames import user_stack
from ostinato.check.op_table import OpTable
from ostinato.check.pretend.storage import StorageRef
from ostinato.check.rules import RULES

if TYPE_CHECKING:
    from ostinato.check.record import Recorder

_SWEEP_EVERY = 8192


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that is pretended. ``arch`` is the compute capability; ``num_devices`` how many are visible."""

    arch: tuple[int, int] = (9, 0)
    num_devices: int = 2
    name: str = "Ostinato pretended GPU"

    def assumed(self, torch_version: str) -> tuple[str, ...]:
        """What a finding takes for granted, for the report."""
        return (f"torch {torch_version}", f"sm_{self.arch[0]}{self.arch[1]}")


@dataclass(slots=True)
class StorageEntry:
    """What is known of one storage. ``device`` None is the host; ``born_call`` is the call of the region that made it,
    -1 outside of every region."""

    ref: StorageRef
    serial: int
    device: torch.device | None
    pinned: bool = False
    born_call: int = -1
    from_inputs: bool = False
    written_call: int = -1
    born_at: Frame = NOWHERE


@dataclass(frozen=True, slots=True)
class Placing:
    """Where a factory puts its result. ``explicit``: the code named the device."""

    device: torch.device | None
    explicit: bool


UNPLACED = Placing(None, explicit=False)


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor below functorch's wrappers (vmap, grad), which have no storage of their own."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def storage_key(tensor: torch.Tensor) -> int | None:
    """The address of the tensor's StorageImpl; None for layouts without one (sparse, mkldnn)."""
    tensor = unwrapped(tensor)
    if tensor.layout != torch.strided:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _run_plainly(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


class World:
    """State of one pretence. Not thread-safe: the checked code runs in one thread."""

    def __init__(self, target: Gpu, table: OpTable, *, is_meta: bool = False) -> None:
        self.target = target
        self.table = table
        self.is_meta = is_meta
        self.current_index = 0
        self.placing: list[Placing] = []
        self.findings: dict[tuple[str, str, int, str], Finding] = {}
        self.counts: dict[tuple[str, str, int, str], dict[int, int]] = {}
        self.recorder: Recorder | None = None
        self.region_depth = 0
        self.region_device: torch.device | None = None
        self.num_regions = 0
        self.call = 0
        self.muted = 0
        self.quiet = 0
        self.opaque_ops: dict[str, int] = {}
        self.observers: list[Callable[[str], None]] = []
        self.graph_class: Any = None
        self.run_op: Callable[..., Any] = _run_plainly
        self._storages: dict[int, StorageEntry] = {}
        self._no_storage: dict[int, torch.device] = {}
        self._next_serial = 0

    # ------------------------------------------------------------------ where things are
    @property
    def current_device(self) -> torch.device:
        """What ``torch.device('cuda')`` without an index means now."""
        return torch.device("cuda", self.current_index)

    def entry(self, tensor: torch.Tensor) -> StorageEntry:
        """The entry of the tensor's storage, made (on the host) if it was not known."""
        key = storage_key(tensor)
        if key is None:
            device = self._no_storage.get(id(unwrapped(tensor)))
            return StorageEntry(StorageRef(torch.empty(0)), -1, device)
        found = self._storages.get(key)
        if found is None or found.ref.is_dead:
            found = StorageEntry(StorageRef(unwrapped(tensor)), self._next_serial, None)
            self._storages[key] = found
            self._next_serial += 1
            if self._next_serial % _SWEEP_EVERY == 0:
                self._storages = {k: e for k, e in self._storages.items() if not e.ref.is_dead}
        return found

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage has an entry already."""
        key = storage_key(tensor)
        if key is None:
            return id(unwrapped(tensor)) in self._no_storage
        found = self._storages.get(key)
        return found is not None and not found.ref.is_dead

    def device_of(self, tensor: torch.Tensor) -> torch.device | None:
        """The pretended device of a tensor; None for the host."""
        key = storage_key(tensor)
        if key is None:
            return self._no_storage.get(id(unwrapped(tensor)))
        found = self._storages.get(key)
        return None if found is None or found.ref.is_dead else found.device

    def has_storage_on_device(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage pretends to be on a GPU."""
        found = self._storages.get(int(storage._cdata))
        return found is not None and not found.ref.is_dead and found.device is not None

    def on_device(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor pretends to be on a GPU."""
        return self.device_of(tensor) is not None

    def put(self, tensor: torch.Tensor, device: torch.device | None, *, pinned: bool = False) -> torch.Tensor:
        """Declare where the tensor's storage is, and return the tensor."""
        if storage_key(tensor) is None:
            if device is not None:
                self._no_storage[id(unwrapped(tensor))] = device
            else:
                self._no_storage.pop(id(unwrapped(tensor)), None)
            return tensor
        entry = self.entry(tensor)
        entry.device, entry.pinned = device, pinned
        if self.region_depth and not self.muted and entry.born_call < 0:
            entry.born_call = self.call
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor was made in page-locked memory."""
        return self.knows(tensor) and self.entry(tensor).pinned

    # ------------------------------------------------------------------ the region
    @property
    def in_region(self) -> bool:
        """Whether a capture would be under way."""
        return self.region_depth > 0

    @property
    def watching(self) -> bool:
        """Whether operations are classified now."""
        return self.region_depth > 0 and not self.muted

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """What would be captured. The current device at its start is the device whose stream captures."""
        outermost = self.region_depth == 0
        if outermost:
            self.num_regions += 1
            self.region_device = self.current_device
            self.tell("begin")
        self.region_depth += 1
        try:
            yield
        finally:
            if outermost:
                self.tell("end")
            self.region_depth -= 1

    def tell(self, event: str) -> None:
        """Tell those who watch (streams) that a region begins or ends."""
        for observer in self.observers:
            observer(event)

    @contextlib.contextmanager
    def mute(self) -> Iterator[None]:
        """Neither classify nor record nor place: the checker's own tensor work."""
        self.muted += 1
        try:
            yield
        finally:
            self.muted -= 1

    @contextlib.contextmanager
    def hush(self) -> Iterator[None]:
        """Record and place, but report nothing: checks that only the CPU makes."""
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    @contextlib.contextmanager
    def placed(self, placing: Placing) -> Iterator[None]:
        """Factories without a device of their own put their results there."""
        self.placing.append(placing)
        try:
            yield
        finally:
            self.placing.pop()

    # ------------------------------------------------------------------ findings
    def report(
        self,
        rule: str,
        severity: Severity,
        message: str,
        op: str,
        *,
        certainty: Certainty = Certainty.PROVED,
        stack: tuple[Frame, ...] | None = None,
        found_by: str = "",
    ) -> None:
        """Record a finding at the user's line; the same one again only counts."""
        if not self.region_depth or self.muted or self.quiet:
            return
        stack = user_stack() if stack is None else stack
        where = stack[0] if stack else NOWHERE
        key = (rule, where.file, where.line, op)
        per_call = self.counts.setdefault(key, {})
        per_call[self.call] = per_call.get(self.call, 0) + 1
        if key in self.findings:
            return
        if self.is_meta and certainty is Certainty.PROVED:
            certainty = Certainty.LIKELY
        self.findings[key] = Finding(
            rule=RULES[rule],
            severity=severity,
            certainty=certainty,
            message=message,
            op=op,
            where=where,
            found_by=found_by or ("meta" if self.is_meta else "pretend"),
            stack=stack,
            assumed=self.target.assumed(self.table.version),
        )

    def counted(self) -> list[tuple[Finding, dict[int, int]]]:
        """Every finding with its count (the most in one call), and how often it happened in each call."""
        return [
            (replace(f, count=max(self.counts[k].values())), dict(self.counts[k])) for k, f in self.findings.items()
        ]

    def normalise(self, device: Any) -> torch.device | None:
        """A device argument as a ``torch.device`` with an index where it is a GPU. None stays None."""
        if device is None:
            return None
        if isinstance(device, int):
            return torch.device("cuda", device)
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            return self.current_device
        return found
