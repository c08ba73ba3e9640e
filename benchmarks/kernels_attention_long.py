"""Measures attention of 16 query and 2 KV heads of size 256, gated, from 512 tokens to 128K, bfloat16 and FP8 caches.

python benchmarks/kernels_attention_long.py [--tune] [--only NAME] [--out FILE.json]

As in kernels_attention.py, whose clock this is, a figure is the median time of one call in a CUDA graph of calls under
dependent launch. The calls walk over scattered pages of one large pool, so that keys and values come from memory.
``rounded`` is the form that leaves its result in int8, as a step of one row takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kernels_attention import CUDA, PAGE, Case, run

from ostinato.kernels.decode_attention.triton import Tiling, fused_decode_attention
from ostinato.kernels.prefill_attention.triton import prefill_attention
from ostinato.kernels.rope.ref import FP8
from ostinato.kernels.rope.triton import rope_append

HEADS, KV_HEADS, DIM, ROTARY = 16, 2, 256, 64
WIDTH = (2 * HEADS + 2 * KV_HEADS) * DIM
POOL_BYTES = 3 << 29
BF16_CUTS = ((64, 66, 8, 3), (64, 66, 8, 4), (64, 66, 4, 3), (32, 66, 4, 5), (32, 66, 4, 3, 32), (32, 128, 4, 3, 32))
FP8_CUTS = ((32, 128, 4, 3), (32, 128, 4, 4), (64, 128, 4, 3), (64, 66, 4, 4), (64, 66, 8, 4), (64, 128, 8, 3))
BLOCKS = ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (128, 32, 8, 2))


class Pool:
    """Pages of one layer's cache, and page tables that point anywhere in it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.pages = POOL_BYTES // (2 * KV_HEADS * PAGE * DIM * dtype.itemsize)
        shape = (self.pages, KV_HEADS, PAGE, DIM)
        self.k, self.v = (torch.randn(shape, device=CUDA, dtype=torch.bfloat16).to(dtype) for _ in range(2))
        scale = torch.rand(shape[:3], device=CUDA) / 100 if dtype == FP8 else None
        self.scales = (scale, scale)
        self.inv_freq = 1e7 ** -(torch.arange(0, ROTARY, 2, device=CUDA) / ROTARY)
        self.norm = torch.ones(DIM, device=CUDA)

    def tables(self, batch: int, length: int, calls: int) -> list[torch.Tensor]:
        per_slot = -(-length // PAGE)
        order = torch.cat([torch.randperm(self.pages, device=CUDA) for _ in range(-(-batch * per_slot // self.pages))])
        # Each call begins elsewhere in the pool; the rows of a call share no page as long as the pool has enough.
        return [
            order.roll(-i * batch * per_slot)[: batch * per_slot].view(batch, per_slot).int().contiguous()
            for i in range(calls)
        ]

    def decode(
        self, batch: int, context: int, calls: int, tiling: Tiling | None, rounded: bool = False
    ) -> Callable[[int], object]:
        tables = self.tables(batch, context + 1, calls)
        wide = torch.zeros(batch, 131072 // PAGE + 1, device=CUDA, dtype=torch.int32)  # as for a context of 128K
        rows = []
        for table in tables:
            row = wide.clone()
            row[:, : table.shape[1]] = table
            rows.append(row)
        positions = torch.full((batch,), context, dtype=torch.int32, device=CUDA)
        slots = torch.arange(batch, device=CUDA, dtype=torch.int32)
        qkv = torch.randn(batch, WIDTH, device=CUDA, dtype=torch.bfloat16)

        def call(i: int) -> object:
            return fused_decode_attention(
                qkv, self.inv_freq, 1.0, positions, slots, rows[i % calls], self.k, self.v, self.norm, self.norm, 1e-6,
                HEADS, KV_HEADS, DIM**-0.5, 0, 0.0, True, *self.scales, True, rounded, tiling=tiling,
            )  # fmt: skip

        return call

    def kv_bytes(self, batch: int, context: int) -> int:
        return batch * context * KV_HEADS * 2 * (DIM * self.dtype.itemsize + (4 if self.dtype == FP8 else 0))


def cases(tune: bool) -> Iterator[Case]:
    for name, dtype, cuts in (("bf16", torch.bfloat16, BF16_CUTS), ("fp8", FP8, FP8_CUTS)):
        pool = Pool(dtype)
        for batch, contexts in (
            (1, (0, 31, 512, 4096, 32768, 131000)),
            (2, (4096, 32768)),
            (8, (4096,)),
            (64, (2048,)),
        ):
            for context in contexts:
                tilings: list[Tiling | None] = [None]
                if tune and context >= 512:
                    programs = {cut: max(1, cut[1] // batch) for cut in cuts}
                    tilings += [Tiling(cut[0], splits, *cut[2:]) for cut, splits in programs.items()]
                for tiling in tilings:
                    label = f"decode {name} batch {batch} @{context} {tiling or ''}"
                    calls = 6 if batch * context > 65536 else 30
                    num_bytes = pool.kv_bytes(batch, context)
                    yield Case(label, pool.decode(batch, context, calls, tiling), calls, num_bytes)
                    if batch == 1:
                        call = pool.decode(batch, context, calls, tiling, rounded=True)
                        yield Case(f"rounded {label}", call, calls, num_bytes)
        for tokens, first in ((4096, 0), (4096, 28672), (512, 0)):
            table = pool.tables(1, first + tokens, 1)[0]
            positions = torch.arange(first, first + tokens, device=CUDA, dtype=torch.int32)
            slots = torch.zeros(tokens, device=CUDA, dtype=torch.int32)
            qkv = torch.randn(tokens, WIDTH, device=CUDA, dtype=torch.bfloat16)
            q = torch.randn(tokens, HEADS, DIM, device=CUDA, dtype=torch.bfloat16)
            flops = 4 * HEADS * DIM * tokens * (first + tokens // 2)
            for blocks in (None, *(BLOCKS if tune and first == 0 else ())):

                def prefill(
                    i: int, q=q, qkv=qkv, table=table, slots=slots, positions=positions, blocks=blocks, pool=pool
                ) -> object:
                    return prefill_attention(
                        q, pool.k, pool.v, table, slots, positions, DIM**-0.5, 0, 0.0, *pool.scales,
                        qkv[:, -HEADS * DIM :], blocks=blocks,
                    )  # fmt: skip

                yield Case(f"prefill {name} tokens {tokens} @{first} {blocks or ''}", prefill, 4, 0, flops)

            def append(i: int, qkv=qkv, table=table, slots=slots, positions=positions, pool=pool) -> object:
                return rope_append(
                    qkv, pool.inv_freq, 1.0, positions, slots, table, pool.k, pool.v, pool.norm, pool.norm, 1e-6,
                    HEADS, KV_HEADS, *pool.scales, True,
                )  # fmt: skip

            if first == 0:
                yield Case(f"rope_append {name} tokens {tokens}", append, 8, 0)


if __name__ == "__main__":
    run(__doc__, cases)
