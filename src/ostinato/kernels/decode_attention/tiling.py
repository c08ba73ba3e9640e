"""How decode attention is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """How decode attention is cut: positions per tile (at least 16), splits, warps, stages of the loop over tiles.

    columns: of a head that one program of the second kernel joins.
    """

    block: int
    splits: int
    warps: int
    stages: int
    columns: int = 64


def choose_tiling(
    batch: int, num_kv_heads: int, dim: int, max_length: int, multiprocessors: int, element_size: int = 2
) -> Tiling:
    """Tiling for a cache of up to ``max_length`` positions per slot, ``element_size`` bytes a number.

    See docs/performance/kernels_attention.md.
    Short caches get one tile per program, since there latency is all; long ones as many programs as run at once, whose
    loops keep loads in flight.
    """
    programs = batch * num_kv_heads
    if dim > 128:
        return _wide(programs, dim, max_length, multiprocessors, element_size)
    tiles = -(-max_length // 64)
    if tiles <= 128 and programs * tiles <= 8 * multiprocessors:
        return Tiling(64, tiles, 4, 1)
    wanted = -(-(6 if dim <= 64 else 2) * multiprocessors // programs)
    return Tiling(128, max(1, min(-(-max_length // 128), wanted, 128)), 4, 2)


def _wide(programs: int, dim: int, max_length: int, multiprocessors: int, element_size: int) -> Tiling:
    """For heads above 128: two programs to a multiprocessor, or a kernel beside them finds no shared memory.

    FP8 needs its warps to unpack it. One program more than fit would cost a second round.
    """
    fp8 = element_size == 1
    whole = max(16, min(64, (32 << 10) // (element_size << (dim - 1).bit_length())))
    block = whole if fp8 else max(16, whole // 2)
    tiles = -(-max_length // 16)
    if not fp8 and programs * tiles <= multiprocessors:
        return Tiling(16, tiles, 8, 1, 32)
    for size, warps in ((block, 4 if fp8 else 8), (whole, 4)):
        tiles = -(-max_length // size)
        if tiles <= 128 and programs * tiles <= 2 * multiprocessors:
            return Tiling(size, tiles, warps, 1)
    splits = max(1, min(-(-max_length // block), 2 * multiprocessors // programs, 128))
    # Many partial results are joined by more programs, each of fewer columns.
    return Tiling(block, splits, 4, 3 if fp8 and splits < 128 else 2, 32 if splits > 64 else 64)
