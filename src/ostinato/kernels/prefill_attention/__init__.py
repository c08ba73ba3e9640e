"""Prefill attention over a paged cache: a chunk of one slot's tokens, causal."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.prefill_attention.ref import prefill_attention_ref
from ostinato.kernels.registry import register
from ostinato.kernels.rope import check_cache

__all__ = ["prefill_attention"]


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row t attends to positions max(0, p + t - window + 1) … p + t of slot slots[0], p = positions[0].

    q: [T, Hq, D] floats, contiguous, the rows of one slot at consecutive positions; their keys and values are in the
    cache already. k_cache, v_cache: [num_pages, Hkv, page_size, D]. page_table: int32 [S, P]. slots, positions: int32
    [T]; only their first elements are read, on the device. window 0 means all; softcap as for ``decode_attention``.
    k_scale, v_scale: as for ``rope_append``, with caches of float8_e4m3fn. gate: [T, Hq * D] in q's dtype, adjacent
    elements in a row (such as the last columns of a gated qkv); the result is multiplied by its sigmoid.
    Returns [T, Hq * D] in q's dtype. Raises KernelError.
    """
    op = "prefill_attention"
    check_cache(op, q.device, page_table, k_cache, v_cache, k_scale, v_scale)
    if q.dim() != 3 or not q.is_floating_point() or not q.is_contiguous() or q.shape[2] != k_cache.shape[3]:
        raise KernelError(
            f"{op} takes contiguous floats q [tokens, heads, {k_cache.shape[3]}], got {tuple(q.shape)} {q.dtype}"
        )
    if q.shape[0] == 0 or q.shape[1] % k_cache.shape[1] or window < 0:
        raise KernelError(
            f"{op}: {q.shape[0]} tokens, {q.shape[1]} heads, {k_cache.shape[1]} kv heads, window {window}"
        )
    for name, index in (("slots", slots), ("positions", positions)):
        if index.shape != q.shape[:1] or index.dtype != torch.int32 or index.device != q.device:
            raise KernelError(
                f"{op} takes {name} int32 [{q.shape[0]}] on {q.device}, got {tuple(index.shape)} {index.dtype}"
                f" on {index.device}"
            )
    if gate is not None and (
        gate.shape != (q.shape[0], q.shape[1] * q.shape[2])
        or gate.dtype != q.dtype
        or gate.device != q.device
        or gate.stride(1) != 1
    ):
        raise KernelError(
            f"{op} takes a gate {q.dtype} [{q.shape[0]}, {q.shape[1] * q.shape[2]}] on {q.device} with adjacent"
            f" columns, got {tuple(gate.shape)} {gate.dtype} on {gate.device} with strides {gate.stride()}"
        )
    values = (q, k_cache, v_cache, page_table, slots, positions, scale, window, softcap, k_scale, v_scale, gate)
    if q.device.type == "cpu":
        return prefill_attention_ref(*values)
    result: torch.Tensor = _prefill_attention(*values)
    return result


_prefill_attention = register(
    "prefill_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor slots, Tensor positions,"
    " float scale, int window, float softcap, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? gate=None)"
    " -> Tensor",
    reference=prefill_attention_ref,
    kernel="ostinato.kernels.prefill_attention.triton:prefill_attention",
    fake=lambda q, *rest: q.new_empty((q.shape[0], q.shape[1] * q.shape[2])),
)
