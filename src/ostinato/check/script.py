"""Checking an unmodified script: its captures become regions, its replays run the tape.

``with torch.cuda.graph(g):`` records a tape and undoes what the body computed, as a capture does. At ``g.replay()`` the
body is run once more from its source, as eager code over the same state and with the variables that the script has now;
what differs from the tape is what the real replay would not follow. ``with ostinato.check.region():`` marks a region in
code that captures nothing; its successive runs are compared.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch

from ostinato.check.finding import NOWHERE, Certainty, Finding, Frame, Severity
from ostinato.check.frames import is_folded, raised_at
from ostinato.check.op_table import load_table
from ostinato.check.pretend import World, pretence
from ostinato.check.pretend.flatten import tensors
from ostinato.check.record import Recorder
from ostinato.check.result import PassRun, Report, sorted_findings
from ostinato.check.rules import RULES
from ostinato.check.session import Progress, Settings, describe, leaks
from ostinato.check.suppress import apply_suppressions
from ostinato.check.tape import Tape, compare_with_eager
from ostinato.check.trace import Difference, compare_calls
from ostinato.errors import CheckError

_MAX_COMPARED_REPLAYS = 3


@dataclass(slots=True)
class _Capture:
    """One captured graph: its tape, and how to run its body again."""

    code: CodeType | None
    recorder: Recorder
    body: CodeType | None = None
    targets: tuple[str, ...] = ()
    space: dict[str, Any] = field(default_factory=dict)
    tape: Tape | None = None
    num_replays: int = 0
    hazards: list[Difference] = field(default_factory=list)


_ACTIVE: list[ScriptWatcher] = []


@contextlib.contextmanager
def region() -> Iterator[None]:
    """Mark what would be captured. Outside of a check it does nothing."""
    if not _ACTIVE:
        yield
        return
    with _ACTIVE[-1].marked():
        yield


class ScriptWatcher:
    """Sees the captures, replays and marked regions of a script."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world = world
        self.settings = settings
        self.captures: dict[int, _Capture] = {}
        self.marked_calls: dict[tuple[str, int], list[Recorder]] = {}
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.num_ops = 0
        self.num_replays = 0

    # ------------------------------------------------------------------ marked regions
    @contextlib.contextmanager
    def marked(self) -> Iterator[None]:
        """One run of a marked region."""
        if self.world.in_region:
            yield
            return
        frame = _user_frame()
        recorder = Recorder(self.world)
        where = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("?", 0)
        calls = self.marked_calls.setdefault(where, [])
        self.world.call += 1
        self.world.recorder = recorder
        try:
            with self.world.region():
                yield
        finally:
            self.world.recorder = None
            calls.append(recorder)
            self.num_ops += len(recorder.operations)

    # ------------------------------------------------------------------ captures
    def begin(self, graph: Any) -> None:
        """A capture begins: record it."""
        frame = _user_frame()
        self.world.call += 1
        capture = _Capture(
            frame.f_code if frame is not None else None, Recorder(self.world, keep=not self.settings.meta)
        )
        if frame is not None:
            capture.body, capture.targets = _with_body(frame.f_code.co_filename, frame.f_lineno)
        self.captures[id(graph)] = capture
        self.world.recorder = capture.recorder

    def end(self, graph: Any) -> None:
        """A capture ends: keep the tape, undo what was computed, and leave poison, as a real capture does."""
        self.world.recorder = None
        capture = self.captures[id(graph)]
        self.num_ops += len(capture.recorder.operations)
        if self.settings.meta:
            return
        frame = _running(capture.code)
        space = {**frame.f_globals, **frame.f_locals} if frame is not None else {}
        values = _values(capture.targets, space)
        if frame is not None and frame.f_code.co_name != "<module>":
            capture.space = {"": frame.f_globals, **_weakly(frame.f_locals)}
        del space, frame
        capture.tape = Tape(self.world, capture.recorder, [], values)
        capture.tape.restore()
        capture.tape.poison()

    def replay(self, graph: Any) -> None:
        """A replay: what has been freed, what would eager do, then run the tape."""
        capture = self.captures.get(id(graph))
        if capture is None or capture.tape is None:
            return
        tape = capture.tape
        self.num_replays += 1
        if capture.num_replays == 0:
            for external in tape.freed():
                shape = list(external.shape)
                text = f"the tensor of shape {shape} that is read here has been freed: its memory may hold anything"
                self._hazard("FREED_INPUT", text, "free", external.first_read, "tape")
        capture.num_replays += 1
        rng = torch.default_generator.get_state()
        frame = _running(capture.code)
        space = {**frame.f_globals, **frame.f_locals} if frame is not None else _alive(capture.space)
        del frame
        if capture.num_replays <= _MAX_COMPARED_REPLAYS and capture.body is not None and space:
            self._compare(capture, capture.body, space, tape)
        torch.default_generator.set_state(rng)
        try:
            tape.replay()
        except CheckError as error:
            self._hazard("REPLAY_DIFFERS", str(error), "replay", _where(capture), "tape")

    def _compare(self, capture: _Capture, body: CodeType, space: dict[str, Any], tape: Tape) -> None:
        """Run the body as eager code, on the state that the replay will see, and compare."""
        world = self.world
        state = tape.save()
        kept = _attributes(capture.targets, space)
        recorder = Recorder(world)
        world.call += 1
        world.recorder = recorder
        torch.default_generator.manual_seed(capture.num_replays)
        try:
            with world.region(), world.hush():
                _execute(body, space)
            eager = _values(capture.targets, space)
        except CheckedCodeError as error:
            self.notes.append(f"the body of the capture could not be run again: {error}")
            tape.load(state)
            capture.body = None
            return
        finally:
            world.recorder = None
            for owner, name, value in kept:
                setattr(owner, name, value)
        for difference in compare_calls(capture.recorder, recorder):
            if difference not in capture.hazards:
                capture.hazards.append(difference)
        mismatch = compare_with_eager(tape, eager, state, [], capture.num_replays, capture.num_replays)
        if mismatch is not None and not capture.hazards:
            self._hazard(
                "REPLAY_DIFFERS", f"replay {mismatch.call}: {mismatch.message}", "replay", _where(capture), "tape"
            )
        tape.load(state)

    # ------------------------------------------------------------------ results
    def _hazard(self, rule: str, message: str, op: str, where: Frame, found_by: str) -> None:
        world = self.world
        finding = Finding(
            RULES[rule],
            Severity.HAZARD,
            Certainty.PROVED,
            message,
            op,
            where,
            found_by,
            (where,),
            assumed=world.target.assumed(world.table.version),
        )
        if not any(f.rule is finding.rule and f.where == where for f in self.findings):
            self.findings.append(finding)

    def conclude(self) -> list[Finding]:
        """Everything that was found."""
        found = [f for f, _ in self.world.counted()]
        has_errors = any(leaks(f) for f in found)
        differences = [d for c in self.captures.values() for d in c.hazards]
        for calls in self.marked_calls.values():
            steady = calls[1:] if len(calls) > 2 else calls
            for first, second in itertools.pairwise(steady):
                differences += compare_calls(first, second)
        if has_errors and differences:
            self.notes.append(
                f"{len(differences)} differences between calls may follow from the capture errors: fix those first"
            )
            return found
        for difference in differences:
            self._hazard(difference.rule, difference.message, difference.op, difference.where, "trace")
        return found + self.findings


