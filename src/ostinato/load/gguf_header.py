"""The header of one GGUF file: metadata and the places of its tensors.

Layout (all little-endian): magic ``GGUF``, uint32 version, uint64 number of tensors, uint64 number of metadata pairs;
the pairs; for each tensor its name, uint32 number of dimensions, uint64 dimensions (fastest first), uint32 type and
uint64 offset; padding; the data, to whose start the offsets are relative. Source: the GGUF specification
(ggml/docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

from ostinato.errors import GGUFError
from ostinato.load.source import TensorInfo
from ostinato.quant.gguf import TYPES_BY_ID, UNSUPPORTED_TYPES, GGUFType

MetaValue = int | float | bool | str | list["MetaValue"]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
STRING_TYPE, ARRAY_TYPE = 8, 9
# Value types of fixed size: id → struct code.
SCALAR_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {type_id: struct.Struct("<" + code) for type_id, code in SCALAR_CODES.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MAX_NESTING = 4  # arrays of arrays: the format allows any depth, no model uses two
_MAX_NAME_BYTES = 65535  # the format's own bound on keys


@dataclass(frozen=True)
class GGUFTensor(TensorInfo):
    """A tensor of a GGUF file. start: byte where its data begins in file number ``shard`` of the model."""

    kind: GGUFType
    start: int
    shard: int = 0


@dataclass(frozen=True)
class GGUFHeader:
    """All of a file but its data."""

    version: int
    metadata: dict[str, MetaValue]
    tensors: dict[str, GGUFTensor]


def parse_header(data: mmap.mmap | bytes, label: str, shard: int = 0) -> GGUFHeader:
    """Read the header and check it against the size of the file.

    Raises GGUFError, which begins with ``label``: not GGUF, a version other than 2 or 3, big-endian, cut short, a
    value or tensor type that is not known, or tensors that overlap or lie outside of the file.
    """
    cursor = _Cursor(data, label)
    if data[:4] != MAGIC:
        begins = f"it begins with {bytes(data[:4])!r} instead of {MAGIC!r}" if len(data) else "it is empty"
        raise GGUFError(f"{label} is not a GGUF file: {begins}")
    cursor.position = 4
    version = cursor.u32()
    if version & 0xFFFF == 0 and version:
        raise GGUFError(f"{label} is big-endian GGUF; convert it with `gguf-convert-endian` of the gguf package")
    if version not in (2, 3):
        raise GGUFError(f"{label} has GGUF version {version}; versions 2 and 3 can be read, convert the model again")
    num_tensors, num_pairs = cursor.u64(), cursor.u64()

    metadata: dict[str, MetaValue] = {}
    for _ in range(num_pairs):
        key = cursor.name()
        if key in metadata:
            raise GGUFError(f"{label} has the metadata key {key!r} twice")
        cursor.reading = f"metadata {key!r}"
        metadata[key] = cursor.value(cursor.u32())
        cursor.reading = "its header"

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise GGUFError(f"{label} has general.alignment {alignment!r}, which is no power of two")

    found = [_tensor(cursor) for _ in _counted(num_tensors, cursor)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise GGUFError(f"{label} has tensor {name!r} twice")
        if offset % alignment:
            raise GGUFError(f"{label}: tensor {name!r} is not aligned to {alignment} bytes (offset {offset})")
        num_bytes = kind.row_bytes(shape[-1])
        for size in shape[:-1]:
            num_bytes *= size
        tensors[name] = GGUFTensor(name, shape, kind.name, num_bytes, kind, data_start + offset, shard)
    _check_places(tensors, len(data), label)
    return GGUFHeader(version, metadata, tensors)


def _counted(count: int, cursor: _Cursor) -> range:
    """``range(count)`` once it is clear that the file is long enough for so many tensors."""
    cursor.expect(count * 24)  # the shortest entry
    return range(count)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGUFType, int]:
    """Name, shape (rows first), type and offset of the next tensor."""
    label = cursor.label
    name = cursor.name()
    num_dims = cursor.u32()
    if not 1 <= num_dims <= MAX_DIMS:
        raise GGUFError(f"{label}: tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape = tuple(reversed([cursor.u64() for _ in range(num_dims)]))
    if 0 in shape:
        raise GGUFError(f"{label}: tensor {name!r} is empty: its shape is {list(shape)}")
    type_id = cursor.u32()
    kind = TYPES_BY_ID.get(type_id)
    if kind is None:
        known = UNSUPPORTED_TYPES.get(type_id, "unknown")
        raise GGUFError(
            f"{label}: tensor {name!r} has type {known} (id {type_id}), which cannot be read here; "
            "use a file with F32, F16, BF16, Q4_0 … Q8_0 or Q2_K … Q6_K"
        )
    if shape[-1] % kind.block:
        raise GGUFError(
            f"{label}: tensor {name!r} has rows of {shape[-1]} elements; {kind.name} takes multiples of {kind.block}"
        )
    return name, shape, kind, cursor.u64()


def _check_places(tensors: dict[str, GGUFTensor], size: int, label: str) -> None:
    """Raise GGUFError where a tensor ends behind the file or two share bytes."""
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < end:
            raise GGUFError(f"{label}: tensors {before!r} and {tensor.name!r} overlap; the file is damaged")
        end, before = tensor.start + tensor.num_bytes, tensor.name
        if end > size:
            raise GGUFError(
                f"{label} is truncated: it has {size} bytes, but tensor {before!r} ends at byte {end}; "
                "download it again"
            )


class _Cursor:
    """A position in the header that never reads past the end of the file."""

    def __init__(self, data: mmap.mmap | bytes, label: str) -> None:
        self.data = data
        self.size = len(data)
        self.label = label
        self.position = 0
        self.reading = "its header"

    def _cut_short(self) -> GGUFError:
        return GGUFError(f"{self.label} is truncated: {self.size} bytes end inside {self.reading}; download it again")

    def expect(self, num_bytes: int) -> int:
        """The position, once it is known that ``num_bytes`` follow it."""
        if num_bytes > self.size - self.position:
            raise self._cut_short()
        return self.position

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.data, self.expect(4))[0]
        self.position += 4
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self.data, self.expect(8))[0]
        self.position += 8
        return value

    def name(self) -> str:
        """A key or a tensor's name."""
        name = self.strings(1)[0]
        assert isinstance(name, str)
        if not name or len(name) > _MAX_NAME_BYTES:
            raise GGUFError(f"{self.label} has a key or tensor name of {len(name)} characters; the file is damaged")
        return name

    def strings(self, count: int) -> list[MetaValue]:
        """``count`` strings. A vocabulary has hundreds of thousands, so this loop does as little as it can."""
        self.expect(8 * count)
        data, size, position = self.data, self.size, self.position
        length_at = _U64.unpack_from
        values: list[MetaValue] = []
        append = values.append
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(data, position)[0]
                if position > size:
                    raise self._cut_short()
                append(str(data[start:position], "utf-8"))
        except struct.error:
            raise self._cut_short() from None
        except UnicodeDecodeError as error:
            raise GGUFError(f"{self.label}: {self.reading} has a string that is not UTF-8 ({error.reason})") from None
        self.position = position
        return values

    def value(self, type_id: int, depth: int = 0) -> MetaValue:
        """A metadata value of type ``type_id``."""
        scalar = _SCALARS.get(type_id)
        if scalar is not None:
            value: MetaValue = scalar.unpack_from(self.data, self.expect(scalar.size))[0]
            self.position += scalar.size
            return value
        if type_id == STRING_TYPE:
            return self.strings(1)[0]
        if type_id == ARRAY_TYPE and depth < _MAX_NESTING:
            return self._array(depth + 1)
        raise GGUFError(f"{self.label}: {self.reading} has value type {type_id}, which GGUF does not know")

    def _array(self, depth: int) -> list[MetaValue]:
        type_id, count = self.u32(), self.u64()
        if type_id == STRING_TYPE:
            return self.strings(count)
        code = SCALAR_CODES.get(type_id)
        if code is None:
            self.expect(12 * count)  # the shortest inner array
            return [self.value(type_id, depth) for _ in range(count)]
        num_bytes = count * _SCALARS[type_id].size
        values = struct.unpack_from(f"<{count}{code}", self.data, self.expect(num_bytes))
        self.position += num_bytes
        return list(values)
