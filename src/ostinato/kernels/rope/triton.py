"""Rotary embedding and append to the cache: one program turns a few heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.launch import launch_options
from ostinato.kernels.rope.ref import FP8
from ostinato.kernels.triton import INTERPRETED, trigger, wait


@triton.jit
def cos_sin(position, frequency, rope_scale):
    """Cosine and sine of position * frequency, times rope_scale; float32, to about one unit in the last place.

    The angle is rounded to float32 as in the reference; its quarter turns are taken off in float64, which is exact
    enough for any position and needs no branch; then the polynomials of Cephes' sinf and cosf on [-pi/4, pi/4].
    """
    angle = (position.to(tl.float32) * frequency).to(tl.float64)
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = (angle - quarters * 1.5707963267948966).to(tl.float32)
    quadrant = quarters.to(tl.int32)
    r2 = r * r
    sine = r + r * r2 * (-1.6666654611e-1 + r2 * (8.3321608736e-3 + r2 * -1.9515295891e-4))
    tail = 4.166664568298827e-2 + r2 * (-1.388731625493765e-3 + r2 * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * r2 + r2 * r2 * tail
    odd = (quadrant & 1) != 0
    s = tl.where(odd, cosine, sine)
    c = tl.where(odd, sine, cosine)
    s = tl.where((quadrant & 2) != 0, -s, s)
    c = tl.where(((quadrant + 1) & 2) != 0, -c, c)
    return c * rope_scale, s * rope_scale


@triton.jit
def rotation(position, inv_freq, rope_scale, d, R: tl.constexpr):
    """For elements ``d`` of a head: the element each is turned against, and the factors of both."""
    half: tl.constexpr = R // 2
    turns = d < R
    frequency = tl.load(inv_freq + tl.where(d < half, d, d - half), mask=turns, other=0.0)
    cosine, sine = cos_sin(position, frequency, rope_scale)
    partner = tl.where(turns, tl.where(d < half, d + half, d - half), d)
    cosine = tl.where(turns, cosine, 1.0)
    sine = tl.where(turns, tl.where(d < half, -sine, sine), 0.0)
    return partner, cosine, sine


@triton.jit
def quantize_fp8(x):
    """float32 [N, L] as the bytes of float8_e4m3fn, uint8 [N, L], and a float32 scale [N]: see rope.ref.quantize_fp8.

    In integers, so that the interpreter, whose own conversion does not round to even, does what a GPU does.
    """
    scale = tl.max(tl.abs(x), 1) * (1.0 / 448.0)
    x = tl.div_rn(x, tl.broadcast_to(tl.where(scale > 0.0, scale, 1.0)[:, None], x.shape))
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) & 255, 121)  # below 2^-6 the format has subnormals, of equal distance
    steps = tl.abs(x) * ((257 - exponent) << 23).to(tl.float32, bitcast=True)  # 8 to 16 of them; below 2^-6 fewer
    steps = (steps + 12582912.0).to(tl.int32, bitcast=True) & 31  # 1.5 * 2^23 rounds to the nearest even
    return ((((exponent - 121) << 3) + steps) | ((bits >> 24) & 128)).to(tl.uint8), scale


@triton.jit
def from_fp8(code, KIND: tl.constexpr):
    """Bytes of float8_e4m3fn as values of KIND, float16 or float32."""
    if INTERPRETED:
        half = ((code.to(tl.int16) & 128) << 8) | ((code.to(tl.int16) & 127) << 7)  # 2^-8 of the value
        return (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(KIND)
    else:
        return code.to(tl.float8e4nv, bitcast=True).to(KIND)


@triton.jit
def from_fp8_pairs(pairs, KIND: tl.constexpr):
    """Two neighbouring bytes of float8_e4m3fn in an int16 as two tensors of KIND, float16 or float32."""
    if INTERPRETED or tl.float16 != KIND:
        return from_fp8((pairs & 255).to(tl.uint8), KIND), from_fp8(((pairs >> 8) & 255).to(tl.uint8), KIND)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.f16x2.e4m3x2 t, $2; mov.b32 {$0, $1}, t; }",
            "=h,=h,h", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip


def raw_cache(cache: torch.Tensor) -> torch.Tensor:
    """The cache as kernels take it: bytes in place of float8_e4m3fn."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def operand_kind(activation: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """What the matrix units multiply: the cache's dtype; for FP8, float16, which holds it exactly, or float32."""
    if cache == FP8:
        return tl.float32 if activation == torch.float32 else tl.float16
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[cache]