class CheckedCodeError(CheckError):
    """The script's own code raised, or asked to exit; the cause is in ``__cause__``."""

    def __init__(self, cause: BaseException) -> None:
        stack = raised_at(cause.__traceback__)
        place = f" at {stack[0].file}:{stack[0].line}" if stack else ""
        super().__init__(f"{describe(cause)}{place}")
        self.is_normal_exit = isinstance(cause, SystemExit) and cause.code in (None, 0)


def _execute(code: CodeType, space: dict[str, Any]) -> None:
    try:
        exec(code, space)
    except (Exception, SystemExit) as error:
        raise CheckedCodeError(error) from error


def _where(capture: _Capture) -> Frame:
    operations = capture.recorder.operations
    return operations[-1].where if operations else NOWHERE


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_folded(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _running(code: CodeType | None) -> FrameType | None:
    """The frame of this code, if it still runs. Frames are not kept: that would keep alive what the script frees."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _with_body(file: str, line: int) -> tuple[CodeType | None, tuple[str, ...]]:
    """The body of the ``with`` statement at a line, compiled at its own line numbers, and the names that it binds."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"), filename=file)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None, ()
    matches = [n for n in ast.walk(tree) if isinstance(n, ast.With) and n.lineno <= line <= (n.body[0].lineno)]
    if not matches:
        return None, ()
    node = max(matches, key=lambda n: n.lineno)
    inner = [n for statement in node.body for n in ast.walk(statement)]
    if any(isinstance(n, ast.Return | ast.Yield | ast.YieldFrom | ast.Break | ast.Continue | ast.Await) for n in inner):
        return None, ()
    targets = {
        ast.unparse(n) for n in inner if isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Store)
    }
    return compile(ast.Module(body=node.body, type_ignores=[]), file, "exec"), tuple(sorted(targets))


