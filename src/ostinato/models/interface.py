"""What the engine asks of a model, and what a model asks of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ostinato.kv.paged import KVSpec, LayerKV
from ostinato.kv.recurrent import RecurrentSpec, RecurrentState
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Target
from ostinato.quant.blocks import BlockWeight


class WeightSource(Protocol):
    """The tensors of a checkpoint by the names that its own format gives them."""

    def __contains__(self, name: str) -> bool: ...

    def require(self, names: Iterable[str]) -> None:
        """Raise CheckpointError that lists those of ``names`` that are missing."""
        ...

    def ignore(self, *patterns: str) -> int:
        """Tensors whose whole name matches one of these regular expressions need not be read; returns how many."""
        ...

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> BlockWeight | torch.Tensor:
        """The tensor ``name``; a missing one, or one of another shape, raises CheckpointError."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened. format: ``hf`` or ``gguf``. metadata: config.json or the GGUF key-values."""

    format: str
    metadata: Mapping[str, Any]
    source: WeightSource


class Model(Protocol):
    """A decoder whose forward pass may be captured.

    vocab_size: columns of the logits. max_context: positions that it was made for. kv_specs: what each layer keeps.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    @property
    def kv_specs(self) -> Sequence[KVSpec | RecurrentSpec]: ...

    def bytes_per_step(self, num_rows: int = 1) -> int:
        """Bytes of weights that a decode step of ``num_rows`` reads; of experts the number that is to be expected."""
        ...

    def forward(
        self, batch: Batch, kv: Sequence[LayerKV | RecurrentState], rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits, float32 [M, vocab]; with ``rows`` (int64 [R]) of those rows alone, [R, vocab]."""
        ...


class Family(Protocol):
    """A family's config: everything that is known of a model before its weights are read."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    @property
    def kv_specs(self) -> Sequence[KVSpec | RecurrentSpec]: ...

    @property
    def made_bytes(self) -> int:
        """Bytes that ``build`` makes of weights and keeps beside them on a GPU, outside of the exact mode."""
        ...

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor under its Hugging Face name."""
        ...

    def build(self, checkpoint: Checkpoint, target: Target, context: int) -> Model:
        """Read, fuse and place the weights, one tensor at a time."""
        ...
