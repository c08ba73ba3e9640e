"""The sampler: penalties, filters, Gumbel-max and the step's bookkeeping, all of it on the device."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.registry import register
from ostinato.kernels.sample.buffers import SampleBuffers
from ostinato.kernels.sample.ref import sample_step_ref

__all__ = ["SampleBuffers", "sample_step"]


def sample_step(logits: torch.Tensor, buffers: SampleBuffers, rows: torch.Tensor | None = None) -> None:
    """Draw the next token of each active row and advance the row; results are in ``buffers``, see there.

    logits: float32 [B, V], contiguous, left as they are. Row b belongs to slot rows[b] (int32 [B], no slot twice), or
    to slot b where rows is None. For an active slot: token = argmax(value / T + Gumbel noise) among what top-k, top-p
    and min-p keep, or the exact argmax (lowest index first) at T < 1e-5; the token becomes the slot's next input, its
    position, counter, counts and remaining tokens move on, and it stops at a stop id or at its last token. The noise is
    a function of seed, counter and token: a seed gives the same tokens alone and in a batch, on CPU and GPU.
    Everything is then published to the ring. Raises KernelError.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise KernelError(
            f"sample_step takes contiguous float32 logits [B, V], got {tuple(logits.shape)} {logits.dtype}"
        )
    if logits.shape[1] != buffers.vocab or logits.shape[0] > buffers.max_batch:
        raise KernelError(
            f"sample_step: logits {tuple(logits.shape)} do not fit buffers of {buffers.max_batch} slots and"
            f" {buffers.vocab} tokens"
        )
    if logits.device != buffers.seed.device:
        raise KernelError(f"sample_step: logits are on {logits.device} and the buffers on {buffers.seed.device}")
    if rows is not None and (
        rows.shape != logits.shape[:1] or rows.dtype != torch.int32 or rows.device != logits.device
    ):
        raise KernelError(f"sample_step takes rows int32 [{logits.shape[0]}], got {tuple(rows.shape)} {rows.dtype}")
    if logits.device.type == "cpu":
        sample_step_ref(logits, rows, *buffers.tensors())
    else:
        _sample_step(logits, rows, *buffers.tensors())


_sample_step = register(
    "sample_step(Tensor logits, Tensor? rows, Tensor floats, Tensor ints, Tensor seed, Tensor stop_ids,"
    " Tensor logit_bias, Tensor(a!) counter, Tensor(b!) token_counts, Tensor(c!) tokens, Tensor(d!) positions,"
    " Tensor(e!) remaining, Tensor(f!) active, Tensor(g!) step, Tensor(h!) sampled, Tensor(i!) logprob,"
    " Tensor(j!) ring, Tensor(k!) top_ring) -> ()",
    reference=sample_step_ref,
    kernel="ostinato.kernels.sample.triton:sample_step",
    fake=lambda *tensors: None,
)
