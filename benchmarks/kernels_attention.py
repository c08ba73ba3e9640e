"""Measures rotary embedding, attention and the sampler on a GPU.

python benchmarks/kernels_attention.py [--tune] [--only NAME] [--out FILE.json]

A figure is the median time of one call in a CUDA graph of many calls that follow each other under dependent launch,
each on its own cache, so that long contexts come from memory. --tune measures other tilings beside the chosen one.
--compile I/N only compiles every N-th case from I on: run N of these at once first, and the figures come sooner.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ostinato.kernels.decode_attention.triton import Tiling, fused_decode_attention
from ostinato.kernels.prefill_attention.triton import prefill_attention
from ostinato.kernels.rope.triton import rope_append
from ostinato.kernels.sample.triton import sample_step
from ostinato.sampling import SamplerState, SamplingParams

CUDA = torch.device("cuda")
PAGE = 256


@dataclass(frozen=True)
class Case:
    """A call to be measured: its name, how many calls a graph holds, bytes and operations of one call."""

    name: str
    call: Callable[[int], object]
    calls: int = 60
    num_bytes: int = 0
    flops: int = 0


def median_us(case: Case) -> float:
    for i in range(2):
        case.call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(case.calls):
            case.call(i)
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / case.calls)
    return sorted(times)[len(times) // 2]


class Cache:
    """Caches of ``layers`` layers for ``batch`` slots of ``length`` positions, and one token's qkv."""

    def __init__(self, heads: int, kv_heads: int, dim: int, batch: int, length: int, layers: int) -> None:
        self.heads, self.kv_heads, self.dim, self.batch, self.layers = heads, kv_heads, dim, batch, layers
        pages = -(-length // PAGE)
        shape = (batch * pages, kv_heads, PAGE, dim)
        self.k = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16) for _ in range(layers)]
        self.v = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16) for _ in range(layers)]
        self.table = torch.randperm(batch * pages, device=CUDA).int().view(batch, pages)
        self.slots = torch.arange(batch, device=CUDA, dtype=torch.int32)
        self.qkv = torch.randn(batch, (heads + 2 * kv_heads) * dim, device=CUDA, dtype=torch.bfloat16)
        self.inv_freq = 10000.0 ** -(torch.arange(0, dim, 2, device=CUDA) / dim)

    def decode(self, context: int, prefetch: bool, tiling: Tiling | None) -> Callable[[int], object]:
        positions = torch.full((self.batch,), context, dtype=torch.int32, device=CUDA)

        def call(i: int) -> object:
            layer = i % self.layers
            return fused_decode_attention(
                self.qkv, self.inv_freq, 1.0, positions, self.slots, self.table, self.k[layer], self.v[layer],
                None, None, 1e-6, self.heads, self.kv_heads, self.dim**-0.5, 0, 0.0,
                prefetch, tiling=tiling,
            )  # fmt: skip

        return call

    def kv_bytes(self, context: int) -> int:
        return self.batch * context * self.kv_heads * self.dim * 4


def decode_cases(tune: bool) -> Iterator[Case]:
    small = {batch: Cache(9, 3, 64, batch, 4352, 30) for batch in (1, 4, 16)}
    for batch, context in ((1, 0), (1, 63), (1, 512), (1, 2048), (1, 4096), (4, 512), (16, 512), (16, 4096)):
        tilings: list[Tiling | None] = [None]
        if tune:
            tilings += [
                Tiling(*cut)
                for cut in ((64, 68, 4, 1), (128, 34, 4, 1), (128, 34, 4, 2), (128, 17, 4, 2), (64, 34, 4, 2))
            ]
        for tiling in tilings:
            for prefetch in (True, False) if tiling is None else (True,):
                name = f"decode 9/3x64 batch {batch} @{context}{'' if prefetch else ' no prefetch'} {tiling or ''}"
                yield Case(name, small[batch].decode(context, prefetch, tiling), 60, small[batch].kv_bytes(context))
    del small
    for name, heads, kv_heads, dim in (("llama", 32, 8, 128), ("qwen3.5", 16, 2, 256)):
        cache = Cache(heads, kv_heads, dim, 1, 33024, 4)
        for context in (0, 512, 4096, 32768):
            tilings = [None]
            if tune:
                cuts = [(64, 128, 4, 2), (64, 66, 8, 3), (32, 128, 4, 4), (64, 64, 4, 1)]
                if dim == 128:
                    cuts += [(128, 16, 4, 3), (128, 16, 8, 2), (128, 33, 8, 3), (128, 66, 4, 2)]
                tilings += [Tiling(*cut) for cut in cuts]
            for tiling in tilings:
                call = cache.decode(context, True, tiling)
                label = f"decode {name} {heads}/{kv_heads}x{dim} batch 1 @{context} {tiling or ''}"
                yield Case(label, call, 12, cache.kv_bytes(context))


