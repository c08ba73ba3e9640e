"""The tensor types of GGUF files, and their blocks split into the planes of ``BlockWeight``.

``pack`` only moves bits: scales keep the file's bytes, quants are reordered, so ``dequantize(pack(raw))`` equals what
llama.cpp computes from the same bytes, bit for bit. It is integer arithmetic on whole words and runs where the bytes
are, so that a loader may send the file's bytes to a GPU and unpack them there.

Source of the block structures: ggml-common.h of llama.cpp, read for facts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ostinato.errors import KernelError
from ostinato.quant.blocks import KINDS, BlockWeight, plane_columns

Planes = dict[str, torch.Tensor]

# Blocks are packed a few at a time, so that temporaries are small beside the tensor. On a CPU a chunk of a small tensor
# also stays below the size from which PyTorch splits an operation over threads (32768 elements): hundreds of tiny
# parallel regions are no gain on an idle machine, and on a busy one each of them waits for a core.
_CHUNK_BYTES_GPU = 1 << 28
_CHUNK_BYTES_CPU = 1 << 22
_CHUNK_BYTES_SMALL = 1 << 16


def _chunk_bytes(raw: torch.Tensor) -> int:
    if raw.device.type != "cpu":
        return _CHUNK_BYTES_GPU
    return _CHUNK_BYTES_CPU if raw.numel() >= _CHUNK_BYTES_CPU else _CHUNK_BYTES_SMALL


@dataclass(frozen=True)
class GGUFType:
    """One tensor type of the format.

    block: elements in a block. num_bytes: bytes of a block. dtype: set for the types that are not quantized.
    """

    name: str
    type_id: int
    block: int
    num_bytes: int
    dtype: torch.dtype | None = None

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of ``k`` elements (a multiple of ``block``)."""
        return k // self.block * self.num_bytes


GGUF_TYPES: MappingProxyType[str, GGUFType] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            GGUFType("F32", 0, 1, 4, torch.float32),
            GGUFType("F16", 1, 1, 2, torch.float16),
            GGUFType("BF16", 30, 1, 2, torch.bfloat16),
            GGUFType("Q4_0", 2, 32, 18),
            GGUFType("Q4_1", 3, 32, 20),
            GGUFType("Q5_0", 6, 32, 22),
            GGUFType("Q5_1", 7, 32, 24),
            GGUFType("Q8_0", 8, 32, 34),
            GGUFType("Q2_K", 10, 256, 84),
            GGUFType("Q3_K", 11, 256, 110),
            GGUFType("Q4_K", 12, 256, 144),
            GGUFType("Q5_K", 13, 256, 176),
            GGUFType("Q6_K", 14, 256, 210),
        )
    }
)

TYPES_BY_ID: MappingProxyType[int, GGUFType] = MappingProxyType({kind.type_id: kind for kind in GGUF_TYPES.values()})

# Types that exist but that nothing here reads: an error can then call them by their name.
UNSUPPORTED_TYPES: MappingProxyType[int, str] = MappingProxyType(
    {
        9: "Q8_1",
        15: "Q8_K",
        16: "IQ2_XXS",
        17: "IQ2_XS",
        18: "IQ3_XXS",
        19: "IQ1_S",
        20: "IQ4_NL",
        21: "IQ3_S",
        22: "IQ2_S",
        23: "IQ4_XS",
        24: "I8",
        25: "I16",
        26: "I32",
        27: "I64",
        28: "F64",
        29: "IQ1_M",
        34: "TQ1_0",
        35: "TQ2_0",
        39: "MXFP4",
        40: "NVFP4",
        41: "Q1_0",
    }
)


