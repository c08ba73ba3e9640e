"""Which tensor of a checkpoint becomes which kind of block, by its Hugging Face name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ostinato.errors import UsageError
from ostinato.quant.blocks import KINDS, BlockKind

GROUPS = (128, 64, 32)
DEFAULT_GROUP = 64
HEADS = {"int6": "I6_64", "int8": "I8_64"}
SCHEMES = ("int4", *(f"int4-g{group}" for group in reversed(GROUPS)))

_HEAD = re.compile(r"(.*\.)?(embed_tokens|lm_head)\.weight")
# Small, and what they decide is worth more than their bytes: routing, gates, the delta rule's decay and rate.
_KEPT = re.compile(
    r".*(\.bias|norm\w*\.weight|\.gate\.weight|shared_expert_gate\.weight|in_proj_(a|b|ba)\.weight"
    r"|conv1d\.weight|\.A_log|\.dt_bias)"
)


@dataclass(frozen=True)
class Scheme:
    """group: columns that share a scale of four-bit matrices. head: of embedding and output matrix, a key of HEADS."""

    group: int = DEFAULT_GROUP
    head: str = "int6"

    def __str__(self) -> str:
        return f"int4-g{self.group}"

    def kind_for(self, name: str, shape: tuple[int, ...]) -> BlockKind | None:
        """The kind of a tensor of floats; None where it stays as it is.

        Where K is no multiple of the group, the largest smaller group that divides it is taken; where none does, the
        tensor stays as it is.
        """
        if len(shape) not in (2, 3) or _KEPT.fullmatch(name):
            return None
        if _HEAD.fullmatch(name):
            kind = KINDS[HEADS[self.head]]
            return kind if shape[-1] % kind.block == 0 else None
        group = next((g for g in GROUPS if g <= self.group and shape[-1] % g == 0), None)
        return None if group is None else KINDS[f"I4_{group}"]


def parse_scheme(text: str, head: str = "int6") -> Scheme:
    """``int4`` or ``int4-g32``, ``-g64``, ``-g128``. Raises UsageError."""
    if text not in SCHEMES:
        raise UsageError(f"--quant {text} is not known; use {', '.join(SCHEMES)}")
    if head not in HEADS:
        raise UsageError(f"--head {head} is not known; use {' or '.join(HEADS)}")
    return Scheme(DEFAULT_GROUP if text == "int4" else int(text.removeprefix("int4-g")), head)
