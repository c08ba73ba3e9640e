"""Launching the sampler: statistics of chunks of the vocabulary, candidates of filtered rows, and the choice.

1. ``chunks``: per row and chunk the best noisy value, the largest value and the sums of exponentials.
2. ``filters``: for rows with top-k, top-p or min-p, the tokens that can pass, by bounds from the chunks.
3. ``finish``: per row the choice among chunks or candidates, and the step's bookkeeping.

``noisy_values`` holds what all three share.
"""

from __future__ import annotations

import torch
import triton

from ostinato.kernels.launch import launch_options
from ostinato.kernels.sample.buffers import SampleBuffers
from ostinato.kernels.sample.chunks.triton import _chunk_kernel
from ostinato.kernels.sample.filters.triton import _collect_kernel
from ostinato.kernels.sample.finish.triton import _finish_kernel

CAPACITY = 4096  # candidates of a row; a row with more is searched in full
SMALL = 512  # candidates that a short search takes
_STATS = 6  # best noisy value, largest value, its sum; largest logit, its sum; logit of the best


def sample_step(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    *tensors: torch.Tensor,
    chunk: int | None = None,
    capacity: int = CAPACITY,
    small: int = SMALL,
) -> None:
    """Launch the three kernels; arguments as for ``ostinato.kernels.sample.sample_step``, tensors those of buffers."""
    s = SampleBuffers(*tensors)
    batch, vocab = logits.shape
    if chunk is None:
        chunk = 512 if vocab <= 65536 and batch < 8 else 1024
    chunks = triton.cdiv(vocab, chunk)
    padded = triton.next_power_of_2(chunks)
    parts_per_chunk = 16  # whose largest values give the bound of a k larger than the number of chunks
    while parts_per_chunk * chunks < 1024 and parts_per_chunk < chunk // 16:
        parts_per_chunk *= 2

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    best = scratch(batch, chunks)
    stats = scratch(batch, chunks, _STATS, dtype=torch.float32)
    parts = scratch(batch, chunks * parts_per_chunk, dtype=torch.float32)
    found = scratch(batch)
    candidates = scratch(batch, capacity)
    candidate_values = scratch(batch, capacity, dtype=torch.float32)
    by_row = {"ROWS": rows is not None, "CHUNK": chunk, **launch_options(logits.device)}
    rows = s.tokens if rows is None else rows  # not read where ROWS is off
    _chunk_kernel[(chunks, batch)](
        logits, rows, s.floats, s.ints, s.seed, s.logit_bias, s.token_counts, s.counter, s.active,
        best, stats, parts, found, vocab, chunks, PARTS=parts_per_chunk, num_warps=4, **by_row,
    )  # fmt: skip
    _collect_kernel[(chunks, batch)](
        logits, rows, s.floats, s.ints, s.logit_bias, s.token_counts, s.active, stats, parts, found, candidates,
        candidate_values, vocab, chunks, PARTS=parts_per_chunk, NCP=padded, CAPACITY=capacity, num_warps=4, **by_row,
    )  # fmt: skip
    _finish_kernel[(batch,)](
        logits, rows, s.floats, s.ints, s.seed, s.stop_ids, s.logit_bias, s.counter, s.token_counts, s.tokens,
        s.positions, s.remaining, s.active, s.step, s.sampled, s.logprob, s.ring, s.top_ring,
        best, stats, found, candidates, candidate_values, vocab, chunks, s.max_batch, RING=s.ring.shape[0], NCP=padded,
        SMALL=small, CAPACITY=capacity, SEARCH=2048, num_warps=8, **by_row,
    )  # fmt: skip
