"""Writing a quantized checkpoint as safetensors, some rows at a time.

The sizes of all planes are known before any weight is read, so that a file's header is written first and every piece
goes to its place: no tensor stands in memory as a whole. A file has a name of its own until it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ostinato.load.quantizing import PlannedTensor
from ostinato.load.safetensors import DTYPES, INDEX, PACKED_METHOD, SINGLE
from ostinato.quant.blocks import BlockWeight, plane_columns

PARTIAL = ".partial"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. start: byte of the data where it begins."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file. tensors: by the checkpoint's names. entries: their planes, or themselves. header: its first bytes."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]
    entries: Mapping[str, Entry]
    header: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(entry.num_bytes for entry in self.entries.values())

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source_bytes for tensor in self.tensors)


def plan_shards(tensors: Mapping[str, PlannedTensor], shard_bytes: int, fingerprint: str) -> list[Shard]:
    """Files of at most ``shard_bytes`` (or of one tensor that is larger), which tell ``fingerprint``."""
    groups: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors.values():
        if not groups or size + tensor.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return [_shard(SINGLE, groups[0], fingerprint)]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, fingerprint)
        for number, group in enumerate(groups, start=1)
    ]


def _shard(file_name: str, tensors: list[PlannedTensor], fingerprint: str) -> Shard:
    entries: dict[str, Entry] = {}
    at = 0
    for tensor in tensors:
        parts = {tensor.name: (tensor.dtype, tensor.shape)}
        if tensor.kind is not None:
            columns = plane_columns(tensor.kind, tensor.shape[-1])
            parts = {f"{tensor.name}.{p}": (dtype, (*tensor.shape[:-1], wide)) for p, (wide, dtype) in columns.items()}
        for name, (dtype, shape) in parts.items():
            entries[name] = Entry(name, dtype, shape, at)
            at += entries[name].num_bytes
    kinds = {tensor.name: tensor.kind.name for tensor in tensors if tensor.kind is not None}
    header: dict[str, object] = {
        "__metadata__": {"format": "pt", PACKED_METHOD: json.dumps({"fingerprint": fingerprint, "kinds": kinds})}
    }
    for entry in entries.values():
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.start + entry.num_bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants aligned data
    return Shard(file_name, tuple(tensors), entries, len(text).to_bytes(8, "little") + text)


def is_complete(shard: Shard, directory: Path) -> bool:
    """Whether the file is there, of the size and with the header that it must have."""
    path = directory / shard.file_name
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


class Pieces(Protocol):
    """Who gives out tensors some rows at a time, with the first row of each piece (``QuantizingCheckpoint`` does)."""

    def packed_pieces(self, name: str, device: torch.device) -> Iterator[tuple[int, BlockWeight]]: ...

    def float_pieces(self, name: str, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]: ...


def write_shard(shard: Shard, source: Pieces, directory: Path, device: torch.device) -> None:
    """Quantize the tensors of a file on ``device`` and write it; it has its name when all of it is on the disk.

    Raises OSError, as of a full disk, and CheckpointError of a tensor that cannot be quantized.
    """
    path = directory / shard.file_name
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(shard.header)
        base = len(shard.header)

        def put(name: str, first_row: int, values: torch.Tensor) -> None:
            entry = shard.entries[name]
            row_bytes = entry.num_bytes // max(torch.Size(entry.shape[:-1]).numel(), 1)
            file.seek(base + entry.start + first_row * row_bytes)
            file.write(values.contiguous().cpu().flatten().view(torch.uint8).numpy().data)

        for tensor in shard.tensors:
            if tensor.kind is None:
                for first_row, values in source.float_pieces(tensor.name, device):
                    put(tensor.name, first_row, values)
            else:
                for first_row, weight in source.packed_pieces(tensor.name, device):
                    for plane, values in weight.planes().items():
                        put(f"{tensor.name}.{plane}", first_row, values)
        file.truncate(shard.num_bytes)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def index(shards: list[Shard]) -> tuple[str, bytes] | None:
    """Name and bytes of the index of several files; None of one."""
    if len(shards) == 1:
        return None
    total = sum(entry.num_bytes for shard in shards for entry in shard.entries.values())
    weight_map = {name: shard.file_name for shard in shards for name in shard.entries}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    return INDEX, text.encode() + b"\n"
