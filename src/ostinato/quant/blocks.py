"""What the bytes of a block-quantized weight mean, in the one layout that every product here reads.

A GGUF block interleaves scales with quants, which no vector load likes. At load the parts of all blocks of a tensor
are split into *planes*; scales keep the file's bits, quants are only moved. Every GGUF integer type, and every type
that ``ostinato.quant.int4`` makes, is then one formula

    weight[n, k] = scale[n, g] * (q[n, k] - offset) + minimum[n, g]         g = k // group

    scale[n, g]   = d[n, k // super_group] * sub_d[n, g]      (sub_d is 1 where the type has none)
    minimum[n, g] = +m[n, g]                                  Q4_1, Q5_1, I4_*
                  = -m[n, k // super_group] * sub_m[n, g]     Q2_K, Q4_K, Q5_K
                  = 0                                         the others

Source of the formulas: the block structures of the GGUF format (ggml-common.h of llama.cpp, read for facts). The types
I4_32 … I8_64 are this project's own, with groups of up to 128 columns.

Order of quants. Within 32 consecutive elements e0 … e31, quad t is the four elements e[4t] … e[4t+3].

- ``words`` for up to 6 bits, int32 ``[N, K / 8]``: word j (0 ≤ j < 4) of a 32-block holds quad j in the low nibbles of
  its four bytes and quad j + 4 in the high nibbles: ``word & 0x0f0f0f0f`` is quad j, ``(word >> 4) & 0x0f0f0f0f`` quad
  j + 4, both ready for dp4a against int8 activations in their natural order.
- ``words`` for 8 bits, int32 ``[N, K / 4]``: word t is quad t as four int8.
- ``high`` for 5 bits, int32 ``[N, K / 32]``: ``(high >> t) & 0x01010101`` is the fifth bits of quad t (0 ≤ t < 8).
- ``high`` for 6 bits, int32 ``[N, K / 16]``: for word w of a 32-block, ``(high >> 2 * t) & 0x03030303`` is the upper
  two bits of quad 4w + t (0 ≤ t < 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ostinato.errors import KernelError


@dataclass(frozen=True)
class BlockKind:
    """The constants of one block type.

    bits: stored bits of a quant as the planes hold it: 4 (also Q2_K and Q3_K, whose values fit a nibble), 5, 6 or 8.
    group: elements that share a scale. super_group: elements that share ``d`` (equals group where there is no sub_d).
    offset: subtracted from the quant. min_sign: +1, -1 or 0 as in the formula above. signed: 8-bit quants are int8.
    """

    name: str
    bits: int
    group: int
    super_group: int
    offset: int
    min_sign: int

    @property
    def has_sub(self) -> bool:
        """Whether scales are ``d * sub_d`` rather than ``d`` alone."""
        return self.super_group != self.group

    @property
    def block(self) -> int:
        """Number of columns that must divide K."""
        return max(self.super_group, 32)


KINDS: dict[str, BlockKind] = {
    kind.name: kind
    for kind in (
        BlockKind("Q4_0", 4, 32, 32, 8, 0),
        BlockKind("Q4_1", 4, 32, 32, 0, 1),
        BlockKind("Q5_0", 5, 32, 32, 16, 0),
        BlockKind("Q5_1", 5, 32, 32, 0, 1),
        BlockKind("Q8_0", 8, 32, 32, 0, 0),
        BlockKind("Q2_K", 4, 16, 256, 0, -1),
        BlockKind("Q3_K", 4, 16, 256, 4, 0),
        BlockKind("Q4_K", 4, 32, 256, 0, -1),
        BlockKind("Q5_K", 5, 32, 256, 0, -1),
        BlockKind("Q6_K", 6, 16, 256, 32, 0),
        BlockKind("I4_32", 4, 32, 32, 0, 1),
        BlockKind("I4_64", 4, 64, 64, 0, 1),
        BlockKind("I4_128", 4, 128, 128, 0, 1),
        BlockKind("I6_64", 6, 64, 64, 32, 0),
        BlockKind("I8_64", 8, 64, 64, 0, 0),
    )
}


def plane_columns(kind: BlockKind, k: int) -> dict[str, tuple[int, torch.dtype]]:
    """The planes that a weight of ``k`` columns has: name → (columns, dtype), in BlockWeight's order."""
    scales, subs = (k // kind.super_group, torch.float16), (k // kind.group, torch.int8)
    planes = {"words": (k // 4 if kind.bits == 8 else k // 8, torch.int32), "d": scales}
    if kind.bits in (5, 6):
        planes["high"] = (k // 32 if kind.bits == 5 else k // 16, torch.int32)
    if kind.min_sign:
        planes["m"] = scales
    if kind.has_sub:
        planes["sub_d"] = subs
        if kind.min_sign:
            planes["sub_m"] = subs
    return planes


Operands = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    str,
]


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """A block-quantized matrix of N rows (outputs) and K columns (inputs).

    words: int32 [N, K/8] or, for 8 bits, [N, K/4]. high: int32 [N, K/32] (5 bits), [N, K/16] (6 bits) or None.
    d: float16 [N, K/super_group]. m: float16 [N, K/super_group] or None.
    sub_d: int8 [N, K/group] or None (every GGUF sub-scale fits int8). sub_m: int8 [N, K/group] or None.
    All contiguous, on one device.
    """

    kind: BlockKind
    shape: tuple[int, int]
    words: torch.Tensor
    d: torch.Tensor
    high: torch.Tensor | None = None
    m: torch.Tensor | None = None
    sub_d: torch.Tensor | None = None
    sub_m: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        columns: int,
        words: torch.Tensor,
        d: torch.Tensor,
        high: torch.Tensor | None,
        m: torch.Tensor | None,
        sub_d: torch.Tensor | None,
        sub_m: torch.Tensor | None,
        kind: str,
    ) -> BlockWeight:
        """The weight of ``columns`` columns whose ``operands`` these are."""
        return cls(KINDS[kind], (words.shape[0], columns), words, d, high, m, sub_d, sub_m)

    @property
    def operands(self) -> Operands:
        """What a registered op takes in place of the weight: its planes, absent ones as None, and its kind's name."""
        return self.words, self.d, self.high, self.m, self.sub_d, self.sub_m, self.kind.name

    def planes(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by field name."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if isinstance(value, torch.Tensor)}

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        return sum(plane.numel() * plane.element_size() for plane in self.planes().values())

    def to(self, device: torch.device | str) -> BlockWeight:
        """The same weight with its planes on ``device``."""
        return self._with({name: plane.to(device) for name, plane in self.planes().items()}, self.shape)

    def select_rows(self, rows: torch.Tensor) -> BlockWeight:
        """Rows ``rows`` (int64 [M], any order) as a new weight of M rows; exact."""
        return self._with({name: plane[rows] for name, plane in self.planes().items()}, (rows.numel(), self.shape[1]))

    def slice_rows(self, start: int, stop: int) -> BlockWeight:
        """Rows start … stop - 1 as views."""
        return self._with(
            {name: plane[start:stop] for name, plane in self.planes().items()}, (stop - start, self.shape[1])
        )

    def _with(self, planes: dict[str, torch.Tensor], shape: tuple[int, int]) -> BlockWeight:
        return BlockWeight(self.kind, shape, **planes)


def join_rows(weights: Sequence[BlockWeight]) -> BlockWeight:
    """Stack weights of one kind and one K under each other (QKV, gate over up); changes no result.

    Raises KernelError where kinds or columns differ: a fusion happens only between equal types.
    """
    first = weights[0]
    if any(w.kind != first.kind or w.shape[1] != first.shape[1] for w in weights):
        described = ", ".join(f"{w.kind.name} {w.shape}" for w in weights)
        raise KernelError(f"cannot join rows of different types or widths: {described}")
    planes = {name: torch.cat([w.planes()[name] for w in weights]) for name in first.planes()}
    return BlockWeight(first.kind, (sum(w.shape[0] for w in weights), first.shape[1]), **planes)


def quants(weight: BlockWeight) -> torch.Tensor:
    """The stored integers before ``offset`` is subtracted: int8 [N, K] in natural order."""
    n, k = weight.shape
    if weight.kind.bits == 8:
        return weight.words.view(torch.int8).reshape(n, k)
    nibbles = weight.words.view(torch.uint8).reshape(n, k // 32, 16)
    q = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)  # [N, K/32, 32]: quads 0-3, then 4-7
    if weight.high is not None:
        per_word = 8 if weight.kind.bits == 5 else 4  # quads in one int32 of the high plane
        width = 8 // per_word  # bits of a quant there
        lanes = weight.high.view(torch.uint8).reshape(n, k // 32, -1, 1, 4)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=lanes.device).view(1, 1, 1, per_word, 1)
        upper = (lanes >> shifts) & ((1 << width) - 1)
        q = q | (upper.reshape(n, k // 32, 32) << 4)
    return q.reshape(n, k).view(torch.int8)


def pack_quants(q: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``words`` and ``high`` of quants in natural order, the inverse of ``quants``.

    q: uint8 [N, K] below 2**bits for 4 and 6 bits, int8 [N, K] for 8. K: a multiple of 32.
    """
    n, k = q.shape
    assert bits in (4, 6, 8)
    assert k % 32 == 0
    if bits == 8:
        return q.contiguous().view(torch.int32), None
    halves = q.view(n, k // 32, 2, 16)  # quads 0-3, then 4-7
    words = (halves[:, :, 0] & 15) | ((halves[:, :, 1] & 15) << 4)
    if bits == 4:
        return words.view(n, k // 2).view(torch.int32), None
    upper = (q >> 4).view(n, k // 32, 2, 4, 4)  # a word of the high plane holds four quads, two bits each
    high = upper[..., 0, :] | (upper[..., 1, :] << 2) | (upper[..., 2, :] << 4) | (upper[..., 3, :] << 6)
    return words.view(n, k // 2).view(torch.int32), high.view(n, k // 4).view(torch.int32)


def scales(weight: BlockWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and minimum of each group as float32 [N, K/group]; the minimum is None where the type has none."""
    kind = weight.kind
    per = kind.super_group // kind.group

    def spread(plane: torch.Tensor, sub: torch.Tensor | None) -> torch.Tensor:
        wide = plane.float().repeat_interleave(per, dim=1)
        return wide if sub is None else wide * sub.float()

    scale = spread(weight.d, weight.sub_d)
    if weight.m is None:
        return scale, None
    return scale, kind.min_sign * spread(weight.m, weight.sub_m)


def dequantize(weight: BlockWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [N, K] that the bytes mean, computed in float32 and rounded once to ``dtype``."""
    n, k = weight.shape
    scale, minimum = scales(weight)
    q = (quants(weight).to(torch.int16) - weight.kind.offset).float().view(n, k // weight.kind.group, weight.kind.group)
    values = q * scale[..., None]
    if minimum is not None:
        values += minimum[..., None]
    return values.view(n, k).to(dtype)
