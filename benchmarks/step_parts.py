"""Where the time of a decode step goes: each part of a model's step in a graph of its own, over all layers' weights.

    python benchmarks/step_parts.py --random qwen3.5-35b-a3b [--context 512] [--batch 1]

A part's graph runs it for every layer in turn, so its weights come from memory and not from the cache, and each kernel
starts behind the one before it under programmatic dependent launch, as in the step. Parts overlap in the step, so they
add up to more than it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from ostinato.engine.loading import EngineConfig, Loaded, load_engine
from ostinato.engine.measure import read_bandwidth
from ostinato.engine.step import decode_step
from ostinato.kernels.block_linear import prefers_int8
from ostinato.kernels.embed import embed
from ostinato.kernels.rms_norm import quantize_rows
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.attention import Attention
from ostinato.layers.batch import Batch
from ostinato.layers.delta_net import DeltaNet
from ostinato.layers.linear import RoundedRow, RoutedRow, weight_bytes
from ostinato.load.random import RandomCheckpoint
from ostinato.models.qwen3_5 import handed_norm, norm_and_product

REPLAYS = 30


def graph_us(run: Callable[[], object], replays: int = REPLAYS) -> float:
    """Microseconds of a graph of ``run``, median over replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[replays // 2] * 1e3


def load_step(opened: RandomCheckpoint, rows: int, position: int, room: int, kv: str) -> tuple[Loaded, Batch]:
    """The model on the GPU with ``room`` positions for each of ``rows`` slots, and a decode step of them all."""
    loaded = load_engine(opened, EngineConfig(device="cuda", context=room, num_slots=rows, kv=kv))
    device = loaded.device
    for slot in range(rows):
        loaded.runner.kv.reserve(slot, room)
    tokens = torch.randint(loaded.model.vocab_size, (rows,), dtype=torch.int32, device=device)
    positions = torch.full((rows,), position, dtype=torch.int32, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    return loaded, Batch(tokens, positions, slots, True, torch.ones(rows, dtype=torch.int32, device=device))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", default="qwen3.5-35b-a3b")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv", default="auto")
    args = parser.parse_args()
    opened = RandomCheckpoint(args.random)
    loaded, batch = load_step(opened, args.batch, args.context, args.context + 64, args.kv)
    model, runner, device = loaded.model, loaded.runner, loaded.device
    limit = read_bandwidth(device)
    print(f"{opened.label}: loaded in {loaded.seconds:.1f} s, reads {limit / 1e12:.2f} TB/s")

    rows = args.batch
    act = model.activation
    h = embed(batch.tokens, model.embed, out_dtype=torch.float32)
    layers = list(zip(model.layers, runner.kv.layers, strict=True))
    deltas = [(layer, layer.mixer, c) for layer, c in layers if isinstance(layer.mixer, DeltaNet)]
    attentions = [(layer, layer.mixer, c) for layer, c in layers if isinstance(layer.mixer, Attention)]
    experts = [layer.mlp for layer in model.layers]
    behind = [*map(norm_and_product, model.layers[1:]), (model.norm, model.head)]
    blocks = [(mlp, handed_norm(mlp, after, batch)) for mlp, after in zip(experts, behind, strict=True)]
    row, last_row = (mlp(h, act, after)[1] for mlp, after in (blocks[0], blocks[-1]))
    norm = "norm + " if row is None else ""  # else the experts before it have done that
    routed: RoutedRow | None = None  # what spares the experts their router
    kv_bytes = rows * args.context * (loaded.budget.kv_bytes_per_token // max(len(attentions), 1))

    def show(name: str, count: int, num_bytes: float, run: Callable[[], object]) -> None:
        us = graph_us(run) / count
        print(f"{name:32s} {us:8.2f} us × {count:3d} {num_bytes / 1e6:9.2f} MB {num_bytes / us / limit * 1e8:6.1f} %")

    def each(found: list[object], call: Callable[..., object]) -> Callable[[], object]:
        def run() -> None:
            for item in found:
                call(item)

        return run

    if deltas:
        layer, first, cache = deltas[0]

        def project(net: DeltaNet) -> tuple[torch.Tensor, torch.Tensor | None]:
            if row is None:
                return net.in_proj(h, norm=net.norm, out_dtype=act), None
            return net.in_proj.of_rounded_beside(row, h, net.norm.weight, net.beta_alpha, out_dtype=act)

        qkvz, gates = project(first)
        ruled = first.rule(qkvz, h, batch, cache, gates)
        routed = layer.output(ruled, h)[1]
        state = 2 * rows * sum(t[0].numel() * t.element_size() for t in cache.tensors())
        show(
            f"delta: {norm}input projection{'' if gates is None else ' + gates'}",
            len(deltas),
            first.in_proj.num_bytes + (0 if gates is None else weight_bytes(first.beta_alpha)),
            each(deltas, lambda d: project(d[1])),
        )
        show(
            "delta: conv, rule, gated norm",
            len(deltas),
            state,
            each(deltas, lambda d: d[1].rule(qkvz, h, batch, d[2], gates)),
        )
        show(
            f"delta: output + residual{'' if routed is None else ' + router'}",
            len(deltas),
            first.out.num_bytes + (0 if layer.routing is None or routed is None else layer.routing.num_bytes),
            each(deltas, lambda d: d[0].output(ruled, h)),
        )
        show(
            "delta: whole mixer",
            len(deltas),
            0,
            each(deltas, lambda d: d[0].output(d[1].mix(h, batch, d[2], act, row), h)),
        )
    if attentions:
        layer_a, first_a, _ = attentions[0]
        width = first_a.num_heads * first_a.spec.head_dim
        z = torch.randn(rows, width, dtype=act, device=device)
        weight = first_a.out.block_weight
        routes = layer_a.routing is not None and rows == 1
        rounds = weight is not None and (routes or prefers_int8(weight, rows))
        attended = RoundedRow(*quantize_rows(z), None, 0.0) if rounds else z
        routed = layer_a.output(attended, h)[1]

        def queries(net: Attention) -> torch.Tensor:
            if row is None:
                return net.qkv(h, norm=net.norm, out_dtype=act)
            return net.qkv.of_rounded(row, out_dtype=act)

        show(
            f"attention: {norm}projections",
            len(attentions),
            first_a.qkv.num_bytes,
            each(attentions, lambda a: queries(a[1])),
        )
        show(
            f"attention: output + residual{'' if routed is None else ' + router'}",
            len(attentions),
            first_a.out.num_bytes + (0 if layer_a.routing is None or routed is None else layer_a.routing.num_bytes),
            each(attentions, lambda a: a[0].output(attended, h)),
        )
        show(
            "attention: whole mixer",
            len(attentions),
            kv_bytes,
            each(attentions, lambda a: a[0].output(a[1].mix(h, batch, a[2], act, row, routes), h)),
        )
    show(
        "experts: all of the block" if routed is None else "experts: all but the router",
        len(blocks),
        experts[0].expected_bytes(rows) - (0 if routed is None else weight_bytes(experts[0].router)),
        each(blocks, lambda b: b[0](h, act, b[1], routed)),
    )

    def head() -> torch.Tensor:
        if last_row is None:
            return model.head(h, norm=model.norm, out_dtype=torch.float32)
        return model.head.of_rounded(last_row, out_dtype=torch.float32)

    show("norm + lm_head" if last_row is None else "lm_head", 1, model.head.num_bytes, head)
    logits = head()
    show("sampler", 1, 0, lambda: runner.sampler.step(logits))
    show("the forward pass", 1, model.bytes_per_step(rows), lambda: model.forward(batch, runner.kv.layers))
    b = runner.buffers
    for held in ("tokens", "positions", "slots", "active"):
        getattr(b, held)[:rows].copy_(getattr(batch, held))
    b.remaining[:rows].fill_(2 * REPLAYS)
    recurrent = [c for c in runner.kv.layers if isinstance(c, RecurrentState)]
    print(f"{len(recurrent)} recurrent layers of {len(runner.kv.layers)}")
    show(
        "the step",
        1,
        model.bytes_per_step(rows),
        lambda: decode_step(model, runner.kv, runner.sampler, runner.buffers, rows),
    )


if __name__ == "__main__":
    main()