def prefill_cases(tune: bool) -> Iterator[Case]:
    for heads, kv_heads, dim, tokens, first in (
        (32, 8, 128, 2048, 0), (32, 8, 128, 2048, 30000), (9, 3, 64, 512, 0), (16, 2, 256, 2048, 0),
    ):  # fmt: skip
        cache = Cache(heads, kv_heads, dim, 1, first + tokens, 1)
        q = torch.randn(tokens, heads, dim, device=CUDA, dtype=torch.bfloat16)
        positions = torch.arange(first, first + tokens, device=CUDA, dtype=torch.int32)
        slots = torch.zeros(tokens, device=CUDA, dtype=torch.int32)
        options: list[tuple[int, int, int, int] | None] = [None]
        if tune and first == 0:
            options += [
                (128, 64, 8, 2),
                (128, 64, 8, 3),
                (64, 64, 4, 4),
                (64, 64, 4, 3),
                (64, 128, 4, 2),
                (128, 128, 8, 2),
            ]
        flops = 4 * heads * dim * tokens * (first + tokens // 2)
        for blocks in options:
            if blocks and dim == 256 and blocks[1] == 128:
                continue

            def call(i: int, q=q, cache=cache, slots=slots, positions=positions, blocks=blocks) -> object:
                return prefill_attention(
                    q, cache.k[0], cache.v[0], cache.table, slots, positions, q.shape[2] ** -0.5, 0, 0.0, blocks=blocks
                )

            name = f"prefill {heads}/{kv_heads}x{dim} tokens {tokens} @{first} {blocks or ''}"
            yield Case(name, call, 8, 0, flops)
        if first == 0:
            qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=CUDA, dtype=torch.bfloat16)

            def rope(i: int, qkv=qkv, c=cache, slots=slots, positions=positions) -> object:
                return rope_append(
                    qkv,
                    c.inv_freq,
                    1.0,
                    positions,
                    slots,
                    c.table,
                    c.k[0],
                    c.v[0],
                    None,
                    None,
                    1e-6,
                    c.heads,
                    c.kv_heads,
                )

            yield Case(f"rope_append {heads}/{kv_heads}x{dim} tokens {tokens}", rope, 20, 2 * qkv.numel() * 2)


def sample_cases(tune: bool) -> Iterator[Case]:
    settings = {
        "T 0": {"temperature": 0.0},
        "T 0.8": {"temperature": 0.8},
        "T 0.8 top-k 40 top-p 0.95": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
        "T 0.8 top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
        "T 0.8 penalties": {"temperature": 0.8, "repetition_penalty": 1.1},
        "T 1 top-k 1000": {"temperature": 1.0, "top_k": 1000},
        "T 0 20 log-probs": {"temperature": 0.0, "logprobs": 20},
    }
    for vocab, batch in ((49152, 1), (49152, 16), (248320, 1), (248320, 16)):
        for text, params in settings.items():
            state = SamplerState.allocate(batch, vocab, CUDA)
            for row in range(batch):
                state.set_row(row, SamplingParams(seed=row, **params), [1, 2])
                state.activate(row, 1, 1, 1 << 30)
            # Peaked like a language model's: few tokens far above a wide body.
            logits = torch.randn(batch, vocab, device=CUDA) * 2 + 12 * torch.rand(batch, vocab, device=CUDA).pow(200)
            for chunk in (None, 256, 512, 1024, 2048) if tune and text == "T 0.8" else (None,):

                def call(i: int, logits=logits, state=state, chunk=chunk) -> object:
                    return sample_step(logits, None, *state.buffers.tensors(), chunk=chunk)

                yield Case(f"sample V {vocab} batch {batch} {text}{f' chunk {chunk}' if chunk else ''}", call, 20)


def run(description: str | None, *groups: Callable[[bool], Iterator[Case]]) -> None:
    """Measure the cases of all groups that the command line asks for; a group is told whether to tune."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--compile", default="", help="I/N: only compile every N-th case from I on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {}
    wanted = (case for cases in groups for case in cases(options.tune) if options.only in case.name)
    for index, case in enumerate(wanted):
        if options.compile:
            first, step = (int(part) for part in options.compile.split("/"))
            if index % step == first:
                case.call(0)
            continue
        us = median_us(case)
        results[case.name] = us
        rates = f"{case.num_bytes / us / 1e3:8.0f} GB/s" if case.num_bytes else ""
        rates += f"{case.flops / us / 1e6:8.0f} TFLOP/s" if case.flops else ""
        print(f"{us:9.2f} us {rates}  {case.name}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    run(__doc__, sample_cases, decode_cases, prefill_cases)