@triton.jit
def _rope_append_kernel(
    qkv,
    q_out,
    inv_freq,
    positions,
    slots,
    page_table,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    q_norm,
    k_norm,
    rope_scale,
    eps,
    pages_per_slot,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    FP8: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    trigger(PDL)
    m = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DP)[None, :]
    inside = (h < HQ + 2 * HKV) & (d < D)
    is_q = h < HQ
    is_k = (h >= HQ) & (h < HQ + HKV)
    wait(PDL)
    position = tl.load(positions + m)
    partner, cosine, sine = rotation(position, inv_freq, rope_scale, d, R)
    source = qkv + (m.to(tl.int64) * (HQ * (1 + GATED) + 2 * HKV) + h) * D
    raw = tl.load(source + d, mask=inside, other=0.0)
    x = raw.to(tl.float32)
    y = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    if Q_NORM or K_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    if Q_NORM:
        factor = tl.where(is_q, inverse, 1.0)
        x *= tl.where(is_q, tl.load(q_norm + d, mask=d < D, other=0.0) * factor, 1.0)
        y *= tl.where(is_q, tl.load(q_norm + partner, mask=d < D, other=0.0) * factor, 1.0)
    if K_NORM:
        factor = tl.where(is_k, inverse, 1.0)
        x *= tl.where(is_k, tl.load(k_norm + d, mask=d < D, other=0.0) * factor, 1.0)
        y *= tl.where(is_k, tl.load(k_norm + partner, mask=d < D, other=0.0) * factor, 1.0)
    turned = x * cosine + y * sine
    tl.store(q_out + (m.to(tl.int64) * HQ + h) * D + d, turned, mask=inside & is_q)
    page = tl.load(page_table + tl.load(slots + m) * pages_per_slot + position // PAGE).to(tl.int64)
    place = position % PAGE
    v_head = h - HQ - HKV
    k_row = (page * HKV + h - HQ) * PAGE + place
    v_row = (page * HKV + v_head) * PAGE + place
    is_v = (v_head >= 0) & inside
    if FP8:
        stored, scale = quantize_fp8(tl.where(is_k, turned, raw.to(tl.float32)))
        first = tl.arange(0, 1)[None, :]
        tl.store(k_scale + k_row + first, scale[:, None], mask=is_k)
        tl.store(v_scale + v_row + first, scale[:, None], mask=(v_head >= 0) & (v_head < HKV))
        tl.store(k_cache + k_row * D + d, stored, mask=inside & is_k)
        tl.store(v_cache + v_row * D + d, stored, mask=is_v)
    else:
        tl.store(k_cache + k_row * D + d, turned, mask=inside & is_k)
        tl.store(v_cache + v_row * D + d, raw, mask=is_v)


def rope_append(
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
    """Launch ``_rope_append_kernel``; arguments and result as for ``ostinato.kernels.rope.rope_append``."""
    m, page_size, dim = qkv.shape[0], k_cache.shape[2], k_cache.shape[3]
    q_out = torch.empty((m, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    heads = 8
    _rope_append_kernel[(m, triton.cdiv(num_heads + 2 * num_kv_heads, heads))](
        qkv,
        q_out,
        inv_freq,
        positions,
        slots,
        page_table,
        raw_cache(k_cache),
        raw_cache(v_cache),
        inv_freq if k_scale is None else k_scale,
        inv_freq if v_scale is None else v_scale,
        inv_freq if q_norm is None else q_norm,
        inv_freq if k_norm is None else k_norm,
        rope_scale,
        eps,
        page_table.shape[1],
        HQ=num_heads,
        HKV=num_kv_heads,
        D=dim,
        DP=triton.next_power_of_2(dim),
        R=2 * inv_freq.shape[0],
        PAGE=page_size,
        HEADS=heads,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        FP8=k_scale is not None,
        GATED=gated,
        num_warps=4 if dim <= 128 else 8,
        **launch_options(qkv.device),
    )
    return q_out
