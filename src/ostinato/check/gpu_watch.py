"""Watching one eager call on a real GPU: every wait of the host, with its line and the operation in flight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.cuda._gpu_trace as gpu_trace
from torch.utils._python_dispatch import TorchDispatchMode

from ostinato.check.finding import NOWHERE, Certainty, Finding, Frame, Severity
from ostinato.check.frames import caller_is_user, user_stack
from ostinato.check.op_table import load_table
from ostinato.check.pretend.flatten import tensors
from ostinato.check.rules import RULES

_MESSAGES = {
    "device": "the host waits for the device",
    "stream": "the host waits for a stream",
    "event": "the host waits for an event",
}


class Watcher(Protocol):
    """Who wants to know that the host waits."""

    def host_waits(self, kind: str) -> None:
        """The host waits now; ``kind`` is ``device``, ``stream`` or ``event``."""


class HostWaits:
    """Hands synchronisations to whoever watches now. Callbacks cannot be taken back: they are registered once."""

    watcher: ClassVar[Watcher | None] = None
    _is_registered: ClassVar[bool] = False

    @classmethod
    def register(cls) -> None:
        """Register the callbacks, the first time."""
        if cls._is_registered:
            return
        cls._is_registered = True
        torch._C._activate_gpu_trace()
        gpu_trace.register_callback_for_device_synchronization(lambda *_: cls._tell("device"))
        gpu_trace.register_callback_for_stream_synchronization(lambda *_: cls._tell("stream"))
        gpu_trace.register_callback_for_event_synchronization(lambda *_: cls._tell("event"))

    @classmethod
    def _tell(cls, kind: str) -> None:
        if cls.watcher is not None:
            cls.watcher.host_waits(kind)


def finding(
    rule: str, severity: Severity, message: str, op: str, stack: Sequence[Frame], assumed: tuple[str, ...] = ()
) -> Finding:
    """A finding that the GPU proved."""
    where = stack[0] if stack else NOWHERE
    return Finding(RULES[rule], severity, Certainty.PROVED, message, op, where, "gpu", tuple(stack), assumed=assumed)


def gpu_assumptions() -> tuple[str, ...]:
    """What GPU findings hold for: torch version, architecture, device name."""
    major, minor = torch.cuda.get_device_capability()
    return (f"torch {torch.__version__}", f"sm_{major}{minor}", torch.cuda.get_device_name())


class GpuWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Context manager around an eager call. ``findings`` has what would stop a capture, ``op_calls`` how many
    operations ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.findings: dict[tuple[str, str, int], Finding] = {}
        self.op_calls = 0
        self._current: tuple[Any, tuple[Any, ...], Mapping[str, Any]] | None = None
        self._table = load_table()
        self._assumed = gpu_assumptions()
        self._warned = warnings.catch_warnings(record=True)
        self._warnings: list[Any] = []
        self._manual_seed = torch.manual_seed

    def __enter__(self) -> GpuWatch:
        """Begin to watch; sync-debug warnings are the fallback for waits that the trace does not tell."""
        HostWaits.register()
        torch.cuda.synchronize()
        self._warnings = self._warned.__enter__() or []
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        HostWaits.watcher = self
        torch.manual_seed = self._seed
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop, and add what only the warnings told."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        HostWaits.watcher = None
        torch.manual_seed = self._manual_seed
        torch.cuda.set_sync_debug_mode("default")
        self._warned.__exit__(*error)
        told = [w for w in self._warnings if "synchronizing" in str(w.message)]
        if told and not self.findings:
            place = (Frame(told[0].filename, told[0].lineno, ""),)
            self._add(
                "D2H_SYNC", Severity.ERROR, "PyTorch warns of a synchronising operation", "sync_debug_mode", place
            )

    def _add(self, rule: str, severity: Severity, message: str, op: str, stack: Sequence[Frame]) -> None:
        found = finding(rule, severity, message, op, stack, self._assumed)
        self.findings.setdefault((rule, found.where.file, found.where.line), found)

    def _seed(self, seed: int) -> torch.Generator:
        if caller_is_user():
            text = "seeding in a capture: refused, or ignored if the seed is the current one"
            self._add("RNG_SEED", Severity.HAZARD, text, "torch.manual_seed", user_stack())
        return self._manual_seed(seed)

    def host_waits(self, kind: str) -> None:
        """The host synchronises now."""
        stack = user_stack()
        if self._current is None:
            self._add("STREAM_SYNC", Severity.ERROR, _MESSAGES[kind], f"{kind} synchronize", stack)
            return
        func, args, kwargs = self._current
        rule, message = self._cause(func, args, kwargs)
        self._add(rule, Severity.ERROR, message, str(func), stack)

    def _cause(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str]:
        effect = self._table.effects.get(str(func))
        if effect is not None:
            return effect.rule, effect.why
        base = func._schema.name.split("::")[-1]
        if base in ("copy_", "_to_copy"):
            source = args[1] if base == "copy_" else args[0]
            if not source.is_cuda:
                pinned = source.is_pinned()
                return ("H2D_BLOCKING" if pinned else "H2D_PAGEABLE"), "a copy from the host waits for the stream"
            return "D2H_SYNC", "a copy from the device to the host waits for the stream"
        if base.startswith(("index", "_index_put")):
            masks = [t for t in tensors((args, dict(kwargs))) if t.dtype in (torch.bool, torch.uint8)]
            rule = "DYNAMIC_SHAPE" if masks else "H2D_PAGEABLE"
            return rule, "indexing waits: a mask calls nonzero, a host index is copied to the device"
        return "D2H_SYNC", "this operation makes the host wait"

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation with its name known; ``types`` is unused."""
        kwargs = dict(kwargs or {})
        self._current = (func, args, kwargs)
        self.op_calls += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self._current = None
        self._look_at_copy(func, args, kwargs, result)
        return result

    def _look_at_copy(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Copies that do not wait, and still cannot be captured, or are read again by every replay."""
        base = func._schema.name.split("::")[-1]
        if base not in ("copy_", "_to_copy") or not isinstance(result, torch.Tensor):
            return
        source, target = (args[1], args[0]) if base == "copy_" else (args[0], result)
        if source.is_cuda == target.is_cuda or source.numel() == 0 or not (source.is_cuda or target.is_cuda):
            return
        host = target if source.is_cuda else source
        if host.dim() == 0 and not source.is_cuda and base != "copy_":
            return
        non_blocking = bool(kwargs.get("non_blocking", args[2] if base == "copy_" and len(args) > 2 else False))
        if not host.is_pinned():
            rule = "D2H_SYNC" if source.is_cuda else "H2D_PAGEABLE"
            self._add(rule, Severity.ERROR, "a copy with pageable host memory", str(func), user_stack())
        elif non_blocking:
            rule = "D2H_PINNED" if source.is_cuda else "H2D_PINNED"
            self._add(rule, Severity.HAZARD, "every replay copies this host buffer again", str(func), user_stack())
