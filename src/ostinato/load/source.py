"""What a checkpoint offers to a model, whatever its format, and the reader that lets no tensor be forgotten."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ostinato.errors import CheckpointError
from ostinato.quant.blocks import BlockWeight

_LISTED = 8  # names that an error spells out before it says how many more there are


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    shape: as PyTorch counts (rows first). type_name: ``F32``, ``BF16``, ``Q4_K`` … num_bytes: bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    num_bytes: int

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class TensorSource(Protocol):
    """A checkpoint of any format."""

    @property
    def label(self) -> str:
        """How an error message calls this checkpoint: its path."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by its name in the checkpoint, in the file's order."""
        ...

    def read(self, name: str, device: torch.device | str = "cpu") -> BlockWeight | torch.Tensor:
        """Tensor ``name`` in its stored type on ``device``: quantized types as BlockWeight, others as a tensor.

        A quantized tensor of more than two dimensions comes as its rows under each other. One tensor is in host
        memory at a time. Raises CheckpointError or GGUFError where it is not there or cannot be read.
        """
        ...


class WeightReader:
    """Reads tensors from a source and remembers which: ``finish`` fails if any was missing or left over.

    A missing tensor raises at once where the model needs it (``read``), so that a message can name all of them, call
    ``require`` with every name first.
    """

    def __init__(self, source: TensorSource, device: torch.device | str = "cpu") -> None:
        self.source = source
        self.device = torch.device(device)
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.source.tensors

    def info(self, name: str) -> TensorInfo:
        """What is known of tensor ``name``; does not count as reading it. Raises CheckpointError where missing."""
        self.require((name,))
        return self.source.tensors[name]

    def require(self, names: Iterable[str]) -> None:
        """Raise CheckpointError that lists those of ``names`` that the checkpoint lacks."""
        missing = [name for name in names if name not in self.source.tensors]
        if missing:
            raise CheckpointError(f"{self.source.label} lacks {_listing(missing)}: it is incomplete, or another model")

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> BlockWeight | torch.Tensor:
        """Tensor ``name`` on the reader's device; with ``shape``, raises CheckpointError if it has another."""
        info = self.info(name)
        if shape is not None and info.shape != shape:
            raise CheckpointError(
                f"{self.source.label}: tensor {name} has shape {list(info.shape)}, "
                f"but its configuration asks for {list(shape)}"
            )
        self._used.add(name)
        return self.source.read(name, self.device)

    def ignore(self, *patterns: str) -> int:
        """Mark tensors whose whole name matches one of these regular expressions as not needed; returns how many."""
        whole = [re.compile(pattern) for pattern in patterns]
        found = [name for name in self.source.tensors if any(p.fullmatch(name) for p in whole)]
        self._used.update(found)
        return len(found)

    def finish(self, required: Iterable[str] = ()) -> None:
        """Raise CheckpointError that lists tensors of ``required`` that are missing and tensors that nothing read."""
        missing = [name for name in required if name not in self.source.tensors]
        extra = [name for name in self.source.tensors if name not in self._used]
        problems = []
        if missing:
            problems.append(f"lacks {_listing(missing)}")
        if extra:
            problems.append(f"has {_listing(extra)} that this model does not know")
        if problems:
            raise CheckpointError(f"{self.source.label} {' and '.join(problems)}")


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"
