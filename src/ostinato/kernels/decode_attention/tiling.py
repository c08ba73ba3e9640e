"""How decode attention is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """How decode attention is cut: positions per tile (at least 16), splits, warps, stages of the loop over tiles."""

    block: int
    splits: int
    warps: int
    stages: int


def choose_tiling(batch: int, num_kv_heads: int, dim: int, max_length: int, multiprocessors: int) -> Tiling:
    """Tiling for a cache of up to ``max_length`` positions per slot; see docs/performance/kernels_attention.md.

    Short caches get one tile per program, since there latency is all; long ones a few programs per multiprocessor,
    whose loops keep loads in flight.
    """
    programs = batch * num_kv_heads
    padded = 1 << (dim - 1).bit_length()
    tiles = -(-max_length // 64)
    if tiles <= 128 and programs * tiles <= 8 * multiprocessors:
        return Tiling(64, tiles, 4, 1)
    block = 128 if padded <= 128 else 64
    wanted = -(-(6 if padded <= 64 else 2) * multiprocessors // programs)
    return Tiling(block, max(1, min(-(-max_length // block), wanted, 128)), 4, 2)