def pack(raw: torch.Tensor, kind: GGUFType, k: int) -> BlockWeight | torch.Tensor:
    """The weight that N rows of a file's bytes mean, on the device of ``raw``, sharing no memory with it.

    raw: uint8 [N, bytes of a row], contiguous. k: elements of a row, a multiple of the type's block.
    Returns a BlockWeight of shape (N, k) or, for F32, F16 and BF16, a tensor [N, k] of that dtype.
    Raises KernelError where raw does not have that shape or dtype.
    """
    if k % kind.block or raw.dtype != torch.uint8 or raw.dim() != 2 or raw.shape[1] != kind.row_bytes(k):
        raise KernelError(
            f"{kind.name} rows of {k} elements come as uint8 [N, {kind.row_bytes(k)}] with k a multiple of "
            f"{kind.block}, got {raw.dtype} {list(raw.shape)}"
        )
    raw = raw.contiguous()
    if raw.storage_offset() % 8:  # views as wider integers need an aligned start
        raw = raw.clone()
    n = raw.shape[0]
    if kind.dtype is not None:
        values = torch.empty(n, k, dtype=kind.dtype, device=raw.device)
        values.view(torch.uint8).copy_(raw)
        return values

    columns = plane_columns(KINDS[kind.name], k)
    planes = {name: torch.empty(n, wide, dtype=dtype, device=raw.device) for name, (wide, dtype) in columns.items()}
    split = _SPLIT[kind.name]
    blocks_per_row = k // kind.block
    blocks = raw.view(n * blocks_per_row, kind.num_bytes)
    per_block = {name: plane.view(n * blocks_per_row, -1) for name, plane in planes.items()}
    chunk = _chunk_bytes(raw) // kind.num_bytes
    for start in range(0, blocks.shape[0], chunk):
        part = slice(start, start + chunk)
        split(blocks[part], {name: plane[part] for name, plane in per_block.items()})
    return BlockWeight(KINDS[kind.name], (n, k), **planes)


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def _copy(blocks: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """Copy the bytes from ``start`` of every block into ``out`` [B, …], in the widest integers that fit."""
    length = out.shape[1] * out.element_size()
    unit = next(u for u in (8, 4, 2, 1) if not (blocks.shape[1] % u or start % u or length % u))
    wide = _INTEGERS[unit]
    out.view(wide).copy_(blocks.view(wide)[:, start // unit : (start + length) // unit])


def _cut(blocks: torch.Tensor, start: int, length: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Bytes [start, start + length) of every block, as a fresh tensor [B, length / itemsize] of ``dtype``."""
    out = torch.empty(blocks.shape[0], length // dtype.itemsize, dtype=dtype, device=blocks.device)
    _copy(blocks, start, out)
    return out


def _split_q4_0(blocks: torch.Tensor, out: Planes) -> None:
    """d, 16 bytes of nibbles whose order is that of ``words`` already."""
    _copy(blocks, 0, out["d"])
    _copy(blocks, 2, out["words"])


def _split_q4_1(blocks: torch.Tensor, out: Planes) -> None:
    """d, m, nibbles."""
    _copy(blocks, 0, out["d"])
    _copy(blocks, 2, out["m"])
    _copy(blocks, 4, out["words"])


def _spread_fifth_bits(bits: torch.Tensor, out: torch.Tensor) -> None:
    """Move bit 4t + i of every int32 (t < 8, i < 4) to bit t + 8i.

    The product puts bit i of a nibble at 8i: the four shifted copies meet in no bit, so nothing carries.
    """
    out.zero_()
    for t in range(8):
        nibble = (bits >> (4 * t)) & 15
        out |= ((nibble * 0x00204081) & 0x01010101) << t


def _split_q5_0(blocks: torch.Tensor, out: Planes) -> None:
    """d, one int32 of fifth bits, nibbles."""
    _copy(blocks, 0, out["d"])
    _spread_fifth_bits(_cut(blocks, 2, 4), out["high"])
    _copy(blocks, 6, out["words"])


def _split_q5_1(blocks: torch.Tensor, out: Planes) -> None:
    """d, m, one int32 of fifth bits, nibbles."""
    _copy(blocks, 0, out["d"])
    _copy(blocks, 2, out["m"])
    _spread_fifth_bits(_cut(blocks, 4, 4), out["high"])
    _copy(blocks, 8, out["words"])


def _split_q8_0(blocks: torch.Tensor, out: Planes) -> None:
    """d, 32 int8."""
    _copy(blocks, 0, out["d"])
    _copy(blocks, 2, out["words"])


def _split_q2_k(blocks: torch.Tensor, out: Planes) -> None:
    """16 bytes of sub-scale and sub-minimum nibbles, 64 bytes of 2-bit quants, d, dmin.

    Two bits at position 2s of byte l of half h are element 128h + 32s + l.
    """
    sub = _cut(blocks, 0, 16)
    torch.bitwise_and(sub, 0x0F0F0F0F, out=out["sub_d"].view(torch.int32))
    torch.bitwise_and(sub >> 4, 0x0F0F0F0F, out=out["sub_m"].view(torch.int32))
    _copy(blocks, 80, out["d"])
    _copy(blocks, 82, out["m"])
    low = _cut(blocks, 16, 64, torch.int64).view(-1, 2, 2, 2)  # [B, half, elements 0-15 | 16-31, 8 bytes each]
    words = out["words"].view(torch.int64).view(-1, 2, 4, 2)
    for s in range(4):
        pairs = (low >> (2 * s)) & 0x0303030303030303
        torch.bitwise_or(pairs[:, :, 0], pairs[:, :, 1] << 4, out=words[:, :, s])


def _split_q3_k(blocks: torch.Tensor, out: Planes) -> None:
    """32 bytes of third bits, 64 bytes of 2-bit quants, 12 bytes of 6-bit sub-scales, d.

    Elements as in Q2_K; bit 4h + s of byte l of the third bits belongs to element 128h + 32s + l.
    Sub-scale j has its lower four bits in nibble j // 8 of byte j % 8, its upper two at position 2 (j // 4) of byte
    8 + j % 4, and is stored with 32 added.
    """
    low_scales = _cut(blocks, 96, 8)
    high_scales = _cut(blocks, 104, 4)
    sub = out["sub_d"].view(torch.int32)
    for word in range(4):  # four sub-scales at a time
        low_four = (low_scales[:, word % 2] >> (4 * (word // 2))) & 0x0F0F0F0F
        sub[:, word] = low_four | (((high_scales[:, 0] >> (2 * word)) & 0x03030303) << 4)
    out["sub_d"].sub_(32)
    _copy(blocks, 108, out["d"])
    third = _cut(blocks, 0, 32, torch.int64).view(-1, 2, 2)  # [B, elements 0-15 | 16-31, 8 bytes each]
    low = _cut(blocks, 32, 64, torch.int64).view(-1, 2, 2, 2)
    words = out["words"].view(torch.int64).view(-1, 2, 4, 2)
    for half in range(2):
        for s in range(4):
            upper = (third >> (4 * half + s)) & 0x0101010101010101
            q = ((low[:, half] >> (2 * s)) & 0x0303030303030303) | (upper << 2)
            torch.bitwise_or(q[:, 0], q[:, 1] << 4, out=words[:, half, s])


def _split_scales_k4(blocks: torch.Tensor, out: Planes) -> None:
    """d, dmin and the 12 bytes that hold eight 6-bit sub-scales and sub-minimums in Q4_K and Q5_K.

    Bytes 0-3 and 4-7 hold the first four scales and minimums, and above them two upper bits of the last four of each,
    whose lower four bits are the nibbles of bytes 8-11.
    """
    _copy(blocks, 0, out["d"])
    _copy(blocks, 2, out["m"])
    packed = _cut(blocks, 4, 12)
    scale, minimum, rest = packed.unbind(1)
    for name, first, nibbles in (("sub_d", scale, rest), ("sub_m", minimum, rest >> 4)):
        plane = out[name].view(torch.int32)
        plane[:, 0] = first & 0x3F3F3F3F
        plane[:, 1] = (nibbles & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)


def _split_nibbles_k(blocks: torch.Tensor, start: int, words: torch.Tensor) -> None:
    """128 bytes: the low nibbles of 32 bytes are 32 elements, their high nibbles the next 32."""
    nibbles = _cut(blocks, start, 128, torch.int64).view(-1, 4, 2, 2)  # [B, 32 bytes, first | last 16, 8 bytes each]
    low = nibbles & 0x0F0F0F0F0F0F0F0F
    high = (nibbles >> 4) & 0x0F0F0F0F0F0F0F0F
    pairs = words.view(torch.int64).view(-1, 4, 2, 2)
    torch.bitwise_or(low[:, :, 0], low[:, :, 1] << 4, out=pairs[:, :, 0])
    torch.bitwise_or(high[:, :, 0], high[:, :, 1] << 4, out=pairs[:, :, 1])


def _split_q4_k(blocks: torch.Tensor, out: Planes) -> None:
    """Scales, 128 bytes of nibbles."""
    _split_scales_k4(blocks, out)
    _split_nibbles_k(blocks, 16, out["words"])


def _split_q5_k(blocks: torch.Tensor, out: Planes) -> None:
    """Scales, 32 bytes of fifth bits, 128 bytes of nibbles; bit b of byte l is the fifth bit of element 32b + l."""
    _split_scales_k4(blocks, out)
    _split_nibbles_k(blocks, 48, out["words"])
    fifth = _cut(blocks, 16, 32)  # [B, 8]: word t holds the bytes of quad t
    for b in range(8):
        bits = (fifth >> b) & 0x01010101
        high = bits[:, 0].clone()
        for t in range(1, 8):
            high |= bits[:, t] << t
        out["high"][:, b] = high


def _split_q6_k(blocks: torch.Tensor, out: Planes) -> None:
    """128 bytes of nibbles, 64 bytes of upper bits, 16 int8 sub-scales, d.

    In half h, the low nibbles of byte l < 64 are elements 128h + l, the high ones 128h + 64 + l; the two bits at
    position 2s of upper byte l < 32 belong to element 128h + 32s + l.
    """
    _copy(blocks, 192, out["sub_d"])
    _copy(blocks, 208, out["d"])
    nibbles = _cut(blocks, 0, 128, torch.int64).view(-1, 2, 2, 2, 2)  # [B, half, 32 bytes, first | last 16, 8 bytes]
    low = nibbles & 0x0F0F0F0F0F0F0F0F
    high = (nibbles >> 4) & 0x0F0F0F0F0F0F0F0F
    words = out["words"].view(torch.int64).view(-1, 2, 2, 2, 2)  # [B, half, low | high nibbles, 32 bytes, 8 bytes each]
    torch.bitwise_or(low[:, :, :, 0], low[:, :, :, 1] << 4, out=words[:, :, 0])
    torch.bitwise_or(high[:, :, :, 0], high[:, :, :, 1] << 4, out=words[:, :, 1])
    upper = _cut(blocks, 128, 64).view(-1, 2, 2, 4)  # [B, half, word of the high plane, quad]
    plane = out["high"].view(-1, 2, 4, 2)
    for s in range(4):
        bits = (upper >> (2 * s)) & 0x03030303
        pair = bits[..., 0].clone()
        for t in range(1, 4):
            pair |= bits[..., t] << (2 * t)
        plane[:, :, s] = pair


_SPLIT: dict[str, Callable[[torch.Tensor, Planes], None]] = {
    "Q4_0": _split_q4_0,
    "Q4_1": _split_q4_1,
    "Q5_0": _split_q5_0,
    "Q5_1": _split_q5_1,
    "Q8_0": _split_q8_0,
    "Q2_K": _split_q2_k,
    "Q3_K": _split_q3_k,
    "Q4_K": _split_q4_k,
    "Q5_K": _split_q5_k,
    "Q6_K": _split_q6_k,
}
