"""One check of one subject: pretend, trace and tape over the same calls."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ostinato.check.coverage import LinesRun
from ostinato.check.finding import NOWHERE, Certainty, Finding, Frame, Severity
from ostinato.check.frames import raised_at
from ostinato.check.op_table import load_table
from ostinato.check.pretend import Gpu, World, pretence
from ostinato.check.record import Recorder
from ostinato.check.result import PassRun, Report, sorted_findings
from ostinato.check.rules import RULES
from ostinato.check.static import scan_file
from ostinato.check.subject import Call, Subject, adopt
from ostinato.check.suppress import apply_suppressions
from ostinato.check.tape import Tape, TapeMismatch, cloned, compare_with_eager
from ostinato.check.trace import Difference, compare_calls
from ostinato.errors import CheckError, OstinatoError

_SEED = 20_000
_MIN_CALLS = 4
_CAPTURED_CALL = 1
_LEAKING_OPS = frozenset(
    f"aten.{name}.default" for name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "copy_")
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to check. ``num_calls`` repeats the given calls in turn until there are so many."""

    meta: bool = False
    tape: bool = True
    num_calls: int = _MIN_CALLS
    gpu: Gpu = field(default_factory=Gpu)
    torch_version: str | None = None
    coverage: bool = True


def leaks(finding: Finding) -> bool:
    """Whether a capture error gave device data to Python: what differs between calls may then follow from the data."""
    if finding.severity is not Severity.ERROR:
        return False
    if finding.rule.name in ("DYNAMIC_SHAPE", "RAISED"):
        return True
    return finding.rule.name == "D2H_SYNC" and (not finding.op.startswith("aten.") or finding.op in _LEAKING_OPS)


class RegionRaisedError(CheckError):
    """The region raised; the cause is in ``__cause__``."""

    def __init__(self, message: str, stack: tuple[Frame, ...]) -> None:
        super().__init__(message)
        self.stack = stack


class Progress:
    """What was found so far: a watchdog that has to end a hanging check reports this."""

    def __init__(self) -> None:
        self.world: World | None = None
        self.calls_done = 0

    def findings(self) -> list[Finding]:
        """The violations recorded up to now."""
        return [] if self.world is None else [f for f, _ in self.world.counted()]


def describe(error: BaseException) -> str:
    """``ValueError: the first line of its message``."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def check_subject(
    make: Callable[[], Subject],
    settings: Settings | None = None,
    *,
    target: str = "",
    adopts: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Run the CPU passes over what ``make()`` gives.

    Args:
        make: builds the subject; it is called inside the pretence, so ``device="cuda"`` works in it.
        settings: see ``Settings``.
        target: its name in the report.
        adopts: the subject was made before, on the CPU: take what it reaches to be on the device.
        progress: filled while the check runs.
    """
    settings = settings or Settings()
    progress = progress or Progress()
    start = time.perf_counter()
    with pretence(gpu=settings.gpu, torch_version=settings.torch_version, meta=settings.meta) as world:
        progress.world = world
        torch.default_generator.manual_seed(0)
        try:
            subject = make()
            num_adopted = adopt(world, subject) if adopts else 0
        except OstinatoError:
            raise
        except Exception as error:
            where = raised_at(error.__traceback__)
            at = f" at {where[0].file}:{where[0].line}" if where else ""
            raise CheckError(f"building what should be checked failed: {describe(error)}{at}") from error
        run = _Run(world, subject, settings, progress)
        run.all_calls()
        findings = run.conclude()
    seconds = time.perf_counter() - start
    name = "pretend --meta" if settings.meta else "pretend"
    passes = [
        PassRun(name, seconds, f"{run.num_done} calls, {run.num_ops} operations"),
        PassRun("trace", 0.0, f"{run.num_compared} pairs of calls"),
    ]
    if run.num_replayed:
        passes.append(PassRun("tape", 0.0, f"{run.num_replayed} replays against eager"))
    notes = list(run.notes)
    if num_adopted:
        notes.append(f"{num_adopted} tensors that were made before the check were taken to be on the device")
    table = load_table(settings.torch_version)
    if table.note:
        notes.append(table.note)
    return Report(
        target=target,
        findings=sorted_findings(apply_suppressions(findings + _unreached(run.lines), dict(run.lines.lines))),
        passes=tuple(passes),
        num_regions=run.num_done,
        num_ops=run.num_ops,
        partial=run.partial,
        notes=tuple(notes),
        assumptions=world.target.assumed(table.version),
        opaque_ops=dict(world.opaque_ops),
        not_reached=tuple(run.lines.branches_not_reached()),
        torch_version=torch.__version__,
    )


