"""Measures block_linear and dense_linear on a GPU, and finds tile sizes for the packaged tables.

python benchmarks/kernels_linear.py tune --out tuned.json [--set smollm large …]   # measure candidates, write a table
python benchmarks/kernels_linear.py report [--table tuned.json]                      # figures of the tables in use

A figure is the time per product in a CUDA graph of many products that follow each other, over as many copies of the
weight as it takes to keep them out of the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ostinato.kernels import tuning
from ostinato.kernels.block_linear import block_linear
from ostinato.kernels.dense_linear import dense_linear
from ostinato.kernels.launch import gpu_name, num_multiprocessors
from ostinato.kernels.registry import load
from ostinato.kernels.tuning import Tiles, linear_key
from ostinato.quant.blocks import KINDS, BlockWeight

CUDA = torch.device("cuda")
COPIES_BYTES = 256 << 20


@dataclass(frozen=True)
class Product:
    """One product: N (of the result), K, rows of x, and what is fused with it; heads: of x, whose norm comes late.

    rounded: x is int8 already. handed: it is, with a scale for 16 columns, and the norm of the whole row comes late.
    """

    kind: str
    n: int
    k: int
    m: int
    norm: bool = False
    residual: bool = False
    gated: bool = False
    heads: int = 0
    rounded: bool = False
    handed: bool = False

    @property
    def int8(self) -> bool:
        return self.rounded or self.handed

    @property
    def key(self) -> str:
        return linear_key(self.kind, self.n, self.k, self.m, self.gated) + (" int8" if self.int8 else "")


def random_weight(name: str, n: int, k: int) -> BlockWeight:
    """Random bits with scales that keep sums finite."""
    kind = KINDS[name]

    def bits(columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (n, columns), dtype=torch.int32, device=CUDA)

    def halves() -> torch.Tensor:
        return (torch.rand(n, k // kind.super_group, device=CUDA) * 0.003).half()

    def small() -> torch.Tensor:
        return torch.randint(0, 64, (n, k // kind.group), dtype=torch.int8, device=CUDA)

    return BlockWeight(
        kind,
        (n, k),
        bits(k // (4 if kind.bits == 8 else 8)),
        halves(),
        bits(k // (32 if kind.bits == 5 else 16)) if kind.bits in (5, 6) else None,
        halves() if kind.min_sign else None,
        small() if kind.has_sub else None,
        small() if kind.has_sub and kind.min_sign else None,
    )


def graph_us(calls: list[Callable[[], object]], replays: int = 12) -> float:
    """Microseconds per call, median over replays of a graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2] * 1e3 / len(calls)


