"""The gpu pass: what a real capture says.

Every wait of the host in an eager call (``gpu_watch``), then a real capture, with the cause of a failure dug out of
the exceptions that hide it, and the smallest operation that fails by itself; then replays on fresh inputs against eager
from the same state, poisoned outputs, the liveness of what the graph reads, the generator's offset, and memory.
"""

from __future__ import annotations

import gc
import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ostinato.check.finding import NOWHERE, Finding, Frame, Severity
from ostinato.check.frames import raised_at, user_frame, user_stack
from ostinato.check.gpu_watch import GpuWatch, finding, gpu_assumptions
from ostinato.check.pretend.flatten import tensors
from ostinato.check.pretend.storage import StorageRef
from ostinato.check.result import PassRun, Report, sorted_findings
from ostinato.check.session import RegionRaisedError, describe
from ostinato.check.subject import Call, Subject
from ostinato.check.suppress import apply_suppressions
from ostinato.check.tape import output_tensors
from ostinato.errors import CheckError
from ostinato.graphs.recovery import free_generators
from ostinato.graphs.trace import OpTrace, Site, frozen_difference, split_of
from ostinato.graphs.verify import StateSnapshot, compare_outputs, poison_

_NUM_WARMUP = 1
_NUM_REPLAYS = 3
_MAX_BISECTED_OPS = 4000
_SEED = 30_000


def check_on_gpu(make: Callable[[], Subject], *, target: str = "") -> Report:
    """Check a subject on the current CUDA device. ``make()`` builds it there.

    Raises CheckError where there is no CUDA device, or if building the subject fails.
    """
    if not torch.cuda.is_available():
        raise CheckError("the gpu pass needs a CUDA device, and PyTorch sees none: use --passes cpu")
    start = time.perf_counter()
    torch.random.manual_seed(0)
    try:
        subject = make()
    except RuntimeError as error:
        raise CheckError(f"building what should be checked failed on the GPU: {describe(error)}") from error
    run = _GpuRun(subject)
    run.all()
    return Report(
        target=target,
        findings=sorted_findings(apply_suppressions(run.findings, {})),  # unused ones are the other passes' to report
        passes=(PassRun("gpu", time.perf_counter() - start, run.detail()),),
        num_regions=run.num_calls,
        num_ops=run.num_ops,
        partial=run.partial,
        notes=tuple(run.notes),
        assumptions=gpu_assumptions(),
        torch_version=torch.__version__,
    )


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain: leaving ``torch.cuda.graph`` after an error raises another that hides it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        before = error.__cause__ or error.__context__
        if before is None:
            break
        error = before
    return error


