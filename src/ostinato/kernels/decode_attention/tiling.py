"""How decode attention is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """How decode attention is cut: positions per tile (at least 16), splits, warps, stages of the loop over tiles.

    columns: of a head that one program of the second kernel joins.
    own: the token that is appended has a program of its own, beside those of the splits. What it needs, a norm, a
        rotation, FP8 and the append, takes as long as a tile does.
    first: positions of each program's first tile where they are fewer than ``block``, so that a short row in a large
        room is spread over more programs. Those of all programs together must fill whole tiles.
    """

    block: int
    splits: int
    warps: int
    stages: int
    columns: int = 64
    own: bool = False
    first: int = 0

    def __post_init__(self) -> None:
        if self.first * self.splits % self.block:
            raise ValueError(f"{self.splits} first tiles of {self.first} positions do not fill tiles of {self.block}")


def choose_tiling(
    batch: int, num_kv_heads: int, dim: int, max_length: int, multiprocessors: int, element_size: int = 2
) -> Tiling:
    """Tiling for a cache of up to ``max_length`` positions per slot, ``element_size`` bytes a number.

    See docs/performance/kernels_attention.md.
    Short caches get one tile per program, since there latency is all; long ones as many programs as run at once, whose
    loops keep loads in flight. The new token has its own program where that costs no second round.
    """
    programs = batch * num_kv_heads
    if dim > 128:
        return _wide(programs, dim, max_length, multiprocessors, element_size)
    tiles = -(-max_length // 64)
    if tiles <= 128 and programs * tiles <= 8 * multiprocessors:
        return Tiling(64, tiles, 4, 1, own=programs * (tiles + 1) <= 8 * multiprocessors)
    at_once = (6 if dim <= 64 else 2) * multiprocessors
    splits = max(1, min(-(-max_length // 128), -(-at_once // programs), 128))
    return Tiling(128, splits, 4, 2, own=programs * (splits + 1) <= at_once)


def _wide(programs: int, dim: int, max_length: int, multiprocessors: int, element_size: int) -> Tiling:
    """For heads above 128: two programs to a multiprocessor, or a kernel beside them finds no shared memory.

    FP8 needs its warps to unpack it. One program more than fit would cost a second round. Tiles whose kernel leaves
    room for a third on a multiprocessor are no gain: three share what another multiprocessor could read.
    """
    fp8 = element_size == 1
    at_once = 2 * multiprocessors
    large = max(16, min(64, (32 << 10) // (element_size << (dim - 1).bit_length())))
    small = max(16, large // 2)

    def own(splits: int) -> bool:
        return programs * (splits + 1) <= at_once

    def tiles(block: int) -> int:
        return -(-max_length // block)

    # A tile for each program, by eight warps where there is a multiprocessor for each.
    if not fp8 and programs * tiles(16) <= multiprocessors:
        return Tiling(16, tiles(16), 8, 1, 32)
    if fp8 and programs * tiles(large) <= multiprocessors:
        return Tiling(large, tiles(large), 8, 1, 32, own(tiles(large)))
    if fp8 and programs * 128 <= at_once:
        return Tiling(large, 128, 4, 2, 32, own(128), small)
    for block in (large,) if fp8 else (small, large):
        if tiles(block) <= 128 and programs * tiles(block) <= at_once:
            return Tiling(block, tiles(block), 4, 1, 32, own(tiles(block)))
    block = large if fp8 else small
    splits = max(1, min(tiles(block), at_once // programs, 128))
    columns = 32 if splits > 64 else 64  # many partial results are joined by more programs, each of fewer columns
    return Tiling(block, splits, 4, 3 if fp8 else 2, columns, own(splits))
