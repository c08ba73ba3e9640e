"""Inputs of the ops that read and write a paged cache."""

import torch

from ostinato.kernels.rope.ref import FP8, quantize_fp8


def inputs(
    device: torch.device,
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary: int,
    dtype: torch.dtype = torch.float32,
    page_size: int = 8,
    max_position: int = 31,
    norms: bool = False,
    gated: bool = False,
) -> dict[str, object]:
    """Rows of different slots at random positions; pages are scattered, the caches poisoned with NaN."""
    pages = max_position // page_size + 1
    slots = torch.randperm(rows + 1)[:rows]
    weight = {name: torch.rand(dim, device=device) + 0.5 if norms else None for name in ("q_norm", "k_norm")}
    cache = torch.full(((rows + 1) * pages, kv_heads, page_size, dim), torch.nan, dtype=dtype, device=device)
    return {
        "qkv": torch.randn(rows, (heads * (1 + gated) + 2 * kv_heads) * dim, device=device).to(dtype),
        "inv_freq": (10000.0 ** -(torch.arange(0, rotary, 2) / rotary)).to(device),
        "rope_scale": 1.1,
        "positions": torch.randint(0, max_position + 1, (rows,), dtype=torch.int32, device=device),
        "slots": slots.to(device, torch.int32),
        "page_table": torch.randperm((rows + 1) * pages).view(rows + 1, pages).to(device, torch.int32),
        "k_cache": cache,
        "v_cache": cache.clone(),
        **weight,
        "eps": 1e-6,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
    }


def cached(
    device: torch.device,
    positions: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    page_size: int = 8,
    pages: int = 6,
) -> dict[str, torch.Tensor]:
    """Slots in random order over scattered pages; what lies beyond a slot's position is poisoned with NaN."""
    batch = len(positions)
    k = torch.randn(batch * pages, kv_heads, page_size, dim).to(dtype)
    v = torch.randn(batch * pages, kv_heads, page_size, dim).to(dtype)
    table = torch.randperm(batch * pages).view(batch, pages)
    slots = torch.randperm(batch)
    for slot, position in zip(slots.tolist(), positions, strict=True):
        for n in range(position + 1, pages * page_size):
            k[table[slot, n // page_size], :, n % page_size] = torch.nan
            v[table[slot, n // page_size], :, n % page_size] = torch.nan
    return {
        "q": torch.randn(batch, heads, dim).to(device, dtype),
        "k_cache": k.to(device),
        "v_cache": v.to(device),
        "page_table": table.to(device, torch.int32),
        "slots": slots.to(device, torch.int32),
        "positions": torch.tensor(positions, dtype=torch.int32, device=device),
    }


def fp8(given: dict[str, object], *, filled: bool = False) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """``given`` with caches in float8_e4m3fn, and their scales; NaN stays NaN. filled: with random vectors instead."""
    caches, scales = {}, {}
    for name in ("k", "v"):
        cache = given[f"{name}_cache"].float()
        if filled:
            cache = torch.randn_like(cache) * torch.rand_like(cache[..., :1])
        poisoned = cache.isnan().any(-1)
        stored, scale = quantize_fp8(cache.nan_to_num())
        stored.view(torch.uint8)[poisoned] = 0x7F  # NaN in this format
        scale[poisoned] = torch.nan
        caches[f"{name}_cache"], scales[f"{name}_scale"] = stored, scale
    assert caches["k_cache"].dtype == FP8
    return given | caches, scales
