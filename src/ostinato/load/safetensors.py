"""Hugging Face checkpoints: a directory with ``config.json`` and safetensors, in one file or in shards.

The files are mapped and read here, one tensor at a time, rather than through the safetensors package: it keeps what it
has read of a file mapped and resident until the file is closed, and a shard may be larger than the memory.
Source of the layout: uint64 length of a JSON header, the header, the data (github.com/huggingface/safetensors).

A directory that ``ostinato convert`` made holds block-quantized tensors as their planes, ``NAME.words``, ``NAME.d`` …,
each of the tensor's leading dimensions; a file's ``__metadata__`` names their kinds.
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
from ostinato.load.staging import staging
from ostinato.quant.blocks import KINDS, BlockKind, BlockWeight, plane_columns

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED_METHOD = "ostinato"  # quant_method of a packed checkpoint, and the key of the kinds in a file's __metadata__
PACKED_VERSION = 1

_STAGED_BYTES = 1 << 20  # less is not worth a thread
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
DTYPES = {
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


@dataclass(frozen=True)
class PackedTensor(TensorInfo):
    """A block-quantized tensor. planes: by BlockWeight's names."""

    kind: BlockKind
    planes: Mapping[str, SafeTensor]


class HFCheckpoint:
    """A Hugging Face checkpoint, opened for reading: the headers of all its files are read and checked.

    config: ``config.json`` as a dict. packed: where ``ostinato convert`` made the directory, what it says of that,
    which ``config`` then does not have. Raises CheckpointError: no config.json, no safetensors, a missing shard, a
    tensor that the index promises and its shard lacks, a truncated or damaged file.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = _read_json(self.directory / CONFIG)
        self.packed = self._take_packed()
        self._tensors = MappingProxyType(self._open())

    @property
    def label(self) -> str:
        return str(self.directory)

    @property
    def tensors(self) -> Mapping[str, SafeTensor | PackedTensor]:
        """Every tensor by name."""
        return self._tensors

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def read(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> BlockWeight | torch.Tensor:
        """A tensor on ``device``, in its own dtype or, if it is floating, in ``dtype``; shares no memory with the file.

        A packed tensor comes as a BlockWeight, one of three dimensions with its matrices under each other.
        Raises CheckpointError where there is no such tensor.
        """
        info = self._find(name)
        if isinstance(info, PackedTensor):
            rows, columns = info.num_elements // info.shape[-1], info.shape[-1]
            planes = {plane: _read(part, device).view(rows, -1) for plane, part in info.planes.items()}
            return BlockWeight(info.kind, (rows, columns), **planes)
        values = _read(info, device)
        if dtype is not None and values.is_floating_point():
            values = values.to(dtype)
        return values.view(info.shape)

    def read_rows(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Rows start … stop - 1 of a tensor that is not packed, all its dimensions but the last one taken as one."""
        info = self._find(name)
        assert isinstance(info, SafeTensor)
        row_bytes = info.shape[-1] * info.dtype.itemsize
        return _read(info, device, start * row_bytes, (stop - start) * row_bytes).view(stop - start, info.shape[-1])

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        parts = (p for t in self._tensors.values() for p in (t.planes.values() if isinstance(t, PackedTensor) else [t]))
        return sorted({part.file.path for part in parts})

    def _find(self, name: str) -> SafeTensor | PackedTensor:
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}")
        return info

    def _take_packed(self) -> dict[str, Any] | None:
        found = self.config.get("quantization_config")
        if not isinstance(found, dict) or found.get("quant_method") != PACKED_METHOD:
            return None
        if found.get("version") != PACKED_VERSION:
            raise CheckpointError(
                f"{self.directory} is packed in version {found.get('version')} of the format, and this Ostinato reads "
                f"{PACKED_VERSION}: convert it again, or update Ostinato"
            )
        del self.config["quantization_config"]
        return found

    def _open(self) -> dict[str, SafeTensor | PackedTensor]:
        if not (self.directory / INDEX).is_file():
            return _pack(*_read_header(self._only_file()))
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
        absent = [name for name, shard in weight_map.items() if name not in headers[shard][0]]
        if absent:
            raise CheckpointError(
                f"{self.directory / weight_map[absent[0]]} lacks tensor {absent[0]!r} ({len(absent)} in all) that "
                f"{INDEX} promises; download it again"
            )
        kinds = {name: kind for _, found in headers.values() for name, kind in found.items()}
        return _pack({name: headers[shard][0][name] for name, shard in weight_map.items()}, kinds)

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


