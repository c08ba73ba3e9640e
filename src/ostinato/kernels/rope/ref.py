"""Rotary embedding, per-head norms and the append to a paged cache in plain PyTorch."""

from __future__ import annotations

import weakref

import torch

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., D] as float8_e4m3fn [..., D] and a float32 scale [...] a vector, the largest magnitude over 448."""
    scale = x.abs().amax(-1) * (1.0 / FP8_LARGEST)
    divisor = torch.where(scale > 0.0, scale, torch.ones_like(scale))
    return (x / divisor[..., None]).to(FP8), scale


class _Tables:
    """Cosines and signed sines of one ``inv_freq``, for positions 0 … n - 1; n grows by doubling."""

    def __init__(self, inv_freq: torch.Tensor, rope_scale: float) -> None:
        self.owner = weakref.ref(inv_freq)
        self.rope_scale = rope_scale
        self.cos = self.sin = torch.empty(0, 2 * inv_freq.numel(), device=inv_freq.device)

    def grow(self, inv_freq: torch.Tensor, num_positions: int) -> None:
        size = max(256, 1 << (num_positions - 1).bit_length())
        angle = torch.arange(size, dtype=torch.float32, device=inv_freq.device)[:, None] * inv_freq
        cos, sin = angle.cos() * self.rope_scale, angle.sin() * self.rope_scale
        self.cos, self.sin = torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)


_TABLES: dict[tuple[int, float], _Tables] = {}


def _rope_tables(inv_freq: torch.Tensor, rope_scale: float, num_positions: int) -> _Tables:
    key = (id(inv_freq), rope_scale)
    tables = _TABLES.get(key)
    if tables is None or tables.owner() is not inv_freq:
        for stale in [k for k, t in _TABLES.items() if t.owner() is None]:
            del _TABLES[stale]
        tables = _TABLES[key] = _Tables(inv_freq, rope_scale)
    if tables.cos.shape[0] < num_positions:
        tables.grow(inv_freq, num_positions)
    return tables


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [M, H, D] float32; cos, sin [M, 1, R]: the first R of each head turn, half against half, the rest stays."""
    rotary = cos.shape[-1]
    turned = x if rotary == x.shape[-1] else x[..., :rotary]
    swapped = turned.reshape(*turned.shape[:-1], 2, rotary // 2).flip(-2).flatten(-2)  # (x2, x1)
    turned = torch.addcmul(turned * cos, swapped, sin)
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), -1)


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rope_append_ref(
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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Norm and turn q and k in float32, write k and v of each row into the cache, return q [M, Hq, D].

    The tables of cosines are kept for as long as ``inv_freq`` lives, since on a CPU this runs once a layer and token.
    """
    m, page_size, dim = qkv.shape[0], k_cache.shape[2], k_cache.shape[3]
    num_turned = num_heads + num_kv_heads
    heads = qkv.view(m, num_turned + num_kv_heads + num_heads * gated, dim)
    qk, values = heads[:, :num_turned].float(), heads[:, num_turned : num_turned + num_kv_heads]
    if q_norm is not None or k_norm is not None:
        qk = torch.cat((_norm(qk[:, :num_heads], q_norm, eps), _norm(qk[:, num_heads:], k_norm, eps)), 1)
    if m == 1:
        position = int(positions)
        tables = _rope_tables(inv_freq, rope_scale, position + 1)
        turned = _rotate(qk, tables.cos[position], tables.sin[position])
        page, offset = int(page_table[int(slots), position // page_size]), position % page_size
        k, v = k_cache[page].select(1, offset), v_cache[page].select(1, offset)
        if k_scale is None or v_scale is None:
            k.copy_(turned[0, num_heads:])
            v.copy_(values[0])
        else:
            for stored, scales, new in ((k, k_scale, turned[0, num_heads:]), (v, v_scale, values[0].float())):
                rounded, scales[page, :, offset] = quantize_fp8(new)
                stored.copy_(rounded)
    else:
        tables = _rope_tables(inv_freq, rope_scale, int(positions.max()) + 1)
        turned = _rotate(qk, tables.cos[positions, None], tables.sin[positions, None])
        pages, offsets = page_table[slots, positions // page_size], positions % page_size
        if k_scale is None or v_scale is None:
            k_cache[pages, :, offsets] = turned[:, num_heads:].to(k_cache.dtype)
            v_cache[pages, :, offsets] = values.to(v_cache.dtype)
        else:
            k_cache[pages, :, offsets], k_scale[pages, :, offsets] = quantize_fp8(turned[:, num_heads:])
            v_cache[pages, :, offsets], v_scale[pages, :, offsets] = quantize_fp8(values.float())
    return turned[:, :num_heads].to(qkv.dtype).contiguous()
