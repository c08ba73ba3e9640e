"""Causal attention of a chunk of one slot's tokens over its paged cache in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ostinato.kernels.decode_attention.ref import attend, cached_span, gate_ref


def prefill_attention_ref(
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
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row t, at position p + t with p = positions[0], attends to the positions of its slot up to its own."""
    out = _attended(q, k_cache, v_cache, page_table, slots, positions, scale, window, softcap, k_scale, v_scale)
    return out if gate is None else gate_ref(out, gate)


def _attended(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    num_tokens, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    first, slot = int(positions[0]), int(slots[0])
    start = max(0, first - window + 1) if window else 0
    stop = first + num_tokens
    k, v = cached_span(k_cache, v_cache, page_table[slot], start, stop, k_scale, v_scale)
    if first == 0 and softcap == 0.0 and (window == 0 or window >= num_tokens) and k.dtype == q.dtype:
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
        return out[0].transpose(0, 1).reshape(num_tokens, heads * dim)
    distance = torch.arange(first, stop, device=q.device)[:, None] - torch.arange(start, stop, device=q.device)
    mask = distance >= 0
    if window:
        mask &= distance < window
    group = heads // kv_heads  # the queries of one kv head stand under each other: [Hkv, G * T, D]
    stacked = q.view(num_tokens, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * num_tokens, dim)
    out = attend(stacked[None], k, v, scale, softcap, mask.repeat(group, 1))
    return out.view(kv_heads, group, num_tokens, dim).permute(2, 0, 1, 3).reshape(num_tokens, heads * dim)
