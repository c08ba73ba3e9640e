"""Writes GGUF version 3 files, whole or split.

A file appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ostinato.errors import GGUFError
from ostinato.load.gguf_header import ARRAY_TYPE, DEFAULT_ALIGNMENT, MAGIC, SCALAR_CODES, STRING_TYPE, MetaValue
from ostinato.quant.gguf import GGUF_TYPES, GGUFType
from ostinato.quant.gguf_encode import encode

_TYPE_IDS = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": 7,
    "string": STRING_TYPE,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}


@dataclass(frozen=True)
class Typed:
    """A metadata value whose type in the file is given: ``uint8`` … ``int64``, ``float32``, ``float64``, ``string``.

    For a list it is the type of its items.
    """

    type_name: str
    value: MetaValue


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor as it stands in a file. shape: rows first. raw: uint8, all its bytes in order."""

    kind: GGUFType
    shape: tuple[int, ...]
    raw: torch.Tensor


Metadata = Mapping[str, "MetaValue | Typed"]
Tensors = Mapping[str, "torch.Tensor | EncodedTensor"]


def encode_tensor(x: torch.Tensor, type_name: str) -> EncodedTensor:
    """A floating tensor of 1 to 4 dimensions as ``type_name`` (F32, F16, BF16, Q8_0, Q4_0 or Q4_1)."""
    kind = GGUF_TYPES[type_name]
    return EncodedTensor(kind, tuple(x.shape), encode(x.reshape(-1, x.shape[-1]), kind))


def write_gguf(path: Path | str, metadata: Metadata, tensors: Tensors, alignment: int = DEFAULT_ALIGNMENT) -> None:
    """Write one file.

    metadata: plain values get the narrowest common type: bool, uint32 (int32 if negative, 64 bits if they must),
    float32, string, or an array of one of these; ``Typed`` chooses. tensors: floating tensors keep their dtype.
    Raises GGUFError where a value or dtype has no type in GGUF.
    """
    path = Path(path)
    metadata = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT:
        metadata["general.alignment"] = alignment
    encoded = {name: _encoded(name, tensor) for name, tensor in tensors.items()}

    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(encoded), len(metadata)))
    for key, value in metadata.items():
        header += _string(key) + _value(key, value)
    offset = 0
    for name, tensor in encoded.items():
        header += _string(name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", tensor.kind.type_id, offset)
        offset += _padded(tensor.raw.numel(), alignment)

    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(header)
            _pad(file, alignment)
            for tensor in encoded.values():
                file.write(tensor.raw.contiguous().cpu().numpy().data)
                _pad(file, alignment)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def write_split_gguf(directory: Path, prefix: str, metadata: Metadata, tensors: Tensors, per_file: int) -> list[Path]:
    """Write ``PREFIX-00001-of-0000N.gguf`` …, each with up to ``per_file`` tensors; the first has all metadata."""
    names = list(tensors)
    parts = [names[i : i + per_file] for i in range(0, len(names), per_file)] or [[]]
    paths = []
    for number, part in enumerate(parts):
        split: dict[str, MetaValue | Typed] = {
            "split.no": Typed("uint16", number),
            "split.count": Typed("uint16", len(parts)),
            "split.tensors.count": Typed("int32", len(names)),
        }
        path = directory / f"{prefix}-{number + 1:05d}-of-{len(parts):05d}.gguf"
        write_gguf(path, {**metadata, **split} if number == 0 else split, {name: tensors[name] for name in part})
        paths.append(path)
    return paths


def _encoded(name: str, tensor: torch.Tensor | EncodedTensor) -> EncodedTensor:
    if isinstance(tensor, EncodedTensor):
        return tensor
    for kind in GGUF_TYPES.values():
        if kind.dtype == tensor.dtype:
            return encode_tensor(tensor, kind.name)
    raise GGUFError(f"cannot write tensor {name!r}: GGUF has no type for {tensor.dtype}")


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: MetaValue | Typed) -> bytes:
    """Type and bytes of a metadata value."""
    type_name = value.type_name if isinstance(value, Typed) else None
    plain = value.value if isinstance(value, Typed) else value
    items: list[MetaValue] = plain if isinstance(plain, list) else [plain]
    if isinstance(plain, list) and any(isinstance(item, list) for item in plain):
        inner = [_value(key, Typed(type_name, item) if type_name else item) for item in plain]
        # An inner value begins with the id of the array type, which the outer array states once.
        return struct.pack("<IIQ", ARRAY_TYPE, ARRAY_TYPE, len(plain)) + b"".join(part[4:] for part in inner)
    type_id = _TYPE_IDS[type_name or _natural_type(key, items)]
    try:
        body = b"".join(_packed(type_id, items))
    except struct.error as error:
        raise GGUFError(f"cannot write metadata {key!r}: {error}") from error
    if isinstance(plain, list):
        return struct.pack("<IIQ", ARRAY_TYPE, type_id, len(items)) + body
    return struct.pack("<I", type_id) + body


def _packed(type_id: int, items: list[MetaValue]) -> Iterator[bytes]:
    if type_id == STRING_TYPE:
        for item in items:
            if not isinstance(item, str):
                raise struct.error(f"{item!r} is no string")
            yield _string(item)
    else:
        yield struct.pack(f"<{len(items)}{SCALAR_CODES[type_id]}", *items)


def _natural_type(key: str, items: list[MetaValue]) -> str:
    """The type that holds all items."""
    if all(isinstance(item, bool) for item in items):
        return "bool" if items else "uint32"
    if all(isinstance(item, str) for item in items):
        return "string"
    integers = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
    if len(integers) == len(items):
        low, high = min(integers), max(integers)
        if low < 0:
            return "int32" if low >= -(1 << 31) and high < 1 << 31 else "int64"
        return "uint32" if high < 1 << 32 else "uint64"
    if all(isinstance(item, int | float) and not isinstance(item, bool) for item in items):
        return "float32"
    raise GGUFError(f"cannot write metadata {key!r}: GGUF has no type for {items[:3]!r}")
