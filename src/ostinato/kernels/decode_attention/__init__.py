"""Decode attention over a paged cache: one query per slot, split over positions.

The kernels read each row's length on the device and stop there, so one captured graph serves every length.
"""

from __future__ import annotations

from typing import Any

import torch

from ostinato.errors import KernelError
from ostinato.kernels.decode_attention.ref import decode_attention_ref, fused_decode_attention_ref
from ostinato.kernels.registry import register
from ostinato.kernels.rms_norm.ref import GROUP
from ostinato.kernels.rope import check_cache, check_rope

__all__ = ["decode_attention", "fused_decode_attention"]


def decode_attention(
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
    prefetch: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row b attends to positions max(0, p - window + 1) … p of slot slots[b], p = positions[b]; all are in the cache.

    q: [B, Hq, D] floats, contiguous. k_cache, v_cache: [num_pages, Hkv, page_size, D]. page_table: int32 [S, P].
    slots, positions: int32 [B]. window 0 means all. softcap c > 0 turns a score s into c * tanh(s / c).
    prefetch: as for ``fused_decode_attention``. k_scale, v_scale: as for ``rope_append``, with caches of
    float8_e4m3fn. Returns [B, Hq * D] in q's dtype. Raises KernelError.
    """
    check_cache("decode_attention", q.device, page_table, k_cache, v_cache, k_scale, v_scale)
    _check_rows("decode_attention", q, k_cache, slots, positions, window)
    if q.device.type == "cpu":
        return decode_attention_ref(
            q, k_cache, v_cache, page_table, slots, positions, scale, window, softcap, k_scale, v_scale
        )
    result: torch.Tensor = _decode_attention(
        q, k_cache, v_cache, page_table, slots, positions, scale, window, softcap, prefetch, k_scale, v_scale
    )
    return result


def fused_decode_attention(
    qkv: torch.Tensor,
    inv_freq: torch.Tensor,
    rope_scale: float,
    positions: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    prefetch: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    gated: bool = False,
    rounded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rope_append`` and ``decode_attention`` of one token per slot in one kernel; returns [B, Hq * D] and its scale.

    Arguments as for these two; no two rows may share a slot. A second, small kernel joins what several programs found.
    prefetch: a promise that, since the last full dependency of the stream (the start of a graph's replay), no kernel
    has written ``positions``, ``slots``, ``page_table`` or the cache at earlier positions of these slots; the kernel
    then reads them while the one before it still runs. True of a captured step that advances positions at its end.
    gated: qkv holds after q, k and v a gate for each head of q, [B, (2 Hq + 2 Hkv) * D]; the result is multiplied by
    the gate's sigmoid.
    rounded: the float32 result as ``int8_linear`` takes it, int8 with a scale float32 [B, Hq * D / 32] (32 divides D).
    A row whose position is negative is then left out: nothing is appended for it, and its results are zeros. Else the
    result has qkv's dtype, and the scale is empty. Raises KernelError.
    """
    op = "fused_decode_attention"
    check_rope(op, qkv, inv_freq, positions, slots, q_norm, k_norm, k_cache, num_heads, num_kv_heads, gated)
    check_cache(op, qkv.device, page_table, k_cache, v_cache, k_scale, v_scale)
    if num_heads % num_kv_heads or k_cache.shape[1] != num_kv_heads or window < 0:
        raise KernelError(
            f"{op}: {num_heads} query heads, {num_kv_heads} kv heads, a cache of {k_cache.shape[1]} and a window of"
            f" {window} do not fit each other"
        )
    if rounded and k_cache.shape[3] % GROUP:
        raise KernelError(f"{op} rounds groups of {GROUP} columns, which do not divide heads of {k_cache.shape[3]}")
    values = (
        qkv, inv_freq, rope_scale, positions, slots, page_table, k_cache, v_cache, q_norm, k_norm, eps,
        num_heads, num_kv_heads, scale, window, softcap,
    )  # fmt: skip
    if qkv.device.type == "cpu":
        return fused_decode_attention_ref(*values, k_scale, v_scale, gated, rounded)
    result: tuple[torch.Tensor, torch.Tensor] = _fused_decode_attention(
        *values, prefetch, k_scale, v_scale, gated, rounded
    )
    return result


def _check_rows(
    op: str, q: torch.Tensor, k_cache: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, window: int
) -> None:
    if q.dim() != 3 or not q.is_floating_point() or not q.is_contiguous() or q.shape[2] != k_cache.shape[3]:
        raise KernelError(
            f"{op} takes contiguous floats q [rows, heads, {k_cache.shape[3]}], got {tuple(q.shape)} {q.dtype}"
        )
    if q.shape[1] % k_cache.shape[1] or window < 0:
        raise KernelError(f"{op}: {q.shape[1]} query heads and {k_cache.shape[1]} kv heads, window {window}")
    for name, index in (("slots", slots), ("positions", positions)):
        if index.shape != q.shape[:1] or index.dtype != torch.int32 or index.device != q.device:
            raise KernelError(
                f"{op} takes {name} int32 [{q.shape[0]}] on {q.device}, got {tuple(index.shape)} {index.dtype}"
                f" on {index.device}"
            )


def _decode_cpu(*values: Any) -> torch.Tensor:
    return decode_attention_ref(*values[:9], *values[10:])  # without prefetch, which is about kernels


def _fused_cpu(*values: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return fused_decode_attention_ref(*values[:16], *values[17:])


def _fused_fake(qkv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width, rounded = qkv.shape[0], rest[10] * rest[5].shape[3], rest[19]
    out = qkv.new_empty((rows, width), dtype=torch.int8 if rounded else qkv.dtype)
    return out, qkv.new_empty((rows, width // GROUP) if rounded else (0,), dtype=torch.float32)


_decode_attention = register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor slots, Tensor positions,"
    " float scale, int window, float softcap, bool prefetch, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    reference=_decode_cpu,
    kernel="ostinato.kernels.decode_attention.triton:decode_attention",
    fake=lambda q, *rest: q.new_empty((q.shape[0], q.shape[1] * q.shape[2])),
)
_fused_decode_attention = register(
    "fused_decode_attention(Tensor qkv, Tensor inv_freq, float rope_scale, Tensor positions, Tensor slots,"
    " Tensor page_table, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? q_norm, Tensor? k_norm, float eps,"
    " int num_heads, int num_kv_heads, float scale, int window, float softcap, bool prefetch,"
    " Tensor(c!)? k_scale, Tensor(d!)? v_scale, bool gated, bool rounded) -> (Tensor, Tensor)",
    reference=_fused_cpu,
    kernel="ostinato.kernels.decode_attention.triton:fused_decode_attention",
    fake=_fused_fake,
)
