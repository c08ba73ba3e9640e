"""Measures products of many rows on packed weights: one matrix, and the experts of a mixture.

python benchmarks/kernels_grouped_linear.py report [--kind I4_32]   # the tiles in use, beside block_linear's dense copy
python benchmarks/kernels_grouped_linear.py tune [--kind I4_32]     # many tiles, best first

TFLOP/s count two operations for each weight and row of x that has to be multiplied: padding of blocks is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
from kernels_linear import CUDA, graph_us, random_weight

from ostinato.kernels.grouped_linear import grouped_down, grouped_gate_up, packed_matmul, sort_picks
from ostinato.kernels.grouped_linear.triton import ProductTiles
from ostinato.kernels.registry import load
from ostinato.kernels.tuning import Tiles
from ostinato.quant.blocks import BlockWeight

MATRICES = ((12288, 2048), (2048, 4096))
EXPERTS, TOP_K, HIDDEN, WIDTH = 257, 9, 2048, 512  # Qwen3.5-35B-A3B with the shared expert as the last one


def operands(w: BlockWeight) -> tuple[torch.Tensor | str | None, ...]:
    return w.words, w.d, w.high, w.m, w.sub_d, w.sub_m, w.kind.name


def random_picks(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of different routed experts and the shared one, and weights."""
    routed = torch.rand(tokens, EXPERTS - 1, device=CUDA).topk(TOP_K - 1, dim=1).indices
    shared = torch.full((tokens, 1), EXPERTS - 1, device=CUDA)
    return torch.cat((routed, shared), 1).int().contiguous(), torch.rand(tokens, TOP_K, device=CUDA)


def show(name: str, us: float, flops: float, more: str = "") -> None:
    print(f"{name:70s} {us:9.1f} us {flops / us / 1e6:7.1f} TFLOP/s {more}", flush=True)


def ranked(name: str, flops: float, tiles: Iterable[ProductTiles], run: Callable[[ProductTiles], object]) -> None:
    """Time ``run`` with each of the tiles and print them, best first."""
    found = []
    for tile in tiles:
        try:
            found.append((graph_us([lambda t=tile: run(t)] * 4, 5), tile))
        except (RuntimeError, torch.OutOfMemoryError) as error:  # tiles that ask for more than a multiprocessor has
            print(f"  {tile}: {str(error).splitlines()[0][:100]}")
    for us, tile in sorted(found, key=lambda pair: pair[0]):
        t = tile
        how = f"w{t.warps} s{t.stages} {'pipelined' * t.pipelined}"
        show(f"{name} {t.tokens}x{t.rows}x{t.groups * 32} {how}", us, flops)


def tiles(*shapes: tuple[int, int, int, int]) -> list[ProductTiles]:
    """Tiles of these tokens, rows, warps and stages, pipelined from 64 tokens on."""
    return [ProductTiles(t, r, 2, w, s, swap=t < 64, pipelined=t >= 64) for t, r, w, s in shapes]


def plain(tokens: int, rows: int, groups: int, warps: int, stages: int) -> list[ProductTiles]:
    """Tiles of Triton's own pipelining, for comparison."""
    return [ProductTiles(tokens, rows, groups, warps, stages, swap=tokens < 64)]


def dense(kind: str, n: int, k: int, tokens: int, tune: bool) -> None:
    weight = random_weight(kind, n, k)
    x = torch.randn(tokens, k, device=CUDA).bfloat16()
    flops = 2.0 * n * k * tokens
    copy = Tiles("gemm", rows=8, groups=8, tokens=0, warps=4)
    by_copy = load("ostinato.kernels.block_linear.triton:block_linear")
    us = graph_us(
        [lambda: by_copy(x, *operands(weight), None, 0.0, None, None, None, torch.bfloat16, tiles=copy)] * 4, 5
    )
    show(f"{kind} {n}x{k}, {tokens} rows, dense copy", us, flops)
    name = f"{kind} {n}x{k}, {tokens} rows, packed"
    if tune:
        launch = load("ostinato.kernels.grouped_linear.triton:packed_matmul")
        chosen = plain(128, 128, 2, 8, 3) + tiles(
            (128, 128, 8, 4), (128, 128, 8, 3), (128, 128, 4, 4), (128, 256, 8, 4), (128, 256, 8, 3), (256, 128, 8, 4),
            (256, 128, 8, 3), (256, 128, 16, 4),
        )  # fmt: skip
        ranked(name, flops, chosen, lambda t: launch(x, *operands(weight), None, None, None, torch.bfloat16, t))
    else:
        show(name, graph_us([lambda: packed_matmul(x, weight)] * 4, 5), flops)