def _cloned(tree: Any) -> Any:
    def clone(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(clone, tree)


class _GpuRun:
    """One subject on the GPU."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.partial = ""
        self.num_calls = 0
        self.num_ops = 0
        self.num_replays = 0
        self.is_captured = False
        found = [t for c in subject.calls for t in tensors((c.args, dict(c.kwargs))) if t.is_cuda]
        self.device = found[0].device if found else torch.device("cuda", torch.cuda.current_device())
        wanted = max(len(subject.calls), _NUM_WARMUP + 2 + _NUM_REPLAYS)
        self._calls = list(itertools.islice(itertools.cycle(subject.calls), wanted))
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._read_by_graph: dict[int, Site | None] = {}

    def detail(self) -> str:
        """What was run, in words."""
        captured = f"captured, {self.num_replays} replays against eager" if self.is_captured else "not captured"
        return f"{self.num_calls} eager calls, {captured}"

    def _call(self, call: Call) -> Any:
        try:
            return self.subject.fn(*call.args, **call.kwargs)
        except Exception as error:
            raise RegionRaisedError(describe(error), raised_at(error.__traceback__)) from error

    def _eager(self, index: int) -> Any:
        call = self._calls[index]
        args, kwargs = _cloned((call.args, dict(call.kwargs)))
        torch.random.manual_seed(_SEED + index)
        result = self._call(Call(args, kwargs))
        self.num_calls += 1
        return result

    def all(self) -> None:
        """Everything, in order; stops at what makes the rest meaningless."""
        with torch.cuda.device(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for index in range(_NUM_WARMUP):
                    self._eager(index)
                with GpuWatch() as watch:
                    self._eager(_NUM_WARMUP)
            except RegionRaisedError as error:
                self.findings.append(
                    finding("RAISED", Severity.ERROR, str(error), "eager", error.stack, gpu_assumptions())
                )
                self.partial = f"the eager call raised {error}"
                return
            self.num_ops = watch.op_calls
            self.findings += watch.findings.values()
            self._capture_and_replay(_NUM_WARMUP + 1)

    # ------------------------------------------------------------------ capture
    def _trace(self, index: int) -> tuple[OpTrace, Any]:
        """An eager call with its operations recorded. The trace undoes nothing here."""
        trace = DeviceTrace(self.device)
        call = self._calls[index]
        args, kwargs = _cloned((call.args, dict(call.kwargs)))
        torch.random.manual_seed(_SEED + index)
        result = trace.run(lambda: self._call(Call(args, kwargs)))
        self.num_calls += 1
        return trace, result

    def _capture_and_replay(self, index: int) -> None:
        captured_trace = DeviceTrace(self.device)
        call = self._calls[index]
        args, kwargs = _cloned((call.args, dict(call.kwargs)))
        static = tensors((args, kwargs))
        outputs: Any = None
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                outputs = captured_trace.run(lambda: self._call(Call(args, kwargs)))
        except (RuntimeError, RegionRaisedError, AssertionError, ValueError, TypeError) as error:
            self._capture_failed(error, index)
            return
        self.is_captured = True
        self.notes.append(f"the graph holds {torch.cuda.memory_allocated(self.device) - before:,} bytes")
        inputs = {t.untyped_storage()._cdata for t in static if t.is_cuda}
        externals = [e.tensor for k, e in captured_trace.externals.items() if e.tensor.is_cuda and k not in inputs]
        places = {
            k: (StorageRef(e.tensor), e.site)
            for k, e in captured_trace.externals.items()
            if e.tensor.is_cuda and e.tensor.numel()
        }
        self._read_by_graph = {
            k: e.site for k, e in captured_trace.externals.items() if e.tensor.is_cuda and k not in inputs
        }
        captured_trace.externals.clear()
        self._replays(index, static, outputs, externals, captured_trace)
        del externals
        self._liveness(places, inputs)

    def _capture_failed(self, error: BaseException, index: int) -> None:
        torch.cuda.synchronize()
        free_generators(self._stream)
        cause = root_cause(error)
        stack = raised_at(cause.__traceback__) or (error.stack if isinstance(error, RegionRaisedError) else ())
        known = {(f.where.file, f.where.line) for f in self.findings if f.severity is Severity.ERROR}
        self.notes.append(f"capture failed: {describe(cause)}")
        if stack and (stack[0].file, stack[0].line) in known:
            return
        if not known:
            self._bisect(index)
        if not any(f.severity is Severity.ERROR for f in self.findings):
            self.findings.append(
                finding("RAISED", Severity.ERROR, describe(cause), "capture", stack or (NOWHERE,), gpu_assumptions())
            )

    def _bisect(self, index: int) -> None:
        """Capture each operation of an eager call by itself: which is the smallest part that fails?"""
        bisect = OpByOp()
        try:
            with bisect:
                self._eager(index)
        except RegionRaisedError:
            return
        for name, text, stack, module in bisect.failed:
            inside = f" in {module}" if module else ""
            self.findings.append(
                finding(
                    "RAISED",
                    Severity.ERROR,
                    f"{name}{inside} cannot be captured: {text}",
                    name,
                    stack,
                    gpu_assumptions(),
                )
            )

    # ------------------------------------------------------------------ replay
    def _replays(
        self, index: int, static: list[torch.Tensor], outputs: Any, externals: list[torch.Tensor], captured: OpTrace
    ) -> None:
        owned = {t.untyped_storage()._cdata for t in (*externals, *static)}
        results = output_tensors(outputs)
        fresh_outputs = [t for t in results if t.is_cuda and t.untyped_storage()._cdata not in owned]
        generator = torch.cuda.default_generators[self.device.index or 0]
        memory: list[int] = []
        for number in range(index + 1, index + 1 + _NUM_REPLAYS):
            call = self._calls[number % len(self._calls)]
            state = StateSnapshot(externals)
            trace, eager = self._trace(number % len(self._calls))
            uses_rng = generator.get_offset() > 0
            expected = [t.detach().clone() for t in output_tensors(eager)]
            after = StateSnapshot(externals)
            state.restore()
            for slot, value in zip(static, tensors((call.args, dict(call.kwargs))), strict=True):
                slot.detach().copy_(value.detach())
            for output in fresh_outputs:
                poison_(output)
            torch.random.manual_seed(_SEED + number % len(self._calls))
            self._graph.replay()
            torch.cuda.synchronize()
            self.num_replays += 1
            memory.append(torch.cuda.memory_allocated(self.device))
            mismatch = compare_outputs(expected, [t.detach() for t in results])
            if mismatch is None:
                mismatch = compare_outputs(after.saved(), StateSnapshot(externals).saved(), path="state")
            if uses_rng and generator.get_offset() == 0:
                self.notes.append("the generator did not advance at replay: every replay draws the same numbers")
            after.restore()
            if mismatch is not None:
                self._mismatch(str(mismatch), captured, trace)
                return
        if len(set(memory)) > 1 and memory[-1] > memory[0]:
            self.notes.append(f"allocated memory grew over replays from {memory[0]:,} to {memory[-1]:,} bytes")

    def _mismatch(self, text: str, captured: OpTrace, eager: OpTrace) -> None:
        """Name the line: what the eager call did otherwise than the captured one."""
        frozen, split = frozen_difference(captured, eager), split_of(captured, eager)
        if frozen is not None:
            record, what = frozen
            rule = "SHAPE_CHANGES" if "shape" in what else "BAKED_SCALAR"
            self._hazard(rule, f"{record.name} {what}; {text}", record.name, record.site)
        elif split is not None:
            record = split[0] or split[1]  # type: ignore[assignment]  # one of the two is a record
            self._hazard("CONTROL_FLOW", f"the next call runs other operations; {text}", record.name, record.site)
        elif stale := [site for key, site in self._read_by_graph.items() if key not in eager.externals]:
            self._hazard("STALE_INPUT", f"the next call reads another tensor here; {text}", "external", stale[0])
        else:
            last = eager.records[-1].site if eager.records else None
            self._hazard("REPLAY_DIFFERS", text, "replay", last)

    def _hazard(self, rule: str, text: str, op: str, site: Site | None) -> None:
        where = Frame(site.file, site.line, site.function) if site is not None else NOWHERE
        self.findings.append(finding(rule, Severity.HAZARD, text, op, (where,), gpu_assumptions()))

    def _liveness(self, places: Mapping[int, tuple[StorageRef, Site | None]], inputs: set[int]) -> None:
        """What the graph reads must live as long as it does; torch before 2.13 does not check that."""
        gc.collect()
        for key, (reference, site) in places.items():
            if key not in inputs and reference.is_dead:
                self._hazard("FREED_INPUT", "a tensor that the graph reads did not outlive the capture", "free", site)


class DeviceTrace(OpTrace):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """As ``OpTrace``, without operations that only the host sees: they are no part of a graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Record what touches the device; run the rest as it is."""
        named = (kwargs or {}).get("device")
        inputs = tensors((args, dict(kwargs or {})))
        if not any(t.is_cuda for t in inputs) and (named is None or torch.device(named).type != "cuda"):
            return func(*args, **(kwargs or {}))
        known = set(self.externals)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        frame = user_frame()  # the trace itself would name this function: it stands outside of its package
        site = Site(frame.file, frame.line, frame.function)
        self.records[-1] = replace(self.records[-1], site=site)
        for key in self.externals.keys() - known:
            self.externals[key].site = site
        return result


class OpByOp(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Captures every operation by itself before it runs it; ``failed`` has (name, message, stack, module)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.failed: list[tuple[str, str, tuple[Frame, ...], str]] = []
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._num_tried = 0
        self._modules: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> OpByOp:
        """Begin, and follow which module runs."""
        register = torch.nn.modules.module
        self._hooks = [
            register.register_module_forward_pre_hook(lambda module, args: self._modules.append(type(module).__name__)),
            register.register_module_forward_hook(lambda module, args, output: self._leave(), always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def _leave(self) -> None:
        if self._modules:
            self._modules.pop()

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Try the capture, then run; ``types`` is unused."""
        kwargs = dict(kwargs or {})
        self._num_tried += 1
        if self._num_tried <= _MAX_BISECTED_OPS:
            torch.cuda.synchronize()
            try:
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    func(*args, **kwargs)
            except RuntimeError as error:
                torch.cuda.synchronize()
                free_generators(self._stream)
                module = ".".join(self._modules)
                self.failed.append((str(func), describe(root_cause(error)), user_stack(), module))
        return func(*args, **kwargs)
