"""GGUF models: memory-mapped, one file or split into several.

Tensors are read one at a time, straight from the mapping to where they shall live; pages that were read are given
back, so that host memory stays within the largest tensor however big the model is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

from ostinato.errors import GGUFError
from ostinato.load.gguf_header import GGUFHeader, GGUFTensor, MetaValue, parse_header
from ostinato.load.mapped import MappedFile
from ostinato.quant.blocks import BlockWeight
from ostinato.quant.gguf import pack

# How the files of a split model are called.
SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

T = TypeVar("T", int, float, bool, str)


class GGUFFile:
    """A GGUF model, opened for reading. Opening reads the header alone and checks that all data are there.

    path: the file, or any file of a split model (``NAME-00001-of-00003.gguf``), whose others lie beside it.
    Raises GGUFError: not there, not GGUF, truncated, an unsupported tensor type, a missing file of a split model.
    """

    def __init__(self, path: Path | str) -> None:
        self.paths = shard_paths(Path(path))
        self._shards = [_Shard(file, number) for number, file in enumerate(self.paths)]
        first = self._shards[0].header
        self.metadata: dict[str, MetaValue] = first.metadata
        self.version = first.version
        tensors: dict[str, GGUFTensor] = {}
        for shard in self._shards:
            _check_split(shard, len(self._shards))
            for name, tensor in shard.header.tensors.items():
                if name in tensors:
                    raise GGUFError(f"{shard.path} has tensor {name!r}, which an earlier file of the model has too")
                tensors[name] = tensor
        total = self.metadata.get("split.tensors.count")
        if len(self._shards) > 1 and total is not None and total != len(tensors):
            raise GGUFError(f"{self.paths[0]} speaks of {total} tensors in all files, but they have {len(tensors)}")
        self._tensors = MappingProxyType(tensors)

    @property
    def label(self) -> str:
        return str(self.paths[0])

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """Every tensor of every file, by name, in the files' order."""
        return self._tensors

    def require(self, key: str, kind: type[T]) -> T:
        """Metadata ``key`` as ``kind`` (an int does for a float). Raises GGUFError: not there, or of another type."""
        if key not in self.metadata:
            raise GGUFError(f"{self.label} lacks the metadata key {key!r}")
        value = self.metadata[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise GGUFError(f"{self.label}: metadata {key!r} is {type(value).__name__}, not {kind.__name__}")
        return value

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor: uint8 [rows, bytes of a row], a view of the read-only mapping. Never write to it."""
        tensor = self._find(name)
        rows = tensor.num_elements // tensor.shape[-1]
        return self._shards[tensor.shard].file.slice(tensor.start, tensor.num_bytes).view(rows, -1)

    def read(self, name: str, device: torch.device | str = "cpu") -> BlockWeight | torch.Tensor:
        """A tensor on ``device``, exactly as stored; its bytes are sent as they are and unpacked there.

        F32, F16, BF16: a tensor of the file's shape. Quantized: a BlockWeight [rows, K]; the matrices of a tensor with
        three dimensions (experts) lie under each other.
        """
        tensor = self._find(name)
        weight = pack(self.raw(name).to(device), tensor.kind, tensor.shape[-1])
        self._shards[tensor.shard].file.release(tensor.start, tensor.num_bytes)
        return weight if isinstance(weight, BlockWeight) else weight.view(tensor.shape)

    def _find(self, name: str) -> GGUFTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{self.label} has no tensor {name!r}")
        return tensor


class _Shard:
    """One file of the model and its header."""

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self.number = number
        self.file = MappedFile(path, GGUFError)
        self.header: GGUFHeader = parse_header(self.file.buffer, str(path), number)


def shard_paths(path: Path) -> list[Path]:
    """All files of the model that ``path`` belongs to, in order. Raises GGUFError that names those that are missing."""
    match = SHARD_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count, number = int(match["count"]), int(match["number"])
    if not 1 <= number <= count:
        raise GGUFError(f"{path} calls itself file {number} of {count}; rename it to what it is")
    files = [path.with_name(f"{match['prefix']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise GGUFError(f"{path.parent} lacks {', '.join(missing)}: all {count} files of a split model are needed")
    return files


def _check_split(shard: _Shard, count: int) -> None:
    """Raise GGUFError where a file's own account of the split is not what its name says."""
    metadata = shard.header.metadata
    own_count, own_number = metadata.get("split.count", 0), metadata.get("split.no", 0)
    if own_count in (0, 1) and count == 1:
        return
    if own_count != count or own_number != shard.number:
        raise GGUFError(
            f"{shard.path} holds part {own_number} (from 0) of a model in {own_count} files, and its name says "
            "otherwise; give all files their names NAME-00001-of-0000N.gguf back"
        )