def mixture(kind: str, tokens: int, tune: bool) -> None:
    gate_up = random_weight(kind, EXPERTS * 2 * WIDTH, HIDDEN)
    down = random_weight(kind, EXPERTS * HIDDEN, WIDTH)
    x = torch.randn(tokens, HIDDEN, device=CUDA).bfloat16()
    residual = torch.randn(tokens, HIDDEN, device=CUDA)
    ids, weights = random_picks(tokens)
    flops = 2.0 * tokens * TOP_K * HIDDEN * WIDTH
    if tune:
        up_launch = load("ostinato.kernels.grouped_linear.triton:grouped_gate_up")
        down_launch = load("ostinato.kernels.grouped_linear.triton:grouped_down")
        for rows in (16, 32) if tokens <= 512 else (64, 128):
            s = sort_picks(ids, EXPERTS, block_rows=rows)
            act = grouped_gate_up(x, gate_up, s)
            if rows < 64:
                up_tiles = (
                    tiles((rows, 64, 4, 3), (rows, 64, 4, 5)) + plain(rows, 64, 4, 4, 3) + plain(rows, 32, 4, 4, 3)
                )
                down_tiles = tiles((rows, 128, 4, 3), (rows, 64, 4, 3), (rows, 64, 4, 5)) + plain(rows, 64, 4, 4, 3)
            elif rows == 64:
                up_tiles = tiles((64, 64, 4, 4), (64, 64, 4, 3)) + plain(64, 128, 4, 4, 3) + plain(64, 64, 2, 4, 3)
                down_tiles = tiles((64, 128, 4, 4), (64, 128, 4, 3)) + plain(64, 128, 2, 4, 3)
            else:
                up_tiles = tiles((128, 64, 8, 4), (128, 64, 8, 3), (128, 128, 8, 4))
                down_tiles = tiles((128, 128, 8, 4), (128, 128, 8, 3), (128, 256, 8, 4))
            ranked(
                f"{kind} {tokens} tokens, gate and up", 2 * flops, up_tiles,
                lambda t, s=s: up_launch(
                    x, *operands(gate_up), s.order, s.blocks, EXPERTS, TOP_K, s.block_rows, "silu", torch.bfloat16, t
                ),
            )  # fmt: skip
            ranked(
                f"{kind} {tokens} tokens, down and sum", flops, down_tiles,
                lambda t, s=s, act=act: down_launch(
                    act, *operands(down), s.order, s.blocks, EXPERTS, s.block_rows, weights, residual, torch.float32, t
                ),
            )  # fmt: skip
    else:
        schedule = sort_picks(ids, EXPERTS)
        act = grouped_gate_up(x, gate_up, schedule)
        sort_us = graph_us([lambda: sort_picks(ids, EXPERTS)] * 4, 5)
        up_us = graph_us([lambda: grouped_gate_up(x, gate_up, schedule)] * 4, 5)
        down_us = graph_us([lambda: grouped_down(act, down, schedule, weights, residual=residual)] * 4, 5)
        name = f"{kind} {tokens} tokens, {EXPERTS} experts"
        show(f"{name}: sort", sort_us, 0.0)
        show(f"{name}: gate and up", up_us, 2 * flops)
        show(f"{name}: down and sum", down_us, flops)
        read = (gate_up.num_bytes + down.num_bytes) / 1e6
        show(f"{name}: all", sort_us + up_us + down_us, 3 * flops, f"{read:.0f} MB of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("report", "tune"))
    parser.add_argument("--kind", default="I4_32")
    parser.add_argument("--dense-rows", type=int, nargs="*", default=[512, 2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512, 4096])
    chosen = parser.parse_args()
    torch.manual_seed(0)
    for n, k in MATRICES[: 1 if chosen.mode == "tune" else None]:
        for rows in chosen.dense_rows:
            dense(chosen.kind, n, k, rows, chosen.mode == "tune")
    for tokens in chosen.tokens:
        mixture(chosen.kind, tokens, chosen.mode == "tune")


if __name__ == "__main__":
    main()
