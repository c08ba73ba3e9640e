"""Finds tiles inside the whole step: one field after the other, each timed in a graph of the forward pass.

    python benchmarks/step_tiles.py --random qwen3.5-35b-a3b [--batch 1] [--room 640] [--seconds 100] [--out tuned.json]

Kernels of a step overlap, so tiles that are best for a product alone need not be for the step. A value is kept where
the step becomes faster by more than the clock is off, and the next field is tried with it. Tiles of products go to a
table, --out; those of experts, delta rule and attention follow rules in the code, and what was best is printed.

Where buffers lie changes a step by up to 3 %: each figure is the mean of three captures, behind an allocation of random
size.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from step_parts import graph_us, load_step

from ostinato.kernels import tuning
from ostinato.kernels.block_linear import triton as linear
from ostinato.kernels.decode_attention import triton as attention
from ostinato.kernels.delta.decode import triton as delta
from ostinato.kernels.launch import gpu_name
from ostinato.kernels.moe import triton as moe
from ostinato.kernels.routed_linear import triton as routed
from ostinato.kernels.tuning import Tiles, linear_key
from ostinato.layers.attention import Attention
from ostinato.layers.delta_net import DeltaNet
from ostinato.layers.moe import MoE
from ostinato.load.random import RandomCheckpoint
from ostinato.models.qwen3_5 import Qwen35ForCausalLM
from ostinato.quant.blocks import BlockWeight

CAPTURES, REPLAYS, ROUNDS = 3, 20, 2
SAVED = 0.9985  # of the best time: what is slower than that is not told from noise
LONG = 4096  # positions from which programs of attention take several tiles

Undo = Callable[[], None]
Fields = dict[str, int]


@dataclass(frozen=True)
class Axis:
    """Values of a field to try. take: lets the step use one, until what it returns is called. key: in the table."""

    name: str
    values: Sequence[Any]
    take: Callable[[Any], Undo]
    key: str | None = None


def in_table(table: dict[str, Tiles], key: str, values: list[Tiles]) -> Axis:
    """Tiles of one product."""

    def put(value: Tiles | None) -> None:
        if value is None:
            table.pop(key)
        else:
            table[key] = value
        linear.choose.cache_clear()

    def take(value: Tiles) -> Undo:
        before = table.get(key)
        put(value)
        return lambda: put(before)

    return Axis(key, values, take, key)


def of_rule(name: str, module: ModuleType, rule: str, values: Sequence[Any]) -> Axis:
    """What the function ``rule`` of a module returns: a value itself or, where it is a dict, with these fields."""

    def take(value: Any) -> Undo:
        before = getattr(module, rule)

        def chosen(*given: Any) -> Any:
            return replace(before(*given), **value) if isinstance(value, dict) else value

        setattr(module, rule, chosen)
        return lambda: setattr(module, rule, before)

    return Axis(name, values, take)


def products(model: Qwen35ForCausalLM) -> Iterator[BlockWeight]:
    """A weight of each shape that mixers multiply by."""
    found: dict[tuple[str, tuple[int, ...]], BlockWeight] = {}
    for mixer in (layer.mixer for layer in model.layers):
        first = mixer.in_proj if isinstance(mixer, DeltaNet) else mixer.qkv
        for weight in (first.block_weight, mixer.out.block_weight):
            if weight is not None:
                found.setdefault((weight.kind.name, weight.shape), weight)
    yield from found.values()


def product_tiles(columns: int, rows: int) -> list[Tiles]:
    """Candidates for ``rows`` rows of x: W streamed for few, tensor cores for more."""
    most = 1 << (rows - 1).bit_length()
    if rows == 1:  # a row of W in 32 lanes, one to 16 of them a warp
        cuts = product((8, 16, 32, 64, 128), (1, 2, 4, 8, 16))
        return [Tiles("streamed", r, 32, 1, warps) for r, warps in cuts if r % warps == 0 and r // warps <= 16]
    if rows <= 4:
        groups = 1 << (columns // 32 - 1).bit_length()
        return [
            Tiles("streamed", r, g, min(most, 4), warps)
            for r, g, warps in product((2, 4, 8, 16), (groups // 2, groups), (1, 2, 4, 8))
            if r % max(1, warps * 32 // g) == 0  # no thread without a row
        ]
    return [
        Tiles("wide", r, g, tokens, warps)
        for r, g, tokens, warps in product((16, 32), (1, 2, 4), (8, 16, 32), (1, 2, 4, 8))
        if tokens <= max(8, most)
    ]


def product_axes(model: Qwen35ForCausalLM, table: dict[str, Tiles], rows: int) -> Iterator[Axis]:
    for weight in products(model):
        if rows > 4 and not linear.takes_wide(weight.kind):
            continue
        key = linear_key(weight.kind.name, *weight.shape, rows, gated=False)
        if f"{key} int8" in table:  # measured apart for rows that are int8 already, as the step's are
            key += " int8"
        yield in_table(table, key, product_tiles(weight.shape[1], rows))


def expert_fields(rows: int, tiles: moe.MoeTiles) -> list[list[Fields]]:
    """Fields of MoeTiles to try, kernel by kernel, where the rule says ``tiles``."""

    def every(**values: tuple[int, ...]) -> list[Fields]:
        return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]

    router = every(router_rows=(2, 4, 8), router_warps=(4, 8), router_tokens=(1,) if rows == 1 else (1, 2, 4))
    if tiles.apart:
        gates = ((4, 2), (4, 4), (8, 2), (8, 4), (8, 8), (16, 4), (16, 8))
        gate = [{"gate_rows": r, "gate_warps": warps} for r, warps in gates]
        down = [{"down_rows": r, "down_warps": 4, "together": t} for r, t in ((4, 2), (8, 4))]
    elif tiles.integer:
        gate = [{"gate_tiles": wide, "registers": most} for wide, most in ((1, 128), (2, 224), (2, 255))]
        down = every(down_tiles=(4,), down_warps=(1, 2), down_depth=(2, 4), down_registers=(255,))
    else:
        gate = every(gate_rows=(4, 8, 16), gate_warps=(2, 4), registers=(0, 128))
        down = every(down_rows=(4, 8, 16), down_warps=(1, 2, 4))
    return [router, gate, down]


def expert_axes(model: Qwen35ForCausalLM, rows: int) -> Iterator[Axis]:
    blocks = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    if not blocks:
        return
    gate_up, down = blocks[0].gate_up, blocks[0].down
    if not isinstance(gate_up, BlockWeight) or not isinstance(down, BlockWeight):
        return
    kinds = gate_up.kind.name, down.kind.name
    density = rows * blocks[0].top_k / blocks[0].num_experts
    tiles = moe.default_tiles(rows, gate_up.shape[1], down.shape[1], kinds, density)
    for name, values in zip(("router", "gate and up", "down"), expert_fields(rows, tiles), strict=True):
        yield of_rule(f"experts: {name}", moe, "default_tiles", values)


def attention_tilings(room: int) -> list[attention.Tiling]:
    if room > LONG:
        cuts = ((32, 128, 4, 2, 32), (32, 126, 4, 3, 32), (16, 128, 4, 2, 32), (64, 128, 4, 2, 32), (64, 128, 4, 2, 64))
        found = [attention.Tiling(*cut, own=own) for cut in cuts for own in (False, True)]
        return [*found, attention.Tiling(64, 128, 4, 2, 32, own=True, first=32)]
    cuts = product((16, 32, 64), (4, 8), (32, 64), (False, True))
    return [attention.Tiling(block, -(-room // block), warps, 1, columns, own) for block, warps, columns, own in cuts]


def routed_tiles() -> list[routed.RoutedTiles]:
    """Candidates for the output product that does the router's work."""
    return [
        routed.RoutedTiles(rows, 32, warps, routes)
        for rows, warps, routes in product((16, 32, 64), (4, 8, 16), (2, 4, 8, 16))
    ]


