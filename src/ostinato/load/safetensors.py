"""Hugging Face checkpoints: a directory with ``config.json`` and safetensors, in one file or in shards.

The files are mapped and read here, one tensor at a time, rather than through the safetensors package: it keeps what it
has read of a file mapped and resident until the file is closed, and a shard may be larger than the memory.
Source of the layout: uint64 length of a JSON header, the header, the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ostinato.errors import CheckpointError
from ostinato.load.mapped import MappedFile
from ostinato.load.source import TensorInfo

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class SafeTensor(TensorInfo):
    """A tensor of a safetensors file. start: byte of the file where its data begin."""

    dtype: torch.dtype
    file: MappedFile
    start: int


class HFCheckpoint:
    """A Hugging Face checkpoint, opened for reading: the headers of all its files are read and checked.

    config: ``config.json`` as a dict. Raises CheckpointError: no config.json, no safetensors, a missing shard, a
    tensor that the index promises and its shard lacks, a truncated or damaged file.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = _read_json(self.directory / CONFIG)
        self._tensors = MappingProxyType(self._open())

    @property
    def label(self) -> str:
        return str(self.directory)

    @property
    def tensors(self) -> Mapping[str, SafeTensor]:
        """Every tensor by name."""
        return self._tensors

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor on ``device``, in its own dtype or, if it is floating, in ``dtype``; shares no memory with the file.

        Raises CheckpointError where there is no such tensor.
        """
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}")
        values = torch.empty(info.num_elements, dtype=info.dtype, device=device)
        values.view(torch.uint8).copy_(info.file.slice(info.start, info.num_bytes))
        info.file.release(info.start, info.num_bytes)
        if dtype is not None and values.is_floating_point():
            values = values.to(dtype)
        return values.view(info.shape)

    def _open(self) -> dict[str, SafeTensor]:
        if not (self.directory / INDEX).is_file():
            return _read_header(self._only_file())
        weight_map = _read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{self.directory / INDEX} has no weight_map from tensors to files")
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise CheckpointError(f"{self.directory / INDEX} names files outside of its directory: {outside[0]}")
        missing = [shard for shard in shards if not (self.directory / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {', '.join(missing)} ({len(missing)} of {len(shards)} files of the model); "
                "download it again"
            )
        headers = {shard: _read_header(self.directory / shard) for shard in shards}
        absent = [name for name, shard in weight_map.items() if name not in headers[shard]]
        if absent:
            raise CheckpointError(
                f"{self.directory / weight_map[absent[0]]} lacks tensor {absent[0]!r} ({len(absent)} in all) that "
                f"{INDEX} promises; download it again"
            )
        return {name: headers[shard][name] for name, shard in weight_map.items()}

    def _only_file(self) -> Path:
        """The file of a checkpoint without an index."""
        if (self.directory / SINGLE).is_file():
            return self.directory / SINGLE
        files = sorted(self.directory.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"{self.directory} has {len(files)} safetensors files but no {INDEX}")
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.directory} has its weights as pickles ({pickles[0]}), which can run code when they are "
                "opened; convert them to safetensors"
            )
        raise CheckpointError(f"{self.directory} has neither {SINGLE} nor {INDEX}: its weights are missing")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is not there or is not one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}: it is no Hugging Face checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _read_header(path: Path) -> dict[str, SafeTensor]:
    """The tensors of one file, checked against its size. Raises CheckpointError where it is truncated or damaged."""
    file = MappedFile(path, CheckpointError)
    length = int.from_bytes(file.buffer[:8], "little")
    data_start = 8 + length
    if file.size < 8 or length > _MAX_HEADER_BYTES or data_start > file.size:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {file.size} bytes; download it again")
    try:
        header = json.loads(bytes(file.buffer[8:data_start]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object")
    return {name: _tensor(name, entry, file, data_start) for name, entry in header.items() if name != "__metadata__"}


def _tensor(name: str, entry: Any, file: MappedFile, data_start: int) -> SafeTensor:
    """One entry of a header."""
    match entry:
        case {"dtype": str(type_name), "shape": [*sizes], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise CheckpointError(f"{file.path}: the header's entry of tensor {name!r} is damaged")
    dtype = _DTYPES.get(type_name)
    if dtype is None:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} has type {type_name}, which cannot be read here ({', '.join(_DTYPES)} can)"
        )
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or not 0 <= begin <= end:
        raise CheckpointError(f"{file.path}: the header's entry of tensor {name!r} is damaged")
    shape = tuple(sizes)
    if end - begin != prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{file.path}: tensor {name!r} has {end - begin} bytes, not those of {shape} {type_name}")
    if data_start + end > file.size:
        raise CheckpointError(
            f"{file.path} is truncated: it has {file.size} bytes, but tensor {name!r} ends at byte "
            f"{data_start + end}; download it again"
        )
    return SafeTensor(name, shape, type_name, end - begin, dtype, file, data_start + begin)
