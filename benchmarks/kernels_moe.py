"""Measures moe_block on a GPU at the sizes of Qwen3.5-35B-A3B, and finds tiles.

python benchmarks/kernels_moe.py report [--kind I4_128]        # figures of the tiles in use, 1 … 64 and more tokens
python benchmarks/kernels_moe.py tune --tokens 1 8 32           # fields of MoeTiles, one after the other, in a chain

A figure is the time per block in a CUDA graph of 24 blocks that follow each other, each with its own router and one
of twelve stacks of experts, so that weights come from memory and not from the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from dataclasses import replace

import torch
from kernels_linear import graph_us, random_weight

from ostinato.kernels.moe import _operands
from ostinato.kernels.moe import triton as moe
from ostinato.kernels.moe.triton import MoeTiles, default_tiles
from ostinato.quant.blocks import BlockWeight

CUDA = torch.device("cuda")
HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 512, 256, 8


def centred(kind: str, rows: int, columns: int) -> BlockWeight:
    """A random weight whose values have a mean of about 0: else all tokens soon point one way and share experts."""
    weight = random_weight(kind, rows, columns)
    if weight.m is not None and weight.sub_d is not None and weight.sub_m is not None:
        weight.m.copy_(weight.d * 7.5)
        weight.sub_m.copy_(weight.sub_d)
    if weight.m is not None and weight.kind.min_sign > 0:
        weight.m.copy_(weight.d * -(2.0 ** (weight.kind.bits - 1)))
    return weight


class Blocks:
    """Layers of a model: ``num_stacks`` stacks of experts, and a router for each of ``num_layers``."""

    def __init__(self, kind: str, num_stacks: int = 12, num_layers: int = 24, experts: int = EXPERTS) -> None:
        self.experts = experts
        total = experts + 1
        first = centred(kind, total * 2 * WIDTH, HIDDEN), centred(kind, total * HIDDEN, WIDTH)
        self.stacks = [first]
        for _ in range(num_stacks - 1):
            self.stacks.append(
                tuple(
                    BlockWeight(w.kind, w.shape, **{name: plane.clone() for name, plane in w.planes().items()})
                    for w in first
                )
            )
        self.routers = [(torch.randn(experts, HIDDEN, device=CUDA) * 0.05).bfloat16() for _ in range(num_layers)]
        self.gate = (torch.randn(HIDDEN, device=CUDA) * 0.02).bfloat16()
        self.norm = torch.rand(HIDDEN, device=CUDA) + 0.5
        self.expert_bytes = sum(w.num_bytes for w in first) / total

    def block(
        self, h: torch.Tensor, layer: int, tiles: MoeTiles | None, next_norm: torch.Tensor | None = None
    ) -> torch.Tensor:
        gate_up, down = self.stacks[layer % len(self.stacks)]
        return moe.moe_block(
            h, self.norm, 1e-6, self.routers[layer], self.gate, *_operands(gate_up), *_operands(down), self.experts,
            TOP_K, True, True, next_norm, None, None, None, None, tiles,
        )[0]  # fmt: skip

    def us(self, m: int, tiles: MoeTiles | None, replays: int = 7, *, hands_down: bool = False) -> float:
        """Microseconds a block for m tokens; hands_down: it also rounds its one row for the next product."""
        next_norm = self.norm if hands_down else None
        start = torch.randn(m, HIDDEN, device=CUDA)

        def chain() -> torch.Tensor:
            h = start
            for layer in range(len(self.routers)):
                h = self.block(h, layer, tiles, next_norm)
            return h

        return graph_us([chain], replays) / len(self.routers)

    def distinct(self, m: int) -> float:
        """Experts that m random tokens take on average, the shared one included."""
        return self.experts * (1 - (1 - TOP_K / self.experts) ** m) + 1


INTEGER_GATE = ((1, 128), (1, 96), (1, 168), (2, 168), (2, 255))
INTEGER_DOWN = (
    (1, 8, 4, 128), (1, 4, 4, 128), (2, 4, 4, 128), (2, 4, 4, 168), (2, 8, 4, 128), (2, 8, 2, 128), (2, 4, 2, 128),
    (2, 2, 4, 168), (4, 4, 1, 168), (4, 2, 2, 255), (4, 1, 4, 255), (4, 2, 4, 255),
)  # fmt: skip


def rule(m: int, kind: str) -> MoeTiles:
    return default_tiles(m, HIDDEN, WIDTH, (kind, kind), m * TOP_K / EXPERTS)


def candidates(m: int, tiles: MoeTiles) -> list[list[dict[str, int | bool]]]:
    """Fields of MoeTiles to try, group by group, where the rule says ``tiles``."""

    def product(names: tuple[str, ...], *values: tuple[int, ...]) -> list[dict[str, int | bool]]:
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]

    gates = ((4, 1), (4, 2), (8, 1), (8, 2), (8, 4), (16, 2), (16, 4), (16, 8))
    gate: list[dict[str, int | bool]] = [{"gate_rows": rows, "gate_warps": warps} for rows, warps in gates]
    if tiles.apart:
        down = product(("down_rows", "down_warps", "together"), (1, 2, 4), (1, 2, 4), (1,))
        down += product(("down_rows", "down_warps", "together"), (4,), (2, 4), (2, 4))
        down += product(("down_rows", "down_warps", "together"), (8,), (4, 8), (4, 8))
        down += [{"down_rows": 2, "down_warps": 2, "together": 2}, {"down_rows": 2, "down_warps": 4, "together": 2}]
        tokens = (1,) if m == 1 else (1, 2)
        router = product(("router_rows", "router_warps", "router_tokens"), (1, 2, 4, 8), (2, 4, 8), tokens)
        return [gate, down, router, gate, down]
    if tiles.integer:
        names = ("gate_tiles", "registers")
        gate = [dict(zip(names, chosen, strict=True)) for chosen in INTEGER_GATE]
        names = ("down_tiles", "down_warps", "down_depth", "down_registers")
        down = [dict(zip(names, chosen, strict=True)) for chosen in INTEGER_DOWN]
        return [gate, down, product(("router_rows", "router_warps", "router_tokens"), (4, 8), (4, 8), (1, 2, 4))]
    return [
        [{**fields, "registers": registers} for fields in gate for registers in (0, 96, 128)],
        product(("down_rows", "down_warps"), (4, 8, 16), (1, 2, 4)),
        product(("tokens",), (4, 8, 16)) if m > 4 else [],
        product(("router_rows", "router_warps", "router_tokens"), (4, 8), (4, 8), (1, 2) if m < 16 else (2, 4)),
    ]


def compile_one(job: tuple[str, int, MoeTiles]) -> str | None:
    """Compile a candidate's kernels into Triton's cache by running it with few experts; what failed, or None."""
    kind, m, tiles = job
    try:
        blocks = Blocks(kind, 1, 1, EXPERTS)
        blocks.block(torch.randn(m, HIDDEN, device=CUDA), 0, tiles)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{m} {tiles}: {error!r}"[:300]
    return None


def compile_all(kind: str, ms: list[int]) -> None:
    """Compile every candidate's kernels, several at a time."""
    began = time.monotonic()
    jobs = []
    for m in ms:
        groups = [group for group in candidates(m, rule(m, kind)) if group]
        for row in itertools.zip_longest(*groups[:3]):  # a job compiles one candidate of each group
            fields = {name: value for chosen in row if chosen for name, value in chosen.items()}
            jobs.append((kind, m, replace(rule(m, kind), **fields)))
        jobs += [(kind, m, replace(rule(m, kind), **fields)) for g in groups[3:4] for fields in g]
    jobs = list(dict.fromkeys(jobs))
    with multiprocessing.get_context("spawn").Pool(10) as pool:
        failures = [f for f in pool.imap_unordered(compile_one, jobs, chunksize=1) if f]
    print(f"{len(jobs)} candidates compiled in {time.monotonic() - began:.0f} s", flush=True)
    for failure in failures[:10]:
        print("failed:", failure)


