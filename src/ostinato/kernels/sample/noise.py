"""Gumbel noise by counter: a function of seed, draw and token, the same on every device and in every batch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with key = seed and counter =
(token, draw, 0, 0). The upper 23 bits x of its first word give w = (x + 1/2) / 2^23, which float32 holds exactly, and
the noise is -log(-log(1 - w)). So it is bounded, by which the CPU path knows which tokens cannot win.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

GUMBEL_MAX = -math.log(-math.log1p(-(2.0**-24)))  # at w = 2^-24
GUMBEL_MIN = -math.log(24 * math.log(2))  # w = 1 - 2^-24

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[npt.NDArray[np.integer], int, int, int], key: tuple[int, int]
) -> tuple[npt.NDArray[np.uint32], ...]:
    """Philox4x32-10: four uint32 arrays, for an array of first counter words and scalars elsewhere."""
    count = counter[0].shape[0]
    even = np.empty((2, count), dtype=np.uint64)  # words 0 and 2, which are multiplied
    even[0], even[1] = counter[0], counter[2]
    odd = np.empty((2, count), dtype=np.uint64)  # words 1 and 3, which are added
    odd[0], odd[1] = counter[1], counter[3]
    product = np.empty_like(even)
    for i in range(10):
        keys = np.array([[(key[0] + i * _WEYL[0]) & 0xFFFFFFFF], [(key[1] + i * _WEYL[1]) & 0xFFFFFFFF]], np.uint64)
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(product[::-1], _SHIFT, out=even)
        np.bitwise_xor(even, odd, out=even)
        np.bitwise_xor(even, keys, out=even)
        np.bitwise_and(product[::-1], _MASK, out=odd)
    return tuple(word.astype(np.uint32) for word in (even[0], odd[0], even[1], odd[1]))


def gumbel(seed: int, draw: int, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """Noise of each of ``tokens`` at the ``draw``-th token of a request; seed is any int64. float32."""
    bits = seed & 0xFFFFFFFFFFFFFFFF
    words = philox((tokens, draw, 0, 0), (bits & 0xFFFFFFFF, bits >> 32))[0]
    w = ((words >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    noise: npt.NDArray[np.float32] = -np.log(-np.log(np.float32(1.0) - w))
    return noise