def _values(targets: tuple[str, ...], space: dict[str, Any]) -> dict[str, Any]:
    """What the names and attributes that a body assigns to hold; those that it never assigned are left out."""
    found: dict[str, Any] = {}
    for target in targets:
        with contextlib.suppress(NameError, AttributeError):
            found[target] = eval(target, dict(space))
    return found


def _attributes(targets: tuple[str, ...], space: dict[str, Any]) -> list[tuple[Any, str, Any]]:
    """Owner, name and value of the attributes among the targets: running the body again must not rebind them."""
    found: list[tuple[Any, str, Any]] = []
    for target in targets:
        owner, dot, name = target.rpartition(".")
        if dot:
            with contextlib.suppress(NameError, AttributeError):
                holder = eval(owner, dict(space))
                found.append((holder, name, getattr(holder, name)))
    return found


def _weakly(local: dict[str, Any]) -> dict[str, Any]:
    """A function's variables, so that nothing is kept alive that the script frees: tensors by weak reference, and no
    containers of tensors."""
    found: dict[str, Any] = {}
    for name, value in local.items():
        if isinstance(value, torch.Tensor):
            found[name] = weakref.ref(value)
        elif not isinstance(value, list | tuple | dict | set) or not tensors(
            list(value) if isinstance(value, set) else value
        ):
            found[name] = value
    return found


def _alive(space: dict[str, Any]) -> dict[str, Any]:
    """The variables again, with the globals as they are now; nothing if a tensor has been freed."""
    if not space:
        return {}
    found: dict[str, Any] = dict(space[""])
    for name, value in space.items():
        if name == "":
            continue
        found[name] = value() if isinstance(value, weakref.ref) else value
        if isinstance(value, weakref.ref) and found[name] is None:
            return {}
    return found


def check_script(path: Path, arguments: list[str], settings: Settings, progress: Progress) -> Report:
    """Run a script with a pretended GPU and report on its captures. ``arguments`` become ``sys.argv[1:]``."""
    start = time.perf_counter()
    try:
        code = compile(path.read_text(encoding="utf-8"), str(path.resolve()), "exec")
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise CheckError(f"{path} is not Python that can be compiled: {error}") from error
    module = ModuleType("__main__")
    module.__file__ = str(path.resolve())
    partial = ""
    saved_argv, saved_main = sys.argv, sys.modules["__main__"]
    with pretence(gpu=settings.gpu, torch_version=settings.torch_version, meta=settings.meta) as world:
        progress.world = world
        watcher = ScriptWatcher(world, settings)
        world.graph_class.observer = watcher
        _ACTIVE.append(watcher)
        sys.argv, sys.modules["__main__"] = [str(path), *arguments], module
        sys.path.insert(0, os.path.dirname(module.__file__))
        try:
            _execute(code, module.__dict__)
        except CheckedCodeError as error:
            partial = "" if error.is_normal_exit else f"the script ended with {error}"
        finally:
            sys.argv, sys.modules["__main__"] = saved_argv, saved_main
            sys.path.remove(os.path.dirname(module.__file__))
            _ACTIVE.pop()
        findings = watcher.conclude()
    table = load_table(settings.torch_version)
    passes = [
        PassRun("pretend", time.perf_counter() - start, f"{world.num_regions} regions, {watcher.num_ops} operations")
    ]
    if watcher.num_replays:
        passes.append(PassRun("tape", 0.0, f"{watcher.num_replays} replays"))
    return Report(
        target=str(path),
        findings=sorted_findings(apply_suppressions(findings, {module.__file__: None})),
        passes=tuple(passes),
        num_regions=world.num_regions,
        num_ops=watcher.num_ops,
        partial=partial,
        notes=(*watcher.notes, *([table.note] if table.note else [])),
        assumptions=world.target.assumed(table.version),
        opaque_ops=dict(world.opaque_ops),
        torch_version=torch.__version__,
    )