def axes_of(model: Qwen35ForCausalLM, table: dict[str, Tiles], rows: int, room: int) -> list[Axis]:
    """All fields, in the order in which they are tried."""
    found = list(product_axes(model, table, rows))
    if rows == 1 and any(layer.routing is not None for layer in model.layers):
        found.insert(0, of_rule("output product that routes", routed, "default_tiles", routed_tiles()))
    mixers = [layer.mixer for layer in model.layers]
    if rows > 1 and any(isinstance(mixer, DeltaNet) for mixer in mixers):  # one row has a kernel without a choice
        found.append(of_rule("delta rule", delta, "choose", [delta.Tiling(1, warps) for warps in (4, 8)]))
    found += expert_axes(model, rows)
    if any(isinstance(mixer, Attention) for mixer in mixers):
        found.append(of_rule("attention", attention, "choose_tiling", attention_tilings(room)))
    return found


def search(axes: list[Axis], step_us: Callable[[], float], seconds: float) -> dict[str, Tiles]:
    """Take the best value of one axis after the other, and of all again where one helped; the table's new entries."""
    began = time.monotonic()
    best, chosen = step_us(), {}
    print(f"as it is: {best:.1f} us", flush=True)
    for _ in range(ROUNDS):
        changed = False
        for axis in axes:
            timed = []
            for value in axis.values:
                if time.monotonic() - began > seconds:
                    break
                undo = axis.take(value)
                try:
                    timed.append((step_us(), value))
                except Exception as error:
                    print("failed:", axis.name, value, repr(error)[:120])
                undo()
            if not timed:
                continue
            timed.sort(key=lambda pair: pair[0])
            print(f"  {axis.name}: " + "; ".join(f"{us:.1f} {value}" for us, value in timed[:5]), flush=True)
            if timed[0][0] < SAVED * best:
                axis.take(timed[0][1])
                best, changed = step_us(), True
                if axis.key is not None:
                    chosen[axis.key] = timed[0][1]
                print(f"  -> {best:.1f} us", flush=True)
        if not changed:
            break
    return chosen


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", default="qwen3.5-35b-a3b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--room", type=int, default=640, help="positions that a slot has room for")
    parser.add_argument("--position", type=int, default=512, help="where the step's tokens stand")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--seconds", type=float, default=100.0, help="no value is tried after these")
    parser.add_argument("--out", type=Path, help="a table of the tiles of products that were changed")
    args = parser.parse_args()
    torch.manual_seed(0)
    loaded, batch = load_step(RandomCheckpoint(args.random), args.batch, args.position, args.room, args.kv)
    model, layers, device = loaded.model, loaded.runner.kv.layers, loaded.device
    if not isinstance(model, Qwen35ForCausalLM):
        parser.error(f"{args.random} has none of the layers whose tiles are sought here: take one of Qwen3.5's sizes")

    def forward() -> object:
        moved = torch.empty(random.randrange(1, 3000) * 512, dtype=torch.uint8, device=device)
        return moved, model.forward(batch, layers)

    def step_us() -> float:
        return sum(graph_us(forward, REPLAYS) for _ in range(CAPTURES)) / CAPTURES

    print(f"{args.random}, {args.batch} rows at {args.position}, room for {args.room}")
    axes = axes_of(model, tuning.table(gpu_name(device)), args.batch, args.room)
    chosen = search(axes, step_us, args.seconds)
    if args.out:
        tuning.write(args.out, chosen)


if __name__ == "__main__":
    main()
