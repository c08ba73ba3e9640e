"""A weak reference to a storage, which also keeps its address from being used again."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class StorageRef:
    """Whether a storage still lives. While this object lives, no other storage gets the same address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ref = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @property
    def is_dead(self) -> bool:
        """Whether the storage has been freed."""
        return bool(self._ref.expired())  # type: ignore[no-untyped-call]  # as above