def _read(info: SafeTensor, device: torch.device | str, start: int = 0, num_bytes: int | None = None) -> torch.Tensor:
    """Bytes of a tensor as its dtype, flat, straight from the mapping to ``device``."""
    count = info.num_bytes if num_bytes is None else num_bytes
    values = torch.empty(count // info.dtype.itemsize, dtype=info.dtype, device=device)
    if values.is_cuda and count >= _STAGED_BYTES:
        staging(values.device).read(info.file.path, info.start + start, values.view(torch.uint8))
        return values
    values.view(torch.uint8).copy_(info.file.slice(info.start + start, count))
    info.file.release(info.start + start, count)
    return values


def _pack(tensors: dict[str, SafeTensor], kinds: Mapping[str, str]) -> dict[str, SafeTensor | PackedTensor]:
    """The planes of each tensor that ``kinds`` names joined, in the place of the first. Raises CheckpointError."""
    packed: dict[str, PackedTensor] = {}
    planes: dict[str, str] = {}
    for name, kind_name in kinds.items():
        if kind_name not in KINDS:
            raise CheckpointError(f"tensor {name!r} is packed as {kind_name}, which is not known: update Ostinato")
        kind = KINDS[kind_name]
        words = tensors.get(f"{name}.words")
        if words is None:
            raise CheckpointError(f"tensor {name!r} lacks its plane words: convert the model again")
        columns = words.shape[-1] * (4 if kind.bits == 8 else 8)
        found: dict[str, SafeTensor] = {}
        for plane, (wide, dtype) in plane_columns(kind, columns).items():
            part = tensors.get(f"{name}.{plane}")
            if part is None or part.shape != (*words.shape[:-1], wide) or part.dtype != dtype:
                raise CheckpointError(
                    f"{words.file.path}: plane {plane} of tensor {name!r} ({kind_name}) is missing or not of shape "
                    f"{[*words.shape[:-1], wide]}; convert the model again"
                )
            found[plane] = part
            planes[part.name] = name
        size = sum(part.num_bytes for part in found.values())
        packed[name] = PackedTensor(name, (*words.shape[:-1], columns), kind_name, size, kind, found)
    joined: dict[str, SafeTensor | PackedTensor] = {}
    for plane_name, tensor in tensors.items():
        owner = planes.get(plane_name)
        if owner is None:
            joined[plane_name] = tensor
        else:
            joined[owner] = packed[owner]
    return joined


def _read_header(path: Path) -> tuple[dict[str, SafeTensor], dict[str, str]]:
    """The tensors of one file, checked against its size, and the kinds of those that are packed.

    Raises CheckpointError where it is truncated or damaged.
    """
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
    metadata = header.pop("__metadata__", {})
    tensors = {name: _tensor(name, entry, file, data_start) for name, entry in header.items()}
    return tensors, _kinds(path, metadata)


def _kinds(path: Path, metadata: Any) -> dict[str, str]:
    """Tensor → kind of a packed file; empty for any other."""
    if not isinstance(metadata, dict) or PACKED_METHOD not in metadata:
        return {}
    try:
        kinds = json.loads(metadata[PACKED_METHOD])["kinds"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} does not say how it is packed ({error}): convert the model again") from error
    return {str(name): str(kind) for name, kind in kinds.items()}


def _tensor(name: str, entry: Any, file: MappedFile, data_start: int) -> SafeTensor:
    """One entry of a header."""
    match entry:
        case {"dtype": str(type_name), "shape": [*sizes], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise CheckpointError(f"{file.path}: the header's entry of tensor {name!r} is damaged")
    dtype = DTYPES.get(type_name)
    if dtype is None:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} has type {type_name}, which cannot be read here ({', '.join(DTYPES)} can)"
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
