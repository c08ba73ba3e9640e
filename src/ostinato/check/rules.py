"""The rules: stable codes, and where ``ostinato explain`` finds their sections.

CG1xx: capture fails. CG2xx: capture works and a replay is wrong. CG3xx: the checker does not know. CG4xx: a replay pays
for nothing. The sections themselves stand in ``capture-rules.md`` beside this file, which ``docs/`` repeats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ostinato.errors import UsageError


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: ``code`` and ``name`` never change meaning once released."""

    code: str
    name: str
    title: str
    remedy: str

    @property
    def anchor(self) -> str:
        """The anchor of the rule's section in ``docs/capture-rules.md``."""
        return f"{self.code}-{self.name}".lower()


_ALL = (
    Rule(
        "CG101",
        "D2H_SYNC",
        "the host waits for device data",
        "keep the value on the device (torch.where, masks, index tensors), or read it after the replay",
    ),
    Rule(
        "CG102",
        "DYNAMIC_SHAPE",
        "an output size depends on device data",
        "use a fixed-size form: a mask, scatter_add_ into a fixed buffer, topk, output_size=, nonzero_static",
    ),
    Rule(
        "CG103",
        "H2D_PAGEABLE",
        "pageable host memory is copied to the device",
        "make the tensor once before capture, or build it on the device (arange, full, fill_), and copy_ into it",
    ),
    Rule(
        "CG104",
        "H2D_BLOCKING",
        "a pinned copy to the device blocks the host",
        "pass non_blocking=True, and keep the pinned buffer alive; better, copy before the replay",
    ),
    Rule(
        "CG105",
        "STREAM_SYNC",
        "the host synchronises with a stream, event or device",
        "synchronise outside the region; inside, order streams with wait_stream or wait_event",
    ),
    Rule(
        "CG106",
        "DEVICE_MISMATCH",
        "a host tensor meets a device tensor",
        "move the host tensor to the device once, before capture",
    ),
    Rule(
        "CG107",
        "RNG_UNREGISTERED",
        "a device generator that the graph does not know",
        "call graph.register_generator_state(generator) before capture, or use the default generator",
    ),
    Rule(
        "CG108",
        "ALLOCATOR",
        "the caching allocator is told to release or reconfigure memory",
        "do it before capture",
    ),
    Rule(
        "CG109",
        "RAISED",
        "the region raised an exception",
        "run the callable outside a capture until it returns; some code refuses to run while a stream is capturing",
    ),
    Rule(
        "CG110",
        "STREAM_FORK",
        "a side stream is not forked from, or not joined to, the capturing stream",
        "side.wait_stream(torch.cuda.current_stream()) before, torch.cuda.current_stream().wait_stream(side) after",
    ),
    Rule(
        "CG111",
        "CAPTURABLE",
        "an optimizer that counts its steps on the host",
        "construct the optimizer with capturable=True",
    ),
    Rule(
        "CG201",
        "BAKED_SCALAR",
        "a host number differs from call to call",
        "keep the number in a device tensor, and update that in place (step.add_(1), copy_ before the replay)",
    ),
    Rule(
        "CG202",
        "BAKED_OFFSET",
        "a view starts somewhere else in the next call",
        "index with a device tensor (index_copy_, index_select, scatter_), not with a Python number",
    ),
    Rule(
        "CG203",
        "SHAPE_CHANGES",
        "a shape differs from call to call",
        "allocate the largest shape once, mask the rest; or capture one graph per bucket",
    ),
    Rule(
        "CG204",
        "STALE_INPUT",
        "the next call reads another tensor than the captured one",
        "write state in place (copy_, index_copy_), do not rebind it",
    ),
    Rule(
        "CG205",
        "CONTROL_FLOW",
        "the next call runs other operations",
        "choose with torch.where on the device, or capture one graph for each branch",
    ),
    Rule(
        "CG206",
        "FREED_INPUT",
        "a tensor that the graph reads has been freed",
        "keep a reference to it for as long as the graph lives",
    ),
    Rule(
        "CG207",
        "H2D_PINNED",
        "a replay reads this pinned host buffer again",
        "keep the buffer alive, and change it only between replays; better, copy before the replay",
    ),
    Rule(
        "CG208",
        "DATA_PTR",
        "Python reads a device address",
        "do not decide or cache by address: the graph keeps the address that it saw",
    ),
    Rule(
        "CG209",
        "RNG_SEED",
        "seeding inside the region",
        "seed before the replay; the graph advances the generator by itself",
    ),
    Rule(
        "CG210",
        "WRONG_DEVICE",
        "work on a device whose stream is not capturing",
        "capture on an explicit stream of the tensors' own device: with torch.cuda.device(t.device): ...",
    ),
    Rule(
        "CG211",
        "FROZEN_WARMUP",
        "a value from the warm-up call is used for ever",
        "compute it in the step, or update it in place whenever the data changes",
    ),
    Rule(
        "CG212",
        "UNREAD_INPUT",
        "a declared input is never read by the region",
        "check the name or key that was to share it; what is copied into it changes nothing",
    ),
    Rule(
        "CG213",
        "OUT_RESIZED",
        "an output buffer has the wrong size and was reallocated",
        "allocate the buffer with the exact shape of the result, and check it",
    ),
    Rule(
        "CG214",
        "REPLAY_DIFFERS",
        "replay and eager give different values on fresh inputs",
        "make every value that changes a device tensor that is read in the region",
    ),
    Rule(
        "CG215",
        "D2H_PINNED",
        "the graph copies to pinned host memory",
        "read the buffer only after the replay's event; keep it alive as long as the graph",
    ),
    Rule(
        "CG216",
        "FALLBACK",
        "a buffer that can be None chooses the path",
        "raise if the buffer is missing; the graph keeps whichever path was there at capture",
    ),
    Rule(
        "CG301",
        "OPAQUE_OP",
        "an operation whose effects are not known",
        "declare it: ostinato.check.declare_op('ns::name', 'device'), if it neither syncs nor allocates",
    ),
    Rule(
        "CG302",
        "VALUE_LOST",
        "an operation has no CPU kernel: made-up values follow",
        "check this part on a GPU",
    ),
    Rule(
        "CG303",
        "NOT_EXECUTED",
        "a branch was not reached",
        "give argument sets that reach it, or capture it by itself",
    ),
    Rule(
        "CG304",
        "HOST_COMPUTE",
        "a host tensor operation runs at capture only",
        "compute it on the device, or before the replay",
    ),
    Rule(
        "CG305",
        "UNUSED_SUPPRESSION",
        "a suppression that suppresses nothing",
        "remove the comment",
    ),
    Rule(
        "CG401",
        "STEP_ALLOCATION",
        "every replay fills or repeats a large tensor",
        "allocate it once; use views (expand) or fused forms instead of repeated copies",
    ),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}
_BY_CODE: dict[str, Rule] = {rule.code: rule for rule in _ALL}


def rule(key: str) -> Rule:
    """The rule with this code (``CG104``) or name (``H2D_BLOCKING``), in any case.

    Raises UsageError for an unknown one.
    """
    wanted = key.strip().upper()
    found = _BY_CODE.get(wanted) or RULES.get(wanted)
    if found is None:
        raise UsageError(f"no rule {key!r}; the rules are {', '.join(_BY_CODE)}")
    return found


def all_rules() -> tuple[Rule, ...]:
    """Every rule, in the order of the codes."""
    return _ALL


@cache
def _sections() -> dict[str, str]:
    text = (Path(__file__).parent / "capture-rules.md").read_text(encoding="utf-8")
    sections: dict[str, str] = {}
    for part in text.split("\n## ")[1:]:
        sections[part.split(maxsplit=1)[0]] = "## " + part.rstrip() + "\n"
    return sections


def explain(key: str) -> str:
    """The Markdown section of a rule: why, how it shows at run time, the remedy with before and after."""
    return _sections()[rule(key).code]
