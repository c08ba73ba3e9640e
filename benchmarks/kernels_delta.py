"""Measures the gated delta rule at the sizes of Qwen3.5-35B-A3B on a GPU.

python benchmarks/kernels_delta.py [--tune] [--only NAME] [--out FILE.json] [--profile]

A figure is the median time of one call in a CUDA graph of many calls that follow each other under dependent launch,
each on its own layer, so that states and weights come from memory. Before it is measured, every case is compared with
the reference, and its error stands beside its time. --tune measures other tilings beside the chosen one. --profile
lists the kernels of prefill. --compile I/N only runs every N-th case from I on, once: run N of these at once first, and
the figures come sooner.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ostinato.kernels.delta.decode.triton import Tiling, delta_decode
from ostinato.kernels.delta.prefill.triton import Plan, delta_prefill
from ostinato.kernels.delta.ref import delta_decode_ref, delta_prefill_ref
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.batch import Batch
from ostinato.layers.delta_net import DeltaNet
from ostinato.layers.linear import Linear, Norm
from ostinato.quant.blocks import KINDS, BlockWeight

CUDA = torch.device("cuda")
KEY_HEADS, VALUE_HEADS, DIM, HIDDEN, WIDTH = 16, 32, 128, 2048, 4
CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * DIM
STATE_BYTES = 4 * VALUE_HEADS * DIM * DIM


@dataclass(frozen=True)
class Case:
    """A call to be measured, how many calls a graph holds, the bytes of one, and its error."""

    name: str
    call: Callable[[int], object]
    calls: int
    num_bytes: int
    error: Callable[[], float]


def median_us(case: Case) -> float:
    for i in range(2):
        case.call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(case.calls):
            case.call(i)
    times = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / case.calls)
    return sorted(times)[len(times) // 2]


def layer(slots: int, dtype: torch.dtype) -> dict[str, Any]:
    """One layer's parameters and the states of ``slots`` slots."""
    return {
        "norm": torch.rand(HIDDEN, device=CUDA) + 0.5,
        "norm_eps": 1e-6,
        "beta_alpha": (torch.randn(2 * VALUE_HEADS, HIDDEN, device=CUDA) * HIDDEN**-0.5).to(dtype),
        "conv_weight": torch.randn(WIDTH, CHANNELS, device=CUDA) * 0.5,
        "a_log": torch.empty(VALUE_HEADS, device=CUDA).uniform_(0.01, 4.0).log(),
        "dt_bias": torch.randn(VALUE_HEADS, device=CUDA) - 2.0,
        "gate_norm": torch.rand(DIM, device=CUDA) + 0.5,
        "eps": 1e-6,
        "conv_state": torch.randn(slots, WIDTH, CHANNELS, device=CUDA),
        "state": torch.randn(slots, VALUE_HEADS, DIM, DIM, device=CUDA) * 0.1,
        "pending": torch.rand(slots, 2, VALUE_HEADS, 2 * DIM + 1, device=CUDA) * 0.1,
    }


def inputs(rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "qkvz": torch.randn(rows, CHANNELS + VALUE_HEADS * DIM, device=CUDA).to(dtype),
        "h": torch.randn(rows, HIDDEN, device=CUDA) * 3.0,
    }


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in given.items()}


HEADS = {"num_k_heads": KEY_HEADS, "num_v_heads": VALUE_HEADS, "tiled": False}