@cache
def _scanned(file: str) -> tuple[Finding, ...]:
    return tuple(scan_file(Path(file))) if Path(file).is_file() else ()


def _unreached(lines: LinesRun) -> list[Finding]:
    """What the source says of branches that no call reached, in functions that ran: at most warnings."""
    found: list[Finding] = []
    for file, ran in lines.lines.items():
        inside = lines.functions_run(file)
        for finding in _scanned(file):
            if finding.where.line not in inside:
                continue
            if finding.rule.name == "FALLBACK":
                found.append(finding)
                continue
            if finding.where.line in ran:
                continue
            text = f"in a branch that no call reached: {finding.message}"
            found.append(
                replace(
                    finding, severity=min(finding.severity, Severity.WARNING), certainty=Certainty.SUSPECT, message=text
                )
            )
    return found


class _Run:
    """The calls of one subject inside one pretence."""

    def __init__(self, world: World, subject: Subject, settings: Settings, progress: Progress) -> None:
        self.world = world
        self.subject = subject
        self.settings = settings
        self.progress = progress
        self.lines = LinesRun()
        self.notes: list[str] = []
        self.partial = ""
        self.num_done = 0
        self.num_compared = 0
        self.num_replayed = 0
        self.recorders: list[Recorder] = []
        self.mismatches: list[TapeMismatch] = []
        self.freed: list[tuple[Frame, tuple[int, ...]]] = []
        self._tape: Tape | None = None

    @property
    def num_ops(self) -> int:
        """Recorded operations over all calls."""
        return sum(len(r.operations) for r in self.recorders)

    def all_calls(self) -> None:
        """Make the calls, repeating the given ones in turn up to the wanted number."""
        given = self.subject.calls
        wanted = max(len(given), self.settings.num_calls)
        for index, call in enumerate(itertools.islice(itertools.cycle(given), wanted)):
            is_repeat = index >= len(given)
            try:
                self._one_call(index, call)
            except RegionRaisedError as error:
                if is_repeat and self.num_done:
                    self.notes.append(
                        f"call {index + 1}, which repeats the given arguments, raised and was left out: {error}"
                    )
                    self._forget_call(index)
                else:
                    self.partial = f"call {index + 1} raised {error}"
                return
            self.num_done += 1
            self.progress.calls_done = self.num_done
        self._look_for_freed()

    def _look_for_freed(self) -> None:
        gc.collect(1)  # what the calls left behind is young
        for external in itertools.chain.from_iterable(r.externals.values() for r in self.recorders if not r.keep):
            if external.entry.device is not None and external.entry.ref.is_dead:
                self.freed.append((external.first_read, external.shape))

    def _forget_call(self, index: int) -> None:
        for key, counts in list(self.world.counts.items()):
            counts.pop(index, None)
            if not counts:
                del self.world.counts[key]
                del self.world.findings[key]

    def _one_call(self, index: int, call: Call) -> None:
        world = self.world
        world.call = index
        args, kwargs = cloned(world, (call.args, dict(call.kwargs)))
        arguments = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        arguments += self.subject.static.values()
        wants_tape = self.settings.tape and not self.settings.meta
        recorder = Recorder(world, arguments, keep=wants_tape and index == _CAPTURED_CALL)
        state = self._tape.save() if self._tape is not None else []
        torch.default_generator.manual_seed(_SEED + index)
        result = self._in_region(recorder, args, kwargs, index)
        if recorder.keep:
            self._tape = Tape(world, recorder, arguments, result)
        elif self._tape is not None:
            mismatch = compare_with_eager(self._tape, result, state, arguments, index, _SEED + index)
            self.num_replayed += 1
            if mismatch is not None:
                self.mismatches.append(mismatch)
        self.recorders.append(recorder)

    def _in_region(self, recorder: Recorder, args: Any, kwargs: Any, index: int) -> Any:
        world = self.world
        world.recorder = recorder
        watch = self.settings.coverage and index == min(_CAPTURED_CALL, self.settings.num_calls - 1)
        try:
            with world.region():
                try:
                    if watch:
                        with self.lines.watching():
                            return self.subject.fn(*args, **kwargs)
                    return self.subject.fn(*args, **kwargs)
                except (Exception, SystemExit) as error:
                    stack = raised_at(error.__traceback__)
                    if world.is_meta and ("FakeTensor" in str(error) or any(leaks(f) for f, _ in world.counted())):
                        text = f"{describe(error)}, which may follow from made-up values: FakeTensors have no data"
                        raise RegionRaisedError(text, stack) from error
                    world.report(
                        "RAISED", Severity.ERROR, describe(error), type(error).__name__, stack=stack or (NOWHERE,)
                    )
                    raise RegionRaisedError(describe(error), stack) from error
        finally:
            world.recorder = None

    # ------------------------------------------------------------------ what it amounts to
    def conclude(self) -> list[Finding]:
        """All findings of the run."""
        violations = self._violations()
        found = list(violations)
        differences = self._differences()
        if any(leaks(f) for f in violations):
            if differences:
                self.notes.append(
                    f"{len(differences)} differences between calls may follow from the capture errors: fix those first"
                )
            return found
        found += [self._hazard(difference) for difference in differences]
        found += self._from_dataflow(found)
        if self.mismatches:
            found = self._with_tape(found)
        return found

    def _violations(self) -> list[Finding]:
        found: list[Finding] = []
        for finding, per_call in self.world.counted():
            if (
                self.num_done > 1
                and set(per_call) == {0}
                and finding.severity >= Severity.HAZARD
                and finding.rule.name not in ("RAISED", "OUT_RESIZED")
            ):
                text = f"{finding.message}; only in the first call: warm up before the capture"
                found.append(replace(finding, severity=Severity.WARNING, message=text))
                continue
            found.append(finding)
        return found

    def _differences(self) -> list[Difference]:
        pairs = list(itertools.pairwise(self.recorders))
        if len(self.recorders) > 2:
            pairs = pairs[1:]
        self.num_compared = len(pairs)
        unique: dict[tuple[str, Frame], Difference] = {}
        for first, second in pairs:
            for difference in compare_calls(first, second):
                unique.setdefault((difference.rule, difference.where), difference)
        return list(unique.values())

    def _hazard(self, difference: Difference) -> Finding:
        return self._finding(difference.rule, difference.message, difference.op, difference.where, "trace")

    def _finding(
        self, rule: str, message: str, op: str, where: Frame, found_by: str, severity: Severity = Severity.HAZARD
    ) -> Finding:
        return Finding(
            rule=RULES[rule],
            severity=severity,
            certainty=Certainty.LIKELY if self.world.is_meta else Certainty.PROVED,
            message=message,
            op=op,
            where=where,
            found_by=found_by,
            stack=(where,),
            assumed=self.world.target.assumed(self.world.table.version),
        )

    def _from_dataflow(self, hazards: list[Finding]) -> list[Finding]:
        """Freed inputs, values frozen in the first call, inputs that nothing reads; at lines without a hazard."""
        taken = {(f.where.file, f.where.line) for f in hazards if f.severity >= Severity.HAZARD}
        found: dict[tuple[str, Frame], Finding] = {}
        rebinds = any(f.found_by == "trace" for f in hazards)  # then old state dies with every call
        for where, shape in self.freed:
            if not rebinds and (where.file, where.line) not in taken:
                text = f"the tensor of shape {list(shape)} that is read here did not outlive the call"
                found["freed", where] = self._finding("FREED_INPUT", text, "free", where, "trace")
        if len(self.recorders) < 2:
            return list(found.values())
        last = self.recorders[-1]
        for external in last.externals.values():
            entry = external.entry
            if entry.device is not None and entry.born_call == 0 and entry.from_inputs and entry.written_call <= 0:
                text = "computed from the arguments of the first call, and read ever after without being updated"
                found["frozen", entry.born_at] = self._finding(
                    "FROZEN_WARMUP", text, "first call", entry.born_at, "trace"
                )
        return list(found.values()) + self._unread()

    def _unread(self) -> list[Finding]:
        """Static inputs that no operation of the last call read."""
        last = self.recorders[-1]
        num_static = len(self.subject.static)
        code = getattr(self.subject.fn, "__code__", None)
        where = Frame(code.co_filename, code.co_firstlineno, code.co_name) if code is not None else NOWHERE
        if where is NOWHERE and last.operations:
            where = last.operations[0].where
        names = last.argument_names(num_static, list(self.subject.static))
        found: list[Finding] = []
        for index, (name, is_static) in enumerate(names):
            if index in last.used_arguments or last.operations == []:
                continue
            severity = Severity.HAZARD if is_static else Severity.INFO
            text = f"{name} is declared as an input, and no operation reads it: what is copied into it changes nothing"
            found.append(self._finding("UNREAD_INPUT", text, name, where, "trace", severity))
        return found

    def _with_tape(self, found: list[Finding]) -> list[Finding]:
        """The tape saw other values than eager: that proves the hazards, or is one of its own."""
        first = self.mismatches[0]
        text = f"replay on the arguments of call {first.call + 1}: {first.message}"
        if any(f.severity >= Severity.HAZARD for f in found):
            self.notes.append(text)
            return found
        operations = self.recorders[_CAPTURED_CALL].operations
        where = operations[-1].where if operations else NOWHERE
        return [*found, self._finding("REPLAY_DIFFERS", text, "replay", where, "tape")]