def tune(kind: str, ms: list[int], seconds: float, compiled: bool) -> None:
    """Print the fastest fields of MoeTiles for each number of tokens."""
    if not compiled:
        compile_all(kind, ms)
    began = time.monotonic()
    blocks = Blocks(kind)
    for m in ms:
        best = rule(m, kind)
        best_us = blocks.us(m, best)
        print(f"m {m}: rule {best_us:.2f} us {best}", flush=True)
        for group in candidates(m, best):
            timed = []
            for fields in group:
                if time.monotonic() - began > seconds:
                    break
                try:
                    timed.append((blocks.us(m, replace(best, **fields)), fields))
                except Exception as error:
                    print("failed:", fields, repr(error)[:200])
            timed.sort(key=lambda pair: pair[0])
            print("   ", "; ".join(f"{us:.2f} {' '.join(f'{k} {v}' for k, v in f.items())}" for us, f in timed[:14]))
            if timed and timed[0][0] < best_us:
                best_us, best = timed[0][0], replace(best, **timed[0][1])
        print(f"m {m}: best {best_us:.2f} us {best}  | {time.monotonic() - began:.0f} s", flush=True)


def grouped(kind: str, ms: list[int]) -> None:
    """The products of many rows at few: where they become faster."""
    blocks = Blocks(kind)
    for m in ms:
        moe.MAX_ROWS = 64
        few = blocks.us(m, None) if m <= 64 else float("nan")
        moe.MAX_ROWS = 0
        print(f"{kind} {m:5d} tokens: int8 {few:8.2f} us, bfloat16 {blocks.us(m, None):8.2f} us a block", flush=True)