def decode_cases(rows: int, tilings: list[Tiling | None]) -> Iterator[Case]:
    x = inputs(rows, torch.bfloat16)
    layers = [layer(rows, torch.bfloat16) for _ in range(max(4, 128 // rows))]
    x["slots"] = torch.arange(rows, device=CUDA, dtype=torch.int32)
    x["positions"] = torch.full((rows,), 500, device=CUDA, dtype=torch.int32)
    x["active"] = torch.ones(rows, device=CUDA, dtype=torch.int32)
    for form in ("rounded", "plain"):
        for tiling in tilings:
            if tiling is not None and form == "plain" and tiling.parts > 1:
                continue

            def call(i: int, tiling: Tiling | None = tiling, form: str = form) -> object:
                given = x | layers[i % len(layers)]
                return delta_decode(**given, **HEADS, form=form, gates=None, prefetch=True, tiling=tiling)

            def error(tiling: Tiling | None = tiling, form: str = form) -> float:
                ours, theirs = copied(x | layers[0]), copied(x | layers[0])
                y, _, scale = delta_decode(**ours, **HEADS, form=form, gates=None, prefetch=False, tiling=tiling)
                expected, _, true_scale = delta_decode_ref(**theirs, **HEADS, form=form)
                if form == "rounded":
                    y, expected = (a.view(*s.shape, 32) * s[..., None] for a, s in ((y, scale), (expected, true_scale)))
                return max(distance(y, expected), *(distance(ours[n], theirs[n]) for n in ("state", "pending")))

            name = f"decode, {rows} rows{', deferred norm' if form == 'rounded' else ''}, {tiling or 'chosen'}"
            yield Case(name, call, max(30, len(layers)), rows * 2 * STATE_BYTES, error)


def random_linear(rows: int, columns: int) -> Linear:
    """Random four-bit weights in groups of 128."""
    bits = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32, device=CUDA)
    step, least = ((torch.rand(rows, columns // 128, device=CUDA) * 0.003).half() for _ in range(2))
    weight = BlockWeight(KINDS["I4_128"], (rows, columns), bits, step, m=least)
    return Linear((weight,))


def mixer_cases() -> Iterator[Case]:
    """One row through whole layers: input projection, rule, output projection, and the same without one or two."""
    x = inputs(1, torch.bfloat16)
    zero, one = (torch.full((1,), i, device=CUDA, dtype=torch.int32) for i in range(2))
    batch = Batch(zero, one * 500, zero, True, one)
    layers = []
    for _ in range(30):
        w = layer(1, torch.bfloat16)
        net = DeltaNet(
            Norm(w["norm"], 1e-6), random_linear(CHANNELS + VALUE_HEADS * DIM, HIDDEN), w["beta_alpha"],
            w["conv_weight"], w["a_log"], w["dt_bias"], Norm(w["gate_norm"], 1e-6),
            random_linear(HIDDEN, VALUE_HEADS * DIM), KEY_HEADS, VALUE_HEADS, False,
        )  # fmt: skip
        layers.append((net, RecurrentState(w["conv_state"], w["state"], w["pending"])))

    def project(i: int) -> torch.Tensor:
        net = layers[i % 30][0]
        return net.in_proj(x["h"], norm=net.norm, out_dtype=torch.bfloat16)

    def rule(i: int) -> object:
        net, state = layers[i % 30]
        return net.rule(project(i), x["h"], batch, state)

    def whole(i: int) -> torch.Tensor:
        net, state = layers[i % 30]
        return net(x["h"], batch, state, torch.bfloat16)

    calls: dict[str, Callable[[int], object]] = {
        "input projection": project, "input projection and rule": rule, "whole mixer": whole,
    }  # fmt: skip
    for name, call in calls.items():
        yield Case(f"mixer, 1 row, {name}", call, 30, 0, lambda: 0.0)


def prefill_cases(tokens: int, plans: list[Plan | None], dtype: torch.dtype, short: int) -> Iterator[Case]:
    x = inputs(tokens, dtype)
    layers = [layer(1, dtype) for _ in range(4)]
    x["slots"] = torch.zeros(tokens, device=CUDA, dtype=torch.int32)
    x["positions"] = torch.arange(300, 300 + tokens, device=CUDA, dtype=torch.int32)
    for plan in plans:

        def call(i: int, plan: Plan | None = plan) -> object:
            return delta_prefill(**x, **layers[i % len(layers)], **HEADS, plan=plan, short=short)

        def error(plan: Plan | None = plan) -> float:
            part = {name: v[:500] for name, v in x.items()}
            ours, theirs = copied(part | layers[0]), copied(part | layers[0])
            y = delta_prefill(**ours, **HEADS, plan=plan, short=short)
            expected = delta_prefill_ref(**theirs, **HEADS)
            return max(distance(y, expected), distance(ours["state"], theirs["state"]))

        name = f"prefill, {tokens} tokens, {str(dtype)[6:]}, {plan or 'chosen'}{'' if short else ', by chunks'}"
        yield Case(name, call, 8, 0, error)


def cases(tune: bool) -> Iterator[Case]:
    yield from mixer_cases()
    for rows in (1, 2, 4, 8, 16, 32, 64):
        tilings: list[Tiling | None] = [None]
        if tune:
            tilings += [Tiling(parts, warps) for parts in (1, 2, 4) for warps in (1, 2, 4, 8, 16)]
        yield from decode_cases(rows, tilings)
    plans: list[Plan | None] = [None]
    if tune:
        plans += [
            Plan("tf32", torch.float32, columns, warps, stages, chunk_warps)
            for columns, warps, stages, chunk_warps in (
                (32, 4, 2, 4), (16, 4, 2, 8), (32, 8, 2, 8), (16, 8, 2, 4), (32, 4, 1, 4), (16, 4, 1, 8),
            )
        ]  # fmt: skip
        plans += [
            Plan("bf16", torch.bfloat16, columns, warps, stages, chunk_warps)
            for columns, warps, stages, chunk_warps in (
                (32, 4, 3, 4), (16, 4, 3, 8), (32, 4, 2, 8), (16, 4, 2, 4), (64, 4, 2, 4), (64, 8, 2, 8),
            )
        ]  # fmt: skip
        plans += [
            Plan("tf32x3", torch.float32, columns, warps, stages, chunk_warps)
            for columns, warps, stages, chunk_warps in ((32, 4, 1, 4), (16, 4, 1, 4))
        ]  # fmt: skip
    yield from prefill_cases(4096, plans, torch.bfloat16, 16)
    yield from prefill_cases(4096, [None], torch.float32, 16)
    for tokens in (1024, 256, 64, 16, 4):
        yield from prefill_cases(tokens, [None], torch.bfloat16, 16)
    for tokens in (32, 16, 4):
        yield from prefill_cases(tokens, [None], torch.bfloat16, 0 if tokens <= 16 else 32)


def list_kernels() -> None:
    """The time of each kernel of a prefill."""
    for tokens in (4, 16, 64, 4096):
        (case,) = prefill_cases(tokens, [None], torch.bfloat16, 16)
        for i in range(4):
            case.call(i)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for i in range(8):
                case.call(i)
            torch.cuda.synchronize()
        for entry in found.key_averages():
            print(f"{tokens} tokens, {entry.key}: {entry.device_time:.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compile", metavar="I/N")
    options = parser.parse_args()
    torch.manual_seed(0)
    wanted = (case for case in cases(options.tune) if options.only in case.name)
    if options.compile:
        first, step = (int(part) for part in options.compile.split("/"))
        for i, case in enumerate(wanted):
            if i % step == first:
                case.call(0)
        return
    results = []
    for case in wanted:
        entry = {"name": case.name, "error": case.error(), "us": median_us(case)}
        rate = f", {case.num_bytes / entry['us'] / 1e6:.2f} TB/s" if case.num_bytes else ""
        print(f"{case.name}: {entry['us']:.2f} us{rate}, error {entry['error']:.1e}", flush=True)
        results.append(entry)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))
    if options.profile:
        list_kernels()


if __name__ == "__main__":
    main()
