"""What is known of PyTorch's operations on a GPU, for one torch version.

The tables beside this file (``optables/2.11.json`` …) are data: for each operation that makes the host wait, the rule,
why, and ``when``: ``always``, ``sometimes`` (on shapes or solver; reported as a warning), or the name of a condition in
``conditions.py``. ``python -m ostinato.check.optables.compare`` compares a table with a real GPU.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ostinato.errors import UsageError

_DIR = Path(__file__).parent / "optables"


@dataclass(frozen=True, slots=True)
class OpEffect:
    """What an operation does beyond launching kernels. ``rule`` is a rule's name, ``when`` as in the module's text."""

    rule: str
    when: str
    why: str


@dataclass(frozen=True, slots=True)
class OpTable:
    """The table of one torch version. ``note`` says what was assumed if no table of that exact version exists."""

    version: str
    source: str
    effects: dict[str, OpEffect]
    device_namespaces: frozenset[str]
    note: str = ""


#: Effects that programs declared for their own operations: name → ``device`` (only launches kernels) or a rule's name.
_DECLARED: dict[str, str] = {}


def declare_op(name: str, effect: str) -> None:
    """Say what a custom operation does inside a capture.

    Args:
        name: ``namespace::op``, all overloads, or ``namespace::*``.
        effect: ``device`` (it only launches kernels on the current stream and uses the caching allocator), ``sync``
            (it makes the host wait), or ``dynamic`` (its output size depends on device data).

    Raises UsageError for another effect or a name without a namespace.
    """
    if effect not in ("device", "sync", "dynamic"):
        raise UsageError(f"effect {effect!r} of {name}: use 'device', 'sync' or 'dynamic'")
    if not re.fullmatch(r"\w+::(\w+|\*)", name):
        raise UsageError(f"{name!r} is not of the form namespace::op or namespace::*")
    _DECLARED[name] = effect


def declared_effect(namespace: str, op: str) -> str | None:
    """The effect that ``declare_op`` gave this operation or its namespace; None if nothing was said."""
    return _DECLARED.get(f"{namespace}::{op}") or _DECLARED.get(f"{namespace}::*")


def table_versions() -> tuple[str, ...]:
    """The torch versions that have a table, oldest first."""
    return tuple(sorted((p.stem for p in _DIR.glob("*.json")), key=lambda v: tuple(map(int, v.split(".")))))


@cache
def load_table(version: str | None = None) -> OpTable:
    """The table for a torch version like ``2.11`` (default: the running one).

    A version between two tables gets the older one; outside of them the nearest, with a note that says so.
    Raises UsageError for something that is not a version.
    """
    wanted = version or ".".join(torch.__version__.split("+")[0].split(".")[:2])
    if not re.fullmatch(r"\d+\.\d+", wanted):
        raise UsageError(f"torch version {wanted!r}: write it as major.minor, e.g. {table_versions()[-1]}")
    number = tuple(map(int, wanted.split(".")))
    known = table_versions()
    older = [v for v in known if tuple(map(int, v.split("."))) <= number]
    chosen = older[-1] if older else known[0]
    note = "" if chosen == wanted else f"no op table for torch {wanted}: the one for {chosen} was used"
    data = json.loads((_DIR / f"{chosen}.json").read_text(encoding="utf-8"))
    effects = {name: OpEffect(e["rule"], e["when"], e["why"]) for name, e in data["ops"].items()}
    return OpTable(wanted, data["source"], effects, frozenset(data["device_namespaces"]), note)
