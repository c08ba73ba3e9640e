"""Float tensors as the bytes of a GGUF file: the dense types and the three simple block types.

Q8_0, Q4_0 and Q4_1 are rounded as llama.cpp's reference quantizers do it, so files made here equal files made there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ostinato.errors import KernelError
from ostinato.quant.gguf import GGUF_TYPES, GGUFType


def encode(x: torch.Tensor, kind: GGUFType) -> torch.Tensor:
    """``x`` (floating, [N, K], K a multiple of the block) as the bytes of ``kind``: uint8 [N, bytes of a row].

    Raises KernelError where ``kind`` is none of F32, F16, BF16, Q8_0, Q4_0, Q4_1, or the shape does not fit.
    """
    if x.dim() != 2 or x.shape[1] % kind.block or not x.dtype.is_floating_point:
        raise KernelError(
            f"{kind.name} encodes floating [N, K] with K a multiple of {kind.block}, got {x.dtype} {list(x.shape)}"
        )
    if kind.dtype is not None:
        return x.to(kind.dtype).contiguous().view(torch.uint8)
    encoder = _ENCODERS.get(kind.name)
    if encoder is None:
        raise KernelError(f"cannot encode {kind.name}; these can be: {', '.join(ENCODABLE)}")
    return encoder(x.float().reshape(-1, kind.block)).reshape(x.shape[0], -1)


def _bytes(*parts: torch.Tensor) -> torch.Tensor:
    """Parts [blocks, …] beside each other as bytes."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _nibbles(q: torch.Tensor) -> torch.Tensor:
    """Quants 0 … 15 [blocks, 32] as 16 bytes: elements 0-15 in the low nibbles, 16-31 in the high ones."""
    q = q.to(torch.uint8)
    return q[:, :16] | (q[:, 16:] << 4)


def _encode_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    d = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(d)
    rounded = torch.copysign((scaled.abs() + 0.5).floor(), scaled)  # halves away from zero, as C's roundf
    return _bytes(d.half(), rounded.to(torch.int8))


def _encode_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    d = largest / -8
    q = (blocks * _inverse(d) + 8.5).trunc().clamp(0, 15)
    return _bytes(d.half(), _nibbles(q))


def _encode_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    low, high = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    d = (high - low) / 15
    q = ((blocks - low) * _inverse(d) + 0.5).trunc().clamp(0, 15)
    return _bytes(d.half(), low.half(), _nibbles(q))


_ENCODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
}

ENCODABLE: tuple[str, ...] = tuple(name for name, kind in GGUF_TYPES.items() if kind.dtype or name in _ENCODERS)
