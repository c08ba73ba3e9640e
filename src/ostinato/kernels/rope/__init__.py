"""Rotary embedding of queries and keys, and the append of keys and values to a paged cache."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.registry import register
from ostinato.kernels.rope.ref import FP8, rope_append_ref

__all__ = ["check_cache", "check_rope", "rope_append"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rope_append(
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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Turn q and k by their position, write k and v into the cache, and return q.

    qkv: [M, (Hq + 2 Hkv) * D] floats, the heads of q, then of k, then of v. inv_freq: float32 [R/2] in radians per
    position; the first R ≤ D of a head turn, x1 = x[:R/2] against x2 = x[R/2:R] (the convention of Hugging Face).
    rope_scale multiplies cosine and sine. positions, slots: int32 [M]. page_table: int32 [S, P]. k_cache, v_cache:
    [num_pages, Hkv, page_size, D] floats, or float8_e4m3fn with k_scale, v_scale: float32 [num_pages, Hkv, page_size],
    written with them: the largest magnitude of a vector over 448, by which what is stored of it is multiplied.
    q_norm, k_norm: float32 [D], an RMS norm of each head before it turns.
    Token m goes to page ``page_table[slots[m], positions[m] // page_size]``, place ``positions[m] % page_size``.
    gated: qkv has a gate for each head of q after v, [M, (2 Hq + 2 Hkv) * D]; it is skipped here.
    Returns q [M, Hq, D] in qkv's dtype. Two rows of one call must not go to one place. Positions up to 1,048,576.
    Raises KernelError.
    """
    check_rope("rope_append", qkv, inv_freq, positions, slots, q_norm, k_norm, k_cache, num_heads, num_kv_heads, gated)
    check_cache("rope_append", qkv.device, page_table, k_cache, v_cache, k_scale, v_scale)
    values = (
        qkv, inv_freq, rope_scale, positions, slots, page_table, k_cache, v_cache, q_norm, k_norm, eps,
        num_heads, num_kv_heads, k_scale, v_scale, gated,
    )  # fmt: skip
    if qkv.device.type == "cpu":
        return rope_append_ref(*values)
    result: torch.Tensor = _rope_append(*values)
    return result


def check_rope(
    op: str,
    qkv: torch.Tensor,
    inv_freq: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    k_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    gated: bool,
) -> None:
    """Raise KernelError unless these can be the arguments of ``rope_append`` and its fusions."""
    dim = k_cache.shape[-1]
    width = (num_heads * (2 if gated else 1) + 2 * num_kv_heads) * dim
    if qkv.dim() != 2 or qkv.shape[1] != width or qkv.dtype not in FLOATS:
        raise KernelError(
            f"{op} takes qkv [M, {width}] ({num_heads} + 2 * {num_kv_heads} heads of {dim}"
            f"{f' and {num_heads} gates' if gated else ''}) of floats, got {tuple(qkv.shape)} {qkv.dtype}"
        )
    if not qkv.is_contiguous():
        raise KernelError(f"{op} takes a contiguous qkv, got strides {qkv.stride()}; call .contiguous() first")
    if inv_freq.dim() != 1 or inv_freq.dtype != torch.float32 or 2 * inv_freq.shape[0] > dim:
        raise KernelError(
            f"{op} takes inv_freq float32 [R/2] with R ≤ {dim}, got {tuple(inv_freq.shape)} {inv_freq.dtype}"
        )
    for name, index in (("positions", positions), ("slots", slots)):
        if index.shape != qkv.shape[:1] or index.dtype != torch.int32 or index.device != qkv.device:
            raise KernelError(
                f"{op} takes {name} int32 [{qkv.shape[0]}] on {qkv.device}, got {tuple(index.shape)} {index.dtype}"
                f" on {index.device}"
            )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and (weight.shape != (dim,) or weight.dtype != torch.float32):
            raise KernelError(f"{op} takes {name} float32 [{dim}], got {tuple(weight.shape)} {weight.dtype}")


def check_cache(
    op: str,
    device: torch.device,
    page_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Raise KernelError unless page table, caches and their scales fit each other and the device."""
    if page_table.dim() != 2 or page_table.dtype != torch.int32 or not page_table.is_contiguous():
        raise KernelError(
            f"{op} takes a contiguous page_table int32 [slots, pages], got {tuple(page_table.shape)} {page_table.dtype}"
        )
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        raise KernelError(
            f"{op} takes k_cache and v_cache [pages, heads, page size, D] of one shape and dtype, got"
            f" {tuple(k_cache.shape)} {k_cache.dtype} and {tuple(v_cache.shape)} {v_cache.dtype}"
        )
    if k_cache.dtype not in (*FLOATS, FP8) or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise KernelError(f"{op} takes contiguous caches of floats, got {k_cache.dtype} strides {k_cache.stride()}")
    if k_cache.dtype == FP8 and k_cache.shape[3] % 2:
        raise KernelError(f"{op} takes heads of an even size with caches of {FP8}, got {k_cache.shape[3]}")
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (k_cache.dtype == FP8) != (scales is not None):
            raise KernelError(
                f"{op} takes {name} with caches of {FP8} and only with them, got caches of {k_cache.dtype}"
                f" {'without' if scales is None else 'with'} it"
            )
        if scales is not None and not (
            scales.shape == k_cache.shape[:3]
            and scales.dtype == torch.float32
            and scales.is_contiguous()
            and scales.device == k_cache.device
        ):
            raise KernelError(
                f"{op} takes {name} contiguous float32 {list(k_cache.shape[:3])} on {k_cache.device}, got"
                f" {tuple(scales.shape)} {scales.dtype} on {scales.device}"
            )
    if not page_table.device == k_cache.device == v_cache.device == device:
        raise KernelError(
            f"{op}: activations are on {device}, page_table on {page_table.device}, caches on {k_cache.device} and"
            f" {v_cache.device}; put them on one device"
        )


_rope_append = register(
    "rope_append(Tensor qkv, Tensor inv_freq, float rope_scale, Tensor positions, Tensor slots, Tensor page_table,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? q_norm, Tensor? k_norm, float eps, int num_heads,"
    " int num_kv_heads, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, bool gated=False) -> Tensor",
    reference=rope_append_ref,
    kernel="ostinato.kernels.rope.triton:rope_append",
    fake=lambda qkv, *rest: qkv.new_empty((qkv.shape[0], rest[10], rest[5].shape[3])),
)
