"""``capture``: warm up, capture, replay twice against eager, and only then hand over; or refuse and say why."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ostinato.errors import CaptureError, CaptureRefusedError, ReplayMismatchError
from ostinato.graphs.callable import CapturedCallable, callable_name, into_outputs
from ostinato.graphs.inputs import StaticInputs
from ostinato.graphs.recovery import free_generators
from ostinato.graphs.report import CaptureReport, Scratch, count_nodes
from ostinato.graphs.rules import generator_key, remedy_for_error
from ostinato.graphs.streams import GraphPool, cuda_device
from ostinato.graphs.trace import (
    CaptureViolation,
    OpTrace,
    Site,
    error_site,
    frozen_difference,
    split_of,
    storage_key,
)
from ostinato.graphs.tree import leaves, tensors
from ostinato.graphs.verify import StateSnapshot, Tolerance, compare_leaves, fresh_like, poison_

_LOG = logging.getLogger(__name__)
NUM_VERIFIED_REPLAYS = 2
FreshInputs = Callable[[int], Any]


def capture(
    fn: Callable[..., Any],
    example_inputs: Any,
    *,
    device: torch.device | str | None = None,
    pool: GraphPool | None = None,
    warmup: int = 3,
    fresh_inputs: FreshInputs | None = None,
    state: Any = (),
    outputs: Any = None,
    rng: Sequence[torch.Generator] = (),
    tolerance: Tolerance | None = None,
    max_allocation_bytes: int | None = None,
    name: str | None = None,
    verify: bool = True,
) -> CapturedCallable:
    """Captures ``fn(*example_inputs)`` as one CUDA graph, verified against eager.

    ``example_inputs``: a tree of CUDA tensors of one device. A tuple is passed as positional arguments, a dict as
    keywords, anything else as the one argument. Tensors are copied to static buffers of the graph's own, except those
    of a StaticBuffers, which the graph reads in place. Numbers and strings are frozen.

    ``state``: tensors (or slices of them) that ``fn`` writes and keeps between calls. They and the in-place buffers are
    as before when this function returns or raises. A slice of a large cache saves and verifies only that slice.
    ``outputs``: buffers that receive the result, in order, checked by shape and dtype.
    ``fresh_inputs(i)``: the inputs of verification replay ``i``, a tree like ``example_inputs``, or None when it wrote
    the in-place buffers itself. Without it :func:`~ostinato.graphs.verify.fresh_like` makes them.
    ``rng``: generators besides the device's default one that ``fn`` draws from.
    ``pool``: shared with other graphs of the device, which then also share its stream; an own one by default.
    ``tolerance``: see :func:`~ostinato.graphs.verify.compare_outputs`; by default only the order of sums may differ.
    ``max_allocation_bytes``: refuse a step that allocates a tensor larger than this.
    ``warmup``: calls before the capture, at least two: values computed in the first and kept are found by the second.

    Raises DeviceError without CUDA, CaptureRefusedError (operation, source line, remedy) when ``fn`` cannot be
    captured or would replay frozen values, ReplayMismatchError when replay and eager differ.
    """
    label = name or callable_name(fn)
    if warmup < 2:
        raise CaptureError(f"{label}: warmup={warmup}; at least 2 calls show what the first one froze")
    first = next(iter(tensors(example_inputs)), None)
    wanted = device if device is not None else pool.device if pool is not None else None
    if wanted is None and first is not None:
        wanted = first[1].device
    target = cuda_device(wanted, f"capture of {label}")
    if pool is not None and pool.device != target:
        raise CaptureError(f"{label}: its pool is on {pool.device} and its inputs on {target}")
    if torch.cuda.is_current_stream_capturing():
        raise CaptureError(f"{label}: a capture is already under way on this stream")
    job = _Capture(fn, StaticInputs(example_inputs, target), pool or GraphPool(target), label, state, outputs, rng)
    try:
        with job.pool.stream:
            job.warm_up(warmup)
            job.record()
            job.check(max_allocation_bytes)
            if verify:
                job.verify(fresh_inputs or (lambda index: fresh_like(example_inputs, seed=index)), tolerance)
    except BaseException:
        job.abandon()
        raise
    finally:
        job.restore()
    captured = job.finish()
    _LOG.info("%s", captured.report())
    return captured


class _Capture:
    """One capture on its way: the steps of :func:`capture` and what they find out."""

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: StaticInputs,
        pool: GraphPool,
        label: str,
        state: Any,
        outputs: Any,
        rng: Sequence[torch.Generator],
    ) -> None:
        self.fn, self.inputs, self.pool, self.label = fn, inputs, pool, label
        self.device = pool.device
        self.state, self.declared_outputs = state, outputs
        default = torch.cuda.default_generators[pool.stream.index]
        self.generators = [default, *rng]
        self.registered = list(rng)
        self.snapshot = StateSnapshot((inputs.tree, state, outputs))
        self.rng_states = [generator.get_state() for generator in self.generators]
        self.state_keys = self._keys(state) | self._keys(outputs)
        self.writable = self.state_keys | inputs.storages()
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        self.holds_pool = False
        self.warm: list[OpTrace] = []
        self.trace = self._new_trace(enforce=True)
        self.outputs: Any = None
        self.num_verified = 0
        self.memory_bytes = 0
        self.milliseconds = {"warmup": 0.0, "capture": 0.0, "verify": 0.0}

    # -- warm-up ---------------------------------------------------------------------------------------------------

    def warm_up(self, num_calls: int) -> None:
        """Calls ``fn`` eagerly; the first and the last call are traced."""
        started = time.perf_counter()
        for index in range(num_calls):
            self._reset()
            if index in (0, num_calls - 1):
                trace = self._new_trace()
                self.warm.append(trace)
                trace.run(self._call)
                self._refuse_undeclared_writes(trace)
            else:
                self._call()
        self.pool.stream.synchronize()
        self._refuse_values_read_once()
        self.milliseconds["warmup"] = 1e3 * (time.perf_counter() - started)

    def _refuse_undeclared_writes(self, trace: OpTrace) -> None:
        written = trace.undeclared_writes()
        if not written:
            return
        trace.undo_writes()
        external = written[0]
        self._refuse(
            external.operation,
            external.site,
            f"it writes to a tensor of shape {list(external.tensor.shape)} that is neither an input nor declared state",
            "declare it: capture(..., state=(tensor,)), so that it is restored after warm-up and verified",
        )

    def _refuse_values_read_once(self) -> None:
        """A value read to the host by the first call and by none after it was computed once and kept."""
        first, last = self.warm[0], self.warm[-1]
        still_read = {(violation.operation, site) for violation, site in last.violations}
        for violation, site in first.violations:
            if (violation.operation, site) not in still_read:
                self._refuse(
                    violation.operation,
                    site,
                    f"only the first call does this and later ones keep the result ({violation.reason}), so warm-up's "
                    "value would be frozen into every replay",
                    "compute it on the device in every step, or before capture() when it does not follow the data",
                )

    # -- capture ---------------------------------------------------------------------------------------------------

    def record(self) -> None:
        """Captures the graph. Nothing runs on the device."""
        self._reset()
        # Dead tensors that a cycle still holds are freed now: not in the middle of the capture, and not after it.
        gc.collect()
        torch.cuda.empty_cache()
        self.pool.stream.synchronize()
        for generator in self.registered:
            self.graph.register_generator_state(generator)
        before = self.pool.memory_bytes
        started = time.perf_counter()
        error: Exception | None = None
        self.holds_pool = True
        # Thread-local: other threads (a server's) may go on allocating while this one captures.
        self.graph.capture_begin(pool=self.pool.acquire(), capture_error_mode="thread_local")
        try:
            self.outputs = self.trace.run(self._call)
        except Exception as raised:
            error = raised
        finally:
            end_error = self._end_capture()
        if error is None and self.trace.violations:
            # The function swallowed the exception that told it so.
            error = CaptureViolation(*self.trace.violations[0])
        if error is not None or end_error is not None:
            self._refuse_error(error or end_error)
        if count_nodes(self.graph.raw_cuda_graph()) == 0:
            self._refuse("the function", None, "it does nothing on this device's stream", "capture work for the device")
        self.graph.instantiate()
        self.milliseconds["capture"] = 1e3 * (time.perf_counter() - started)
        self.memory_bytes = max(0, self.pool.memory_bytes - before)

    def _end_capture(self) -> RuntimeError | None:
        """CUDA's own verdict, which after a failure inside is only "something failed before"."""
        with warnings.catch_warnings():
            # An empty graph is reported as an error of its own, or has one already.
            warnings.simplefilter("ignore")
            try:
                self.graph.capture_end()
            except RuntimeError as error:
                free_generators(self.pool.stream.stream, self.registered)
                return error
        return None

    def _refuse_error(self, error: Exception | None) -> None:
        """Turns whatever ended the capture into the one error that names its cause."""
        assert error is not None
        if isinstance(error, CaptureViolation):
            also = [str(site) for _, site in self.warm[-1].violations if site != error.site]
            remedy = error.violation.remedy
            if also:
                remedy += f". The same step has {len(also)} more such operations: {'; '.join(dict.fromkeys(also))}"
            self._refuse(error.violation.operation, error.site, error.violation.reason, remedy)
        cause = _root_cause(error)
        failed = self.trace.failed
        site = failed.site if failed is not None else error_site(cause.__traceback__)
        if site is None and self.trace.records:
            site = self.trace.records[-1].site
        operation = failed.name if failed is not None else "a call outside PyTorch's operations"
        message = _first_line(cause)
        raise self._refusal(operation, site, message, remedy_for_error(str(cause))) from error

    # -- what the traces say ---------------------------------------------------------------------------------------

    def check(self, max_allocation_bytes: int | None) -> None:
        """Refuses what would replay, and replay wrongly."""
        born_in_warm_up = {
            key: allocation
            for trace in self.warm
            for key, allocation in trace.allocations.items()
            if allocation.is_alive
        }
        for key, external in self.trace.externals.items():
            made = born_in_warm_up.get(key)
            if made is not None and key not in self.writable:
                self._refuse(
                    external.operation,
                    made.site or external.site,
                    f"it reads a tensor of shape {list(external.tensor.shape)} that warm-up made here and kept, "
                    "so warm-up's values would be frozen into every replay",
                    "compute it in every step, make it before capture() when it is a constant, or declare it as state",
                )
        frozen = frozen_difference(self.warm[-1], self.trace)
        if frozen is not None:
            record, what = frozen
            self._refuse(
                record.name,
                record.site,
                f"it {what}, and a replay would repeat the last one for ever",
                "hold the value in a device tensor (a static buffer or state) that the step itself advances",
            )
        for allocation in self.trace.allocations.values():
            if max_allocation_bytes is not None and allocation.num_bytes > max_allocation_bytes:
                self._refuse(
                    "an allocation",
                    allocation.site,
                    f"it makes a tensor of {allocation.num_bytes} bytes in every step, over the {max_allocation_bytes} "
                    "allowed",
                    "write into a buffer that is made once",
                )

    # -- verification ----------------------------------------------------------------------------------------------

    def verify(self, fresh_inputs: FreshInputs, tolerance: Tolerance | None) -> None:
        """Replays on fresh inputs and compares outputs, state and in-place buffers with eager on the same ones."""
        started = time.perf_counter()
        rtol, atol = (None, None) if tolerance is None else (tolerance.rtol, tolerance.atol)
        own = [tensor for _, tensor in tensors(self.outputs) if self.trace.is_born_here(tensor)]
        own += [tensor for _, tensor in tensors(self.declared_outputs)]
        for index in range(NUM_VERIFIED_REPLAYS):
            self._reset()
            values = fresh_inputs(index)
            if values is not None:
                self.inputs.overwrite(values)
            begin = StateSnapshot((self.inputs.tree, self.state))
            expected, expected_rng = self._observe(self._call)
            begin.restore()
            self._restore_rng()
            for tensor in own:
                poison_(tensor)
            actual, actual_rng = self._observe(self._replay)
            mismatch = compare_leaves(expected, actual, rtol=rtol, atol=atol)
            if mismatch is None and expected_rng != actual_rng:
                raise ReplayMismatchError(
                    f"{self.label}: a replay advances the random generators differently from eager: draw from "
                    "generators named in rng=, or from counters in device tensors"
                )
            if mismatch is not None:
                raise ReplayMismatchError(
                    f"{self.label}: replay {index + 1} on fresh inputs differs from eager: {mismatch}.{self._hint()}"
                )
        self.num_verified = NUM_VERIFIED_REPLAYS
        self.milliseconds["verify"] = 1e3 * (time.perf_counter() - started)

    def _observe(self, run: Callable[[], Any]) -> tuple[dict[str, Any], list[bytes]]:
        """Everything that one call leaves behind, copied, by path."""
        outputs = run()
        # State may lie in pinned host memory, which the host must not read before the device has written it.
        self.pool.stream.synchronize()
        seen = {"output": outputs, "state": self.state, "input": self.inputs.tree}
        found = (item for root, tree in seen.items() for item in leaves(tree, root))
        copies = {path: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for path, leaf in found}
        return copies, [bytes(generator.get_state().tolist()) for generator in self.generators]

    def _replay(self) -> Any:
        self.graph.replay()
        return self.outputs

    def _hint(self) -> str:
        split = split_of(self.warm[-1], self.trace)
        if split is None:
            return " A kernel launched past PyTorch's dispatcher or a value frozen on the host is a likely cause"
        was, now = (record and f"{record.name} at {record.site}" for record in split)
        return f" The captured call did other work than warm-up: {now or 'it ended'} instead of {was or 'the end'}"

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> CapturedCallable:
        """Hands the graph over with everything that it reads."""
        keep_alive: list[Any] = [external.tensor for external in self.trace.externals.values()]
        keep_alive += [self.fn, self.state, self.declared_outputs, *self.registered]
        captured = CapturedCallable(self.label, self.graph, self.pool, self.inputs, self.outputs, keep_alive)
        captured.set_report(self._report())
        return captured

    def _report(self) -> CaptureReport:
        keys = self.trace.externals.keys()
        inputs, allocations = self.inputs.storages(), list(self.trace.allocations.values())
        largest = sorted(allocations, key=lambda allocation: -allocation.num_bytes)[:5]
        return CaptureReport(
            name=self.label,
            device=str(self.device),
            num_ops=len(self.trace.records),
            num_nodes=count_nodes(self.graph.raw_cuda_graph()),
            memory_bytes=self.memory_bytes,
            warmup_ms=self.milliseconds["warmup"],
            capture_ms=self.milliseconds["capture"],
            verify_ms=self.milliseconds["verify"],
            num_inputs=len(keys & inputs),
            num_state=len((keys & self.state_keys) - inputs),
            num_constants=len(keys - inputs - self.state_keys),
            num_allocations=len(allocations),
            allocated_bytes=sum(allocation.num_bytes for allocation in allocations),
            largest_allocations=tuple(Scratch(a.num_bytes, str(a.site)) for a in largest),
            num_replays_verified=self.num_verified,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = [
            f"{violation.operation} at {site} runs in warm-up and not in the capture"
            for violation, site in self.warm[-1].violations
        ]
        used = self.trace.externals.keys()
        unused = [path for path, tensor in tensors(self.inputs.tree, "input") if storage_key(tensor) not in used]
        notes += [f"{path} is read by no operation that the trace sees" for path in unused]
        return tuple(notes)

    def abandon(self) -> None:
        """Frees the graph of a capture that will not be handed over."""
        self.pool.stream.synchronize()
        self.outputs = None
        self.graph.reset()
        if self.holds_pool:
            self.pool.release()

    def restore(self) -> None:
        """Leaves inputs, state and random generators as they were before the capture."""
        with self.pool.stream:
            self._reset()

    def _reset(self) -> None:
        self.pool.stream.synchronize()
        self.snapshot.restore()
        self._restore_rng()

    def _restore_rng(self) -> None:
        for generator, state in zip(self.generators, self.rng_states, strict=True):
            generator.set_state(state)

    def _call(self) -> Any:
        result = self.inputs.call(self.fn)
        return result if self.declared_outputs is None else into_outputs(self.declared_outputs, result, self.label)

    def _new_trace(self, *, enforce: bool = False) -> OpTrace:
        keys = frozenset(generator_key(generator) for generator in self.generators)
        return OpTrace(self.device, enforce=enforce, generators=keys, keep_written=frozenset(self.writable))

    def _keys(self, tree: Any) -> frozenset[int]:
        return frozenset(key for _, tensor in tensors(tree) if (key := storage_key(tensor)) is not None)

    def _refuse(self, operation: str, site: Site | None, reason: str, remedy: str) -> None:
        raise self._refusal(operation, site, reason, remedy)

    def _refusal(self, operation: str, site: Site | None, reason: str, remedy: str) -> CaptureRefusedError:
        where = f" at {site}" if site is not None else ""
        return CaptureRefusedError(f"{self.label}: {operation}{where}: {reason}. Remedy: {remedy}")


def _root_cause(error: BaseException) -> BaseException:
    """The first error of a chain: error 901 says only that an earlier call (900) had ended the capture."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
