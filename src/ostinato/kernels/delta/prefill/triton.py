"""The chunked form of the gated delta rule: five kernels over consecutive tokens of one slot.

Within a chunk of 64 tokens with decays exp(G_i - G_j) between them, the values that the delta rule writes are
u = T (v - exp(G) K S), T = (I + strictly lower(β K Kᵀ exp(G_i - G_j)))⁻¹ diag(β), for the state S before the chunk; the
results are exp(G) Q S + lower(Q Kᵀ exp(G_i - G_j)) u and the next state exp(G_last) S + (exp(G_last - G) K)ᵀ u.
T and the lower products depend on no state: one kernel makes them for all chunks at once, and only the rest walks from
chunk to chunk. Sources: "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv
2406.06484) and "Gated Delta Networks" (arXiv 2412.06464); there S meets T first, here K S does, which needs no stored
products of T with keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ostinato.kernels.delta.decode.triton import load_state, sum_pair
from ostinato.kernels.delta.inputs.triton import delta_conv_kernel, delta_gates_kernel, product
from ostinato.kernels.delta.ref import L2_EPS
from ostinato.kernels.delta.triton import silu
from ostinato.kernels.launch import launch_options
from ostinato.kernels.triton import trigger, wait

CHUNK = 64
GATE_COLUMNS = 64  # of the hidden size, in one step of the gates' products
SHORT = 32  # up to so many tokens go one after the other


@triton.jit
def _unit_lower_inverse(a, PRECISION: tl.constexpr):
    """(I + a)⁻¹ of a strictly lower [64, 64].

    Four blocks of 16 on the diagonal by substitution, one row of all four at a time; then with D their inverse and
    N = D (a off these blocks), whose fourth power is 0, (I + N)⁻¹ = (I - N) (I + N²). No higher powers: those of a
    itself grow beyond float32 where keys are alike.
    """
    block = tl.arange(0, 4)
    i = tl.arange(0, 16)
    same = (block[:, None] == block[None, :])[:, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(a, (4, 16, 4, 16)), 0.0), 2)
    x = tl.where((i[:, None] == i[None, :])[None, :, :], 1.0, tl.zeros((4, 16, 16), tl.float32))
    for row in tl.static_range(1, 16):
        is_row = (i == row)[None, :, None]
        factors = tl.sum(tl.where(is_row, diagonal, 0.0), 1)
        x -= tl.where(is_row, tl.sum(factors[:, :, None] * x, 1)[:, None, :], 0.0)
    d = tl.reshape(tl.where(same, x[:, :, None, :], tl.zeros((4, 16, 4, 16), tl.float32)), (64, 64))
    j = tl.arange(0, 64)
    n = product(d, tl.where((j[:, None] // 16) == (j[None, :] // 16), 0.0, a), PRECISION)
    square = product(n, n, PRECISION)
    identity = tl.where(j[:, None] == j[None, :], 1.0, 0.0)
    return product(identity - n + square - product(n, square, PRECISION), d, PRECISION)


@triton.jit
def _delta_chunk_kernel(
    mixed,
    betas,
    decays,
    transforms,
    scores,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILED: tl.constexpr,
    PRECISION: tl.constexpr,
    INVERSE_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """T and the decayed, lower products of queries and keys, [64, 64] each, of one chunk and value head."""
    trigger(PDL)
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    key_head = head % HK if TILED else head // (HV // HK)
    i = tl.arange(0, CHUNK)
    d = tl.arange(0, DKP)
    t = chunk * CHUNK + i
    at = t.to(tl.int64)[:, None] * C + key_head * DK + d[None, :]
    wait(PDL)
    q = tl.load(mixed + at, mask=(d < DK)[None, :], other=0.0)
    k = tl.load(mixed + HK * DK + at, mask=(d < DK)[None, :], other=0.0)
    beta = tl.load(betas + t * HV + head)
    total = tl.cumsum(tl.load(decays + t * HV + head), 0)
    lower = i[:, None] >= i[None, :]
    decay = tl.where(lower, tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0)), 0.0)
    products = product(k, tl.trans(k), PRECISION) * decay * beta[:, None]
    inverse = _unit_lower_inverse(tl.where(i[:, None] > i[None, :], products, 0.0), INVERSE_PRECISION)
    out = (chunk.to(tl.int64) * HV + head) * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    tl.store(transforms + out, (inverse * beta[None, :]).to(transforms.dtype.element_ty))
    tl.store(scores + out, (product(q, tl.trans(k), PRECISION) * decay).to(scores.dtype.element_ty))


@triton.jit
def _store_ring(
    qkvz, ring, position, num_tokens, head, part, in_k, in_v, q_at, v_at,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, C: tl.constexpr, Z: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """The inputs of the last W tokens into the ring; the first value head of a key head has its channels."""
    first = ((head // HK if TILED else head % (HV // HK)) == 0) & (part == 0)
    back = tl.arange(0, WP)
    t = num_tokens - 1 - back
    x = qkvz + t.to(tl.int64)[:, None] * Z
    now = ring + ((position + t + W) % W)[:, None] * C
    there = (back < W) & (t >= 0)
    with_v = there[:, None] & in_v[None, :]
    with_k = there[:, None] & (in_k & first)[None, :]
    k_at = HK * DK + q_at
    # All loads, then all stores: a load behind a store waits for the loads before that.
    v = tl.load(x + v_at[None, :], mask=with_v, other=0.0).to(tl.float32)
    q = tl.load(x + q_at[None, :], mask=with_k, other=0.0).to(tl.float32)
    k = tl.load(x + k_at[None, :], mask=with_k, other=0.0).to(tl.float32)
    tl.store(now + v_at[None, :], v, mask=with_v)
    tl.store(now + q_at[None, :], q, mask=with_k)
    tl.store(now + k_at[None, :], k, mask=with_k)


@triton.jit
def _load_token(
    mixed, betas, decays, t, head, q_at, v_at, in_k, in_v,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = mixed + t * C
    q = tl.load(row + q_at, mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(row + HK * DK + q_at, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(row + v_at, mask=in_v, other=0.0).to(tl.float32)
    return q, k, v, tl.load(betas + t * HV + head), tl.load(decays + t * HV + head)


@triton.jit
def _delta_scan_kernel(
    qkvz,
    mixed,
    betas,
    decays,
    transforms,
    scores,
    conv_state,
    state,
    pending,
    slots,
    positions,
    out,
    num_tokens,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,
    BV: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    CHUNK: tl.constexpr,
    TILED: tl.constexpr,
    CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The state of BV value columns of one head from chunk to chunk, or from token to token; leaves both states."""
    trigger(PDL)
    head = tl.program_id(0)
    part = tl.program_id(1)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    key_head = head % HK if TILED else head // (HV // HK)
    d = tl.arange(0, DKP)
    column = part * BV + tl.arange(0, BV)
    in_k = d < DK
    in_v = column < DV
    q_at = key_head * DK + d
    v_at = 2 * HK * DK + head * DV + column
    o_at = out + head * DV + column
    wait(PDL)
    position = tl.load(positions)
    slot = tl.load(slots).to(tl.int64)
    tile_at = state + (slot * HV + head) * (DK * DV) + d[:, None] * DV + column[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    _store_ring(
        qkvz, conv_state + slot * (W * C), position, num_tokens, head, part, in_k, in_v, q_at, v_at,
        HK, HV, DK, C, C + HV * DV, W, WP, TILED,
    )  # fmt: skip
    s = load_state(tile_at, pending, slot, head, position, d, column, in_k, in_v, HV, DK, DV)
    if CHUNKED:
        i = tl.arange(0, CHUNK)
        for chunk in tl.range(0, tl.cdiv(num_tokens, CHUNK), num_stages=STAGES):
            t = chunk * CHUNK + i
            row = mixed + t.to(tl.int64)[:, None] * C
            pair = ((chunk * HV + head) * CHUNK + i).to(tl.int64)[:, None] * CHUNK + i[None, :]
            k = tl.load(row + (HK * DK + q_at)[None, :], mask=in_k[None, :], other=0.0)
            v = tl.load(row + v_at[None, :], mask=in_v[None, :], other=0.0).to(tl.float32)
            transform = tl.load(transforms + pair)
            q = tl.load(row + q_at[None, :], mask=in_k[None, :], other=0.0)
            score = tl.load(scores + pair)
            decay = tl.load(decays + t * HV + head)
            total = tl.cumsum(decay, 0)
            end = tl.sum(decay, 0)
            grown = tl.exp(total)[:, None]
            u = product(transform, v - grown * product(k, s, PRECISION), PRECISION)
            o = grown * product(q, s, PRECISION) + product(score, u, PRECISION)
            s = s * tl.exp(end) + product(tl.trans(k), tl.exp(end - total)[:, None] * u, PRECISION)
            o_mask = (t < num_tokens)[:, None] & in_v[None, :]
            tl.store(o_at[None, :] + t.to(tl.int64)[:, None] * (HV * DV), o.to(out.dtype.element_ty), mask=o_mask)
    else:
        q, k, v, beta, decay = _load_token(mixed, betas, decays, 0, head, q_at, v_at, in_k, in_v, HK, HV, DK, C)
        for t in range(0, num_tokens):
            # The next token is on its way while this one is summed.
            after = tl.minimum(t + 1, num_tokens - 1)
            token = _load_token(mixed, betas, decays, after, head, q_at, v_at, in_k, in_v, HK, HV, DK, C)
            s *= tl.exp(decay)
            s_k, s_q = sum_pair(s * k[:, None], s * q[:, None])
            change = (v - s_k) * beta
            o = s_q + tl.sum(k * q, 0) * change
            s += k[:, None] * change[None, :]
            tl.store(o_at + t * (HV * DV), o.to(out.dtype.element_ty), mask=in_v)
            q, k, v, beta, decay = token
    tl.store(tile_at, s.to(state.dtype.element_ty), mask=in_tile)


@triton.jit
def _delta_norm_kernel(
    o,
    qkvz,
    gate_norm,
    pending,
    slots,
    positions,
    y,
    num_rows,
    eps,
    C: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    RECORD: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """rms_norm(o) * silu(z); a row is one head of one token. The last token's rows also leave nothing pending.

    The programs of the scan that share a head could not: one would write what another has yet to read.
    """
    trigger(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DVP)
    inside = (row < num_rows)[:, None] & (d < DV)[None, :]
    gain = tl.load(gate_norm + d, mask=d < DV, other=0.0)
    at = row.to(tl.int64)[:, None] * DV + d[None, :]
    z_at = (row // HV).to(tl.int64)[:, None] * (C + HV * DV) + C + (row % HV * DV)[:, None] + d[None, :]
    wait(PDL)
    x = tl.load(o + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(qkvz + z_at, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1) / DV + eps)[:, None]
    tl.store(y + at, (x * gain[None, :] * silu(z)).to(y.dtype.element_ty), mask=inside)
    last = (row < num_rows) & (row >= num_rows - HV)
    place = (tl.load(positions) + num_rows // HV - 1) % 2
    record = pending + ((tl.load(slots).to(tl.int64) * 2 + place) * HV + row % HV) * (DK + DV + 1)
    e = tl.arange(0, RECORD)
    nothing = tl.where((e == DK + DV)[None, :], 1.0, tl.zeros((ROWS, RECORD), tl.float32))
    tl.store(record[:, None] + e[None, :], nothing, mask=last[:, None] & (e <= DK + DV)[None, :])


@dataclass(frozen=True)
class Plan:
    """How the chunks are computed.

    precision: of the products of the scan, ``bf16`` or an input precision of tl.dot. stored: dtype of what lies between
    the kernels. columns: value columns of a program of the scan. warps, stages: of the scan. chunk_warps: of the kernel
    that prepares the chunks. gate_steps: blocks of the hidden size that one program of the gates sums.
    """

    precision: str
    stored: torch.dtype
    columns: int
    warps: int
    stages: int
    chunk_warps: int = 4
    gate_steps: int = 1


def choose(dtype: torch.dtype, value_dim: int, num_tokens: int) -> Plan:
    """As measured in docs/performance/kernels_delta.md."""
    gate_steps = 1 if num_tokens <= 512 else 4  # many tokens fill the GPU, and need fewer parts in memory
    columns = min(32, max(16, triton.next_power_of_2(value_dim)))
    if dtype == torch.float32:
        return Plan("tf32x3", torch.float32, columns, 4, 1, gate_steps=gate_steps)
    return Plan("tf32", torch.float32, columns, 4, 2, gate_steps=gate_steps)


def delta_prefill(
    qkvz: torch.Tensor,
    h: torch.Tensor,
    norm: torch.Tensor,
    norm_eps: float,
    beta_alpha: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    gate_norm: torch.Tensor,
    eps: float,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    pending: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
    plan: Plan | None = None,
    short: int = SHORT,
) -> torch.Tensor:
    """Launch the kernels; arguments and result as for ``ostinato.kernels.delta.delta_prefill``."""
    num_tokens, hidden = h.shape
    width, channels = conv_weight.shape
    key_dim, value_dim = state.shape[2:]
    chosen = plan or choose(qkvz.dtype, value_dim, num_tokens)
    chunked = num_tokens > short
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    padded = (
        num_chunks * CHUNK if chunked else triton.cdiv(num_tokens, 16) * 16
    )  # what lies beyond the last token is zeros
    options = launch_options(qkvz.device)
    heads = {"HK": num_k_heads, "HV": num_v_heads}
    key_block = max(16, triton.next_power_of_2(key_dim))
    value_block = max(16, triton.next_power_of_2(value_dim))

    parts = triton.cdiv(hidden, GATE_COLUMNS * chosen.gate_steps)
    sums = torch.empty((parts, 2 * num_v_heads + 1, padded), dtype=torch.float32, device=qkvz.device)
    tokens = 32 if chunked else 16
    delta_gates_kernel[(triton.cdiv(padded, tokens), parts)](
        h, norm, beta_alpha, sums, num_tokens, padded, H=hidden, HV=num_v_heads,
        HVP=max(16, triton.next_power_of_2(num_v_heads)), TOKENS=tokens, BLOCK_H=GATE_COLUMNS, STEPS=chosen.gate_steps,
        PRECISION="tf32x3", num_warps=4, **options,
    )  # fmt: skip
    mixed = torch.empty((padded, channels), dtype=chosen.stored, device=qkvz.device)
    betas = torch.empty((padded, num_v_heads), dtype=torch.float32, device=qkvz.device)
    decays = torch.empty_like(betas)
    tokens = 16
    delta_conv_kernel[(2 * num_k_heads + num_v_heads, triton.cdiv(padded, tokens))](
        qkvz, conv_weight, conv_state, slots, positions, mixed, sums, a_log, dt_bias, betas, decays, num_tokens, padded,
        key_dim**-0.5, norm_eps, H=hidden, DK=key_dim, DV=value_dim, DP=max(key_block, value_block), W=width,
        TOKENS=tokens, L2_EPS=L2_EPS, PARTS=parts, PARTS_P=triton.next_power_of_2(parts), num_warps=4, **heads,
        **options,
    )  # fmt: skip
    squares = (num_chunks, num_v_heads, CHUNK, CHUNK) if chunked else (0,)
    transforms = torch.empty(squares, dtype=chosen.stored, device=qkvz.device)
    scores = torch.empty_like(transforms)
    if chunked:
        _delta_chunk_kernel[(num_v_heads, num_chunks)](
            mixed, betas, decays, transforms, scores, DK=key_dim, DKP=key_block, C=channels, CHUNK=CHUNK, TILED=tiled,
            PRECISION=chosen.precision, INVERSE_PRECISION="tf32x3", num_warps=chosen.chunk_warps, **heads, **options,
        )  # fmt: skip
    o = torch.empty((num_tokens, num_v_heads * value_dim), dtype=torch.float32, device=qkvz.device)
    _delta_scan_kernel[(num_v_heads, triton.cdiv(value_block, chosen.columns))](
        qkvz, mixed, betas, decays, transforms, scores, conv_state, state, pending, slots, positions, o, num_tokens,
        DK=key_dim, DV=value_dim, DKP=key_block, BV=chosen.columns, W=width, WP=triton.next_power_of_2(width),
        CHUNK=CHUNK, TILED=tiled, CHUNKED=chunked, PRECISION=chosen.precision, STAGES=chosen.stages,
        num_warps=chosen.warps, **heads, **options,
    )  # fmt: skip
    y = torch.empty_like(o, dtype=qkvz.dtype)
    rows = 16
    _delta_norm_kernel[(triton.cdiv(num_tokens * num_v_heads, rows),)](
        o, qkvz, gate_norm, pending, slots, positions, y, num_tokens * num_v_heads, eps, C=channels, HV=num_v_heads,
        DK=key_dim, DV=value_dim, DVP=value_block, RECORD=triton.next_power_of_2(key_dim + value_dim + 1), ROWS=rows,
        num_warps=4, **options,
    )  # fmt: skip
    return y
