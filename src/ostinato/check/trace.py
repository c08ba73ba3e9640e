"""The trace pass: what differs between two calls of the region is what a replay would not follow.

Only root differences are reported: what reads something that already differs is not reported again. What follows from
the values of the data is no difference, since only the operations and their host operands are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ostinato.check.finding import Frame
from ostinato.check.record import HostOperand, Name, Operation, Recorder, TensorOperand


@dataclass(frozen=True, slots=True)
class Difference:
    """One root difference. ``rule`` is a rule's name."""

    rule: str
    message: str
    op: str
    where: Frame


def _clipped(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _role(name: Name) -> str:
    return {"arg": f"argument {name[1]}", "ext": "a tensor from outside", "tmp": "a result of this call"}[name[0]]


def _compare_operands(first: Operation, second: Operation) -> list[Difference]:
    found: list[Difference] = []

    def add(rule: str, message: str) -> None:
        found.append(Difference(rule, message, first.name, first.where))

    for a, b in zip(first.operands, second.operands, strict=False):
        if a == b:
            continue
        if isinstance(a, TensorOperand) and isinstance(b, TensorOperand):
            if a.shape != b.shape:
                add("SHAPE_CHANGES", f"shape {list(a.shape)} in one call, {list(b.shape)} in the next")
            elif a.name != b.name and "ext" in (a.name[0], b.name[0]):
                what = "another tensor from outside" if a.name[0] == b.name[0] else _role(b.name)
                add("STALE_INPUT", f"one call reads {_role(a.name)}, the next {what}: a replay reads the first again")
            elif a.name != b.name:
                add("CONTROL_FLOW", f"one call reads {_role(a.name)}, the next {_role(b.name)}")
            elif (a.offset, a.stride) != (b.offset, b.stride):
                add("BAKED_OFFSET", f"offset {a.offset} in one call, {b.offset} in the next")
        elif isinstance(a, HostOperand) and isinstance(b, HostOperand):
            if a.shape != b.shape:
                add("SHAPE_CHANGES", f"a host tensor of shape {list(a.shape)} in one call, {list(b.shape)} in the next")
            else:
                add(
                    "BAKED_SCALAR",
                    f"a host tensor holds {_clipped(a.value)} in one call, {_clipped(b.value)} in the next",
                )
        else:
            add("BAKED_SCALAR", f"{_clipped(a)} in one call, {_clipped(b)} in the next")
    if len(first.operands) != len(second.operands) and not found:
        add("CONTROL_FLOW", f"{len(first.operands)} operands in one call, {len(second.operands)} in the next")
    return found


def _diverged(first: Sequence[Operation], second: Sequence[Operation], at: int) -> Difference:
    """The calls run different operations from index ``at`` on: name the one that the other call does not have."""
    a = first[at] if at < len(first) else None
    b = second[at] if at < len(second) else None
    a_comes_later = a is not None and any((o.name, o.where) == (a.name, a.where) for o in second[at:])
    b_comes_later = b is not None and any((o.name, o.where) == (b.name, b.where) for o in first[at:])
    extra_is_b = a is None or (b is not None and a_comes_later and not b_comes_later)
    extra, other = (b, a) if extra_is_b else (a, b)
    assert extra is not None
    against = f"{other.name} at line {other.where.line}" if other is not None else "nothing more"
    return Difference("CONTROL_FLOW", f"one call runs {extra.name} here, another {against}", extra.name, extra.where)


def compare_calls(first: Recorder, second: Recorder) -> list[Difference]:
    """The root differences between two recorded calls, one per rule and line."""
    found: list[Difference] = []
    tainted: set[Name] = set()
    for index in range(max(len(first.operations), len(second.operations))):
        a = first.operations[index] if index < len(first.operations) else None
        b = second.operations[index] if index < len(second.operations) else None
        if a is None or b is None or a.name != b.name:
            found.append(_diverged(first.operations, second.operations, index))
            break
        if any(name in tainted for name in a.reads):
            tainted.update(a.writes)
            continue
        differences = _compare_operands(a, b)
        if differences:
            found.extend(differences)
            tainted.update(a.writes)
    unique = {(d.rule, d.where): d for d in reversed(found)}
    return list(reversed(list(unique.values())))
