"""Attention of one query per slot over a paged cache in plain PyTorch; on a CPU this is the product's own path."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ostinato.kernels.rms_norm.ref import quantize_rows_ref
from ostinato.kernels.rope.ref import rope_append_ref


def cached_span(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    start: int,
    stop: int,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at positions start … stop - 1 of the owner of ``pages`` [P], [1, Hkv, stop - start, D] each.

    Views where one page holds them all, as when a slot has a single page; else copies. Float32 of a scaled cache.
    """
    page_size = k_cache.shape[2]
    first, last = start // page_size, (stop - 1) // page_size
    begin, end = start - first * page_size, stop - first * page_size

    def span(cache: torch.Tensor) -> torch.Tensor:
        """[pages, Hkv, page_size, …] → [1, Hkv, stop - start, …]."""
        if first == last:
            page = int(pages[first])
            return cache[page : page + 1, :, begin:end]
        return cache[pages[first : last + 1].long()].transpose(0, 1).flatten(1, 2)[None, :, begin:end]

    k, v = span(k_cache), span(v_cache)
    if k_scale is None or v_scale is None:
        return k, v
    return k.float() * span(k_scale)[..., None], v.float() * span(v_scale)[..., None]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(softcap * tanh(q kᵀ scale / softcap)) v; q [1, Hkv, N, D], k and v [1, Hkv, L, D], mask bool [N, L].

    softcap 0 means none. Mixed dtypes are computed in float32. Returns q's shape and dtype.
    """
    dtype = q.dtype
    if k.dtype != dtype:
        q, k, v = q.float(), k.float(), v.float()
    if softcap == 0.0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).to(dtype)
    scores = torch.tanh(torch.matmul(q.float(), k.float().transpose(-1, -2)) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, -1), v.float()).to(dtype)


def gate_ref(out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """out * sigmoid(gate) in float32; both [M, N]. Returns out's dtype."""
    return (out.float() * torch.sigmoid(gate.float())).to(out.dtype)


def decode_attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row b attends to positions max(0, p - window + 1) … p of its slot, p = positions[b]; returns [B, Hq * D]."""
    batch, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    grouped = q.view(batch, 1, kv_heads, heads // kv_heads, dim)
    rows = []
    for b, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        start = max(0, position - window + 1) if window else 0
        k, v = cached_span(k_cache, v_cache, page_table[slot], start, position + 1, k_scale, v_scale)
        rows.append(attend(grouped[b], k, v, scale, softcap, None).reshape(1, heads * dim))
    return rows[0] if batch == 1 else torch.cat(rows)


def fused_decode_attention_ref(
    qkv: torch.Tensor,
    inv_freq: torch.Tensor,
    rope_scale: float,
    positions: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    gated: bool = False,
    rounded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rope_append_ref, then decode_attention_ref; where there is a gate, times its sigmoid. The scale is empty.

    rounded: quantize_rows_ref of the same with float32 after the append; rows without a position are zeros.
    """

    def attended(qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        q = rope_append_ref(
            qkv, inv_freq, rope_scale, positions, slots, page_table, k_cache, v_cache, q_norm, k_norm, eps,
            num_heads, num_kv_heads, k_scale, v_scale, gated,
        )  # fmt: skip
        out = decode_attention_ref(
            q.float() if rounded else q, k_cache, v_cache, page_table, slots, positions, scale, window, softcap,
            k_scale, v_scale,
        )  # fmt: skip
        return gate_ref(out, qkv[:, -out.shape[1] :]) if gated else out

    if not rounded:
        return attended(qkv, positions, slots), qkv.new_empty(0, dtype=torch.float32)
    out = qkv.new_zeros((qkv.shape[0], num_heads * k_cache.shape[3]), dtype=torch.float32)
    there = (positions >= 0).nonzero()[:, 0]
    if len(there):
        out[there] = attended(qkv[there], positions[there], slots[there])
    return quantize_rows_ref(out)