class Bench:
    """The operands of one product, in copies."""

    def __init__(self, product: Product, rows: int | None = None) -> None:
        p = product
        n = rows or p.n
        self.product = p
        first = random_weight(p.kind, n * (2 if p.gated else 1), p.k)
        copies = 1 if rows else max(2, min(96, COPIES_BYTES // first.num_bytes))
        self.num_bytes = first.num_bytes
        self.weights = [first] + [
            BlockWeight(first.kind, first.shape, **{name: plane.clone() for name, plane in first.planes().items()})
            for _ in range(copies - 1)
        ]
        self.x = torch.randn(p.m, p.k, device=CUDA) * 2
        if p.m > 8 and not p.norm:
            self.x = self.x.bfloat16()
        self.norm = torch.rand(p.k, device=CUDA) if p.norm else None
        self.residual = torch.randn(p.m, n, device=CUDA) if p.residual else None
        self.squares = torch.rand(p.m, p.heads, 4, device=CUDA) if p.heads else None
        if p.heads:
            self.x = self.x.bfloat16()
        self.x8 = torch.randint(-127, 128, (p.m, p.k), dtype=torch.int8, device=CUDA)
        self.scale = torch.rand(p.m, p.k // (16 if p.handed else 32), device=CUDA)
        self.out_dtype = self.x.dtype if p.m > 8 and not p.residual else torch.float32
        if p.handed:
            self.squares = torch.rand(p.m, 1, p.k // 16, device=CUDA)
            self.out_dtype = torch.bfloat16

    def call(self, weight: BlockWeight, tiles: Tiles | None) -> torch.Tensor:
        w = weight
        if self.product.int8:
            rounded = load("ostinato.kernels.block_linear.triton:int8_linear")
            result: torch.Tensor = rounded(
                self.x8, self.scale, w.words, w.d, w.high, w.m, w.sub_d, w.sub_m, w.kind.name, self.squares, 1e-6,
                self.residual, self.out_dtype, tiles,
            )  # fmt: skip
            return result
        launch = load("ostinato.kernels.block_linear.triton:block_linear")
        gated = "silu" if self.product.gated else None
        found: torch.Tensor = launch(
            self.x, w.words, w.d, w.high, w.m, w.sub_d, w.sub_m, w.kind.name, self.norm, 1e-5, None, self.residual,
            gated, self.out_dtype, tiles,
        )  # fmt: skip
        return found

    def us(self, tiles: Tiles | None, replays: int = 12) -> float:
        repeat = max(1, 24 // len(self.weights))
        return graph_us([lambda w=w: self.call(w, tiles) for w in self.weights] * repeat, replays)


def candidates(p: Product) -> Iterator[Tiles]:
    """Tiles worth measuring for a product."""
    groups = 1 << (p.k // 32 - 1).bit_length()
    n = p.n * (2 if p.gated else 1)
    top = 1 << (p.m - 1).bit_length()
    chunks = [t for t in (1, 2, 4, 8) if t == min(top, 8) or (top <= 8 and top > t >= 2) or (top > 8 and t == 4)]
    int8 = p.m <= 16 or n * p.k <= 2**21
    for tokens in chunks if int8 else []:
        for rows, warps, repeats in (
            () if p.int8 else itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8))
        ):
            slots = rows * groups * 4 / (32 * warps) * (2 if p.gated else 1)  # of a thread
            programs = n / (rows * repeats) * max(1, p.m / tokens)
            if (
                groups <= 128
                and 1 <= slots <= 64
                and slots * tokens <= 256
                and tokens * groups * 4 / (32 * warps) <= 16
                and (repeats == 1 or programs >= 132)
                and (p.m == 1 or (rows >= 2 and repeats <= 4 and rows * tokens <= 128))
                and (p.m <= 8 or (repeats == 1 and rows >= 4 and warps >= 2))
                and programs <= 20000
                and (n < 4096 or (rows * repeats >= 8 and rows >= 4 and slots >= 4))
                and (n < 40000 or rows * repeats >= 16)
            ):
                yield Tiles("resident", rows, groups, tokens, warps, repeats)
        for deep, wide, warps in itertools.product((1, 2, 4, 8), (16, 32, 64, 128), (1, 2, 4)):
            rows = deep * max(1, warps * 32 // wide)
            words = rows * wide * 4 / (32 * warps)
            if (
                p.k >= 1024
                and wide <= groups
                and words * tokens <= 128
                and (n < 4096 or words >= 8)
                and n / rows <= 40000
            ):
                yield Tiles("streamed", rows, wide, tokens, warps)
    if p.m >= 16:
        yield Tiles("packed", 0, 0, 0, 0)
    if p.m > 1 and p.kind in ("I4_64", "I4_128", "I6_64"):
        spans = p.k // KINDS[p.kind].group
        for rows, tokens, count, warps in itertools.product((16, 32, 64), (8, 16, 32), (1, 2, 4), (1, 2, 4, 8, 16)):
            right, down = rows // 16, tokens // 8
            steps = spans / (count * warps)
            programs = p.n / rows * max(1, p.m / tokens)
            registers = right * count * (8 if steps == 1 else 16) + right * down * 8 + down * 12 * min(count, 2)
            if (
                tokens <= max(8, top)
                and tokens >= min(top, 16)
                and 1 <= steps <= 8
                and registers <= 255
                and programs >= 64
                and programs * warps >= 132 * 4
                and (p.n < 40000 or warps <= 4)
                and (p.n < 4096 or warps <= 8)
            ):
                yield Tiles("wide", rows, count, tokens, warps)
    if p.m > 1:
        for rows, tokens, warps in itertools.product((16, 32, 64), (8, 16, 32, 64), (1, 2, 4, 8)):
            if (
                tokens <= max(8, top)
                and tokens >= min(top, 32)
                and rows * tokens <= 2048
                and (rows == 16 or p.n / rows >= 24)
                and p.n / rows <= 8000
            ):
                yield Tiles("mma", rows, 0, tokens, warps)
        shapes = ((16, 1), (16, 2), (32, 2), (32, 4), (64, 4), (128, 4), (128, 8))
        for (rows, warps), wide, splits, stages in itertools.product(shapes, (4, 8), (1, 2, 4, 8), (2, 3)):
            tokens = max(16, min(64, top))
            programs = p.n / rows * splits
            if (
                (programs <= 132 * 4 or splits == 1)
                and p.k / (wide * 32 * splits) >= 2
                and (rows >= 64 or programs < 132 * 8)
                and (rows <= 32 or programs >= 24)
                and rows * wide <= 512
                and (stages == 3) == (wide < 8)
            ):
                yield Tiles("tile", rows, wide, tokens, warps, splits=splits, stages=stages)


def smollm(ms: tuple[int, ...]) -> list[Product]:
    """The products of SmolLM2-135M."""
    return [
        product
        for m in ms
        for product in (
            Product("Q4_1", 960, 576, m, norm=True),
            Product("Q4_1", 576, 576, m, residual=True),
            Product("Q4_1", 1536, 576, m, norm=True, gated=True),
            Product("Q4_1", 576, 1536, m, residual=True),
            Product("Q8_0", 49152, 576, m, norm=True),
        )
    ]


def large(ms: tuple[int, ...], kinds: tuple[str, ...]) -> list[Product]:
    """Products of models with billions of parameters."""
    shapes = ((12288, 2048), (2048, 4096), (9216, 2048), (43008, 6144), (5376, 20480))
    return [Product(kind, n, k, m) for kind in kinds for n, k in shapes for m in ms]


def qwen35(ms: tuple[int, ...]) -> list[Product]:
    """The products of Qwen3.5-35B-A3B outside its experts, int4 in groups of 128."""
    return [
        product
        for m in ms
        for product in (
            Product("I4_128", 12288, 2048, m, norm=True),
            *([Product("I4_128", 12288, 2048, 1, handed=True)] if m == 1 else []),
            Product("I4_128", 2048, 4096, m, residual=True),
            *([Product("I4_128", 2048, 4096, 1, residual=True, heads=32, rounded=True)] if m == 1 else []),
            Product("I4_128", 9216, 2048, m, norm=True),
            *([Product("I4_128", 9216, 2048, 1, handed=True)] if m == 1 else []),
            Product("I6_64", 248320, 2048, m, norm=True),
        )
    ]


SETS: dict[str, list[Product]] = {
    "qwen35": qwen35((1,)),
    "qwen35-few": qwen35((2, 4, 8)),
    "qwen35-many": qwen35((16, 32, 64)),
    "batch": large((4, 16, 64), ("Q4_K",)),
    "middle": [Product("Q4_K", n, k, m) for n, k in ((12288, 2048), (2048, 4096)) for m in (4, 16)],
    "smollm": smollm((1,)),
    "smollm-few": smollm((2, 4, 8)),
    "smollm-many": smollm((16, 32, 64)),
    "large": [*large((1,), ("Q4_0", "Q4_K")), Product("Q6_K", 248320, 2048, 1), Product("Q4_0", 248320, 2048, 1)],
    "large-kinds": large((1,), ("Q8_0", "Q6_K", "Q5_K")),
    "large-few": large((4, 8), ("Q4_0", "Q4_K")),
    "large-many": large((16, 64), ("Q4_0", "Q4_K")),
    "prefill": [
        Product("Q4_0", n, k, m) for n, k in ((12288, 2048), (43008, 6144), (5376, 20480)) for m in (512, 2048, 4096)
    ],
}


def compile_one(job: tuple[Product, Tiles]) -> str | None:
    """Compile a candidate's kernels into Triton's cache, by running it on a few rows of W; what failed, or None."""
    product, tiles = job
    try:
        bench = Bench(product, rows=64)
        bench.call(bench.weights[0], tiles)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{product.key} {tiles}: {error!r}"[:300]
    return None


def tune(
    products: list[Product], seconds: float, only: list[str] | None
) -> tuple[dict[str, Tiles], list[dict[str, object]]]:
    """The fastest tiles of each product, and every measurement."""
    known = tuning.table(gpu_name(CUDA))
    choices = {p: [t for t in candidates(p) if not only or t.path in only] for p in products}
    for p, options in choices.items():
        if p.key in known and known[p.key] not in options:
            options.append(known[p.key])
    jobs = [(p, t) for p, options in choices.items() for t in options]
    began = time.monotonic()
    seen = {(p.kind, p.k, p.m == 1, p.norm, p.residual, p.gated, p.int8, t): (p, t) for p, t in jobs}
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        failures = [f for f in pool.imap_unordered(compile_one, seen.values(), chunksize=4) if f]
    print(f"{len(jobs)} candidates, {len(seen)} compiled in {time.monotonic() - began:.0f} s", flush=True)
    for failure in failures[:10]:
        print("failed:", failure)
    best: dict[str, Tiles] = {}
    log: list[dict[str, object]] = []
    for p in products:
        bench = Bench(p)
        scored: list[tuple[float, Tiles]] = []
        for tiles in choices[p]:
            if time.monotonic() - began > seconds:
                break
            try:
                scored.append((bench.us(tiles, replays=5), tiles))
            except Exception as error:
                print("failed:", p.key, tiles, repr(error)[:200])
        if not scored:
            continue
        scored.sort(key=lambda pair: pair[0])
        finals = sorted(((bench.us(t), t) for _, t in scored[:3]), key=lambda pair: pair[0])
        us, tiles = finals[0]
        by_rule = bench.us(default(p))
        best[p.key] = tiles
        log += [{"key": p.key, "us": round(t_us, 3), **asdict(t)} for t_us, t in scored[:40]]
        speed = bench.num_bytes / us / 1e6
        short = f"{tiles.path} r{tiles.rows} g{tiles.groups} t{tiles.tokens} w{tiles.warps} x{tiles.repeats}"
        print(f"{p.key:34s} {us:7.2f} us {speed:5.2f} TB/s | rule {by_rule:7.2f} | {short} s{tiles.splits}"
              f" st{tiles.stages} | {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        del bench
    return best, log


def default(p: Product) -> Tiles:
    if p.int8:
        by_rule: Tiles = load("ostinato.kernels.block_linear.triton:default_int8_tiles")(p.n, p.k, p.m)
        return by_rule
    rule = load("ostinato.kernels.block_linear.triton:default_tiles")
    tiles: Tiles = rule(p.n * (2 if p.gated else 1), p.k, p.m, num_multiprocessors(CUDA))
    return tiles


def report(products: list[Product]) -> None:
    """Time, bytes per second and arithmetic per second of each product with the tiles in use."""
    for p in products:
        bench = Bench(p)
        us = bench.us(None)
        n = p.n * (2 if p.gated else 1)
        print(f"{p.key:34s} {us:8.2f} us {bench.num_bytes / us / 1e6:5.2f} TB/s"
              f" {2 * n * p.k * p.m / us / 1e6:6.1f} TFLOP/s", flush=True)  # fmt: skip
        del bench


class SmolLayers:
    """The four products of SmolLM2's layers, in a chain of all layers."""

    def __init__(self, num_layers: int = 30) -> None:
        shapes = ((960, 576), (576, 576), (3072, 576), (576, 1536))
        self.layers = [[random_weight("Q4_1", n, k) for n, k in shapes] for _ in range(num_layers)]
        self.norms = [torch.rand(576, device=CUDA) for _ in range(num_layers)]

    def us(self, m: int, replays: int = 12) -> float:
        """Microseconds for one layer's products."""
        start = torch.randn(m, 576, device=CUDA)

        def step() -> torch.Tensor:
            hidden = start
            for (qkv, o, gate_up, down), norm in zip(self.layers, self.norms, strict=True):
                joined = block_linear(hidden, qkv, norm=norm, eps=1e-5)
                hidden = block_linear(joined[:, :576], o, residual=hidden)
                inner = block_linear(hidden, gate_up, norm=norm, eps=1e-5, gated="silu")
                hidden = block_linear(inner, down, residual=hidden)
            return hidden

        return graph_us([step], replays) / len(self.layers)

    def tune(self, m: int, log: list[dict[str, object]], top: int = 6) -> dict[str, Tiles]:
        """Of each product's fastest tiles alone, those that are fastest in the chain."""
        tiles = tuning.table(gpu_name(CUDA))
        chosen: dict[str, Tiles] = {}
        for p in smollm((m,))[:4]:
            entries = [e for e in log if e["key"] == p.key][:top]
            options = [Tiles(**{k: v for k, v in e.items() if k not in ("key", "us")}) for e in entries]  # type: ignore[arg-type]
            timed = []
            for option in options:
                tiles[p.key] = option
                choose_again()
                timed.append((self.us(m, 6), option))
            us, tiles[p.key] = min(timed, key=lambda pair: pair[0])
            chosen[p.key] = tiles[p.key]
            print(f"in the chain {p.key:28s} {us:6.2f} us a layer | {tiles[p.key]}", flush=True)
        choose_again()
        return chosen


def choose_again() -> None:
    """Forget the tiles chosen so far, after the table changed."""
    load("ostinato.kernels.block_linear.triton:choose").cache_clear()  # type: ignore[attr-defined]


def dense_report() -> None:
    """dense_linear beside PyTorch's own product."""
    for n, k, m in ((576, 1536, 1), (12288, 2048, 1), (2048, 4096, 1), (248320, 2048, 1), (12288, 2048, 4)):
        copies = max(2, min(64, COPIES_BYTES // (n * k * 2)))
        weights = [torch.randn(n, k, device=CUDA).bfloat16() for _ in range(copies)]
        x = torch.randn(m, k, device=CUDA).bfloat16()
        ours = graph_us([lambda x=x, w=w: dense_linear(x, w) for w in weights])
        theirs = graph_us([lambda x=x, w=w: x @ w.T for w in weights])
        print(f"dense bf16 {n}x{k} m{m}: {ours:.2f} us {n * k * 2 / ours / 1e6:.2f} TB/s, PyTorch {theirs:.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["tune", "report"])
    parser.add_argument("--set", nargs="+", default=["smollm"], choices=list(SETS), dest="sets")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["resident", "streamed", "mma", "wide", "tile", "packed"],
        help="measure these paths only",
    )
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    products = [p for name in arguments.sets for p in SETS[name]]
    if arguments.mode == "tune":
        if arguments.table:
            tuning.table(gpu_name(CUDA)).update(tuning.read(arguments.table))
        best, log = tune(products, arguments.seconds, arguments.only)
        tuning.table(gpu_name(CUDA)).update(best)
        choose_again()
        layers = SmolLayers()
        for m in sorted({p.m for p in products if p.k == 576}):
            best.update(layers.tune(m, log))
        if arguments.out:
            tuning.write(arguments.out, best)
            arguments.out.with_suffix(".log.json").write_text(json.dumps(log))
    elif arguments.table:
        tuning.table(gpu_name(CUDA)).update(tuning.read(arguments.table))
    if arguments.mode == "report":
        report(products)
        dense_report()
    layers = SmolLayers()
    for m in (1, 2, 4, 8, 16, 32, 64):
        print(f"SmolLM2 layer, four products, m{m}: {layers.us(m):.2f} us", flush=True)


if __name__ == "__main__":
    main()