def trace(kind: str, m: int) -> None:
    """Start and end of each kernel of a block as the profiler saw them, in microseconds from the block's start."""
    blocks = Blocks(kind)
    h = torch.randn(m, HIDDEN, device=CUDA)
    names = 3 if rule(m, kind).apart else 6

    def chain() -> None:
        inner = h
        for layer in range(len(blocks.routers)):
            inner = blocks.block(inner, layer, None)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    graph.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    events = sorted((e for e in profiler.events() if "_kernel" in e.name), key=lambda e: e.time_range.start)
    for i in range(names * 12, names * 14):
        if i < len(events):
            span = events[i].time_range
            base = events[names * 12].time_range.start
            print(f"    {events[i].name[:28]:28s} {span.start - base:7.2f} {span.end - base:7.2f}")


def report(kind: str, ms: list[int]) -> None:
    blocks = Blocks(kind)
    for m in ms:
        us = blocks.us(m, None)
        num_bytes = blocks.distinct(m) * blocks.expert_bytes + EXPERTS * HIDDEN * 2
        print(f"{kind} {m:5d} tokens {us:8.2f} us a block, {num_bytes / us / 1e6:5.2f} TB/s", flush=True)
        if m == 1:
            us = blocks.us(m, None, hands_down=True)
            print(f"{kind} {m:5d} tokens {us:8.2f} us a block that rounds its row for the next product", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compile", "tune", "report", "trace", "grouped"))
    parser.add_argument("--kind", default="I4_128")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512, 4096])
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--compiled", action="store_true", help="tune what `compile` has compiled before")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.command == "compile":
        compile_all(arguments.kind, arguments.tokens)
    elif arguments.command == "tune":
        tune(arguments.kind, arguments.tokens, arguments.seconds, arguments.compiled)
    elif arguments.command == "report":
        report(arguments.kind, arguments.tokens)
    elif arguments.command == "grouped":
        grouped(arguments.kind, arguments.tokens)
    else:
        for m in arguments.tokens:
            trace(arguments.kind, m)


if __name__ == "__main__":
    main()
