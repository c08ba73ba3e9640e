"""The fused decode kernel: one program has some value columns of one value head of one row.

Every reduction of a program depends on its inputs alone and not on another reduction: with Sᵀk, Sᵀq and k·q at hand the
result is o = decay Sᵀq + (k·q) change, so that nothing is summed over the new state, and the L2 norms only scale.
Nor is the new state made here: the change is left in ``pending``, and the next token's kernel adds it to the state
while the projection before it still runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ostinato.errors import KernelError
from ostinato.kernels.block_linear.eights import SPAN
from ostinato.kernels.delta.ref import L2_EPS, PARTS
from ostinato.kernels.delta.token.triton import delta_token, takes
from ostinato.kernels.delta.triton import sigmoid, silu, softplus
from ostinato.kernels.launch import launch_options, num_multiprocessors
from ostinato.kernels.triton import INTERPRETED, load_floats, nothing, trigger, wait


@triton.jit
def load_state(
    tile_at, pending, slot, head, position, key_row, value_column, in_k, in_v,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Columns of a head's state before ``position``, with the last token's change, float32; zeros at position 0."""
    parts = load_parts(tile_at, pending, slot, head, position, key_row, value_column, in_k, in_v, HV, DK, DV)
    return with_change(parts)


@triton.jit
def load_parts(
    tile_at, pending, slot, head, position, key_row, value_column, in_k, in_v,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """What ``load_state`` makes the state of: the tile in memory, and decay, key and change of the last token."""
    past = position > 0
    record = pending + ((slot * 2 + (position + 1) % 2) * HV + head) * (DK + DV + 1)
    tile = tl.load(tile_at, mask=in_k[:, None] & in_v[None, :] & past, other=0.0)
    key = tl.load(record + key_row, mask=in_k & past, other=0.0)
    change = tl.load(record + DK + value_column, mask=in_v & past, other=0.0)
    decay = tl.load(record + DK + DV, mask=past, other=0.0)
    return tile, decay, key, change


@triton.jit
def with_change(parts):
    tile, decay, key, change = parts
    return tile.to(tl.float32) * decay + key[:, None] * change[None, :]


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _add_sixes(a, b, c, d, e, f, g, h, i, j, k, l):
    return a + g, b + h, c + i, d + j, e + k, f + l


@triton.jit
def sum_pair(a, b):
    """Both sums over axis 0 in one exchange between threads."""
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0)
    else:
        return tl.reduce((a, b), 0, _add_pairs)


@triton.jit
def _sum_triple(a, b, c):
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)
    else:
        return tl.reduce((a, b, c), 0, _add_triples)


@triton.jit
def _sum_six(a, b, c, d, e, f):
    """Six sums in one exchange, where all tensors have one shape."""
    if INTERPRETED or a.shape[0] != d.shape[0]:
        a, b, c = _sum_triple(a, b, c)
        d, e, f = _sum_triple(d, e, f)
        return a, b, c, d, e, f
    else:
        return tl.reduce((a, b, c, d, e, f), 0, _add_sixes)


@triton.jit
def _delta_decode_kernel(
    qkvz,
    h,
    norm,
    beta_alpha,
    conv_weight,
    a_log,
    dt_bias,
    gate_norm,
    conv_state,
    state,
    pending,
    slots,
    positions,
    active,
    gates,
    y,
    squares,
    scale_of_y,
    norm_eps,
    eps,
    q_scale,
    H: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,
    BV: tl.constexpr,
    W: tl.constexpr,
    SHARERS: tl.constexpr,
    TILED: tl.constexpr,
    DEFER: tl.constexpr,
    EIGHTS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    PREFETCH: tl.constexpr,
    GIVEN: tl.constexpr,
    L2_EPS: tl.constexpr,
    SLOTS_OF_SQUARES: tl.constexpr,
    PDL: tl.constexpr,
):
    trigger(PDL)
    part = tl.program_id(0) % SHARERS
    head = tl.program_id(0) // SHARERS
    row = tl.program_id(1)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    key_head = head % HK if TILED else head // (HV // HK)
    i = tl.arange(0, DKP)
    v_column = part * BV + tl.arange(0, BV)
    in_k = i < DK
    in_v = v_column < DV
    q_at = key_head * DK + i
    k_at = HK * DK + q_at
    v_at = 2 * HK * DK + head * DV + v_column

    if not PREFETCH:
        wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    runs = position >= 0
    if HAS_ACTIVE:
        runs = runs & (tl.load(active + row) != 0)
    tile_at = state + (slot * HV + head) * (DK * DV) + i[:, None] * DV + v_column[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    # All loads before anything that needs one: each would wait for the memory of the last.
    if not GIVEN:
        quad = 4 * (tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :])
        in_h = quad < H
        n0, n1, n2, n3 = load_floats(norm + quad, in_h)
        b0, b1, b2, b3 = load_floats(beta_alpha + head * H + quad, in_h)
        a0, a1, a2, a3 = load_floats(beta_alpha + (HV + head) * H + quad, in_h)
    parts = load_parts(tile_at, pending, slot, head, position, i, v_column, in_k, in_v, HV, DK, DV)
    ring = conv_state + slot * (W * C)
    old = nothing()
    for back in tl.static_range(1, W):
        tap = conv_weight + (W - 1 - back) * C
        past = ring + (position - back + W) % W * C
        known = position >= back
        old += (
            tl.load(past + q_at, mask=in_k & known, other=0.0), tl.load(tap + q_at, mask=in_k, other=0.0),
            tl.load(past + k_at, mask=in_k & known, other=0.0), tl.load(tap + k_at, mask=in_k, other=0.0),
            tl.load(past + v_at, mask=in_v & known, other=0.0), tl.load(tap + v_at, mask=in_v, other=0.0),
        )  # fmt: skip
    last_tap = conv_weight + (W - 1) * C
    q_tap = tl.load(last_tap + q_at, mask=in_k, other=0.0)
    k_tap = tl.load(last_tap + k_at, mask=in_k, other=0.0)
    v_tap = tl.load(last_tap + v_at, mask=in_v, other=0.0)
    rate = tl.exp(tl.load(a_log + head))
    bias = tl.load(dt_bias + head)
    gain = tl.load(gate_norm + v_column, mask=in_v, other=0.0)
    if not GIVEN:
        b0 *= n0
        b1 *= n1
        b2 *= n2
        b3 *= n3
        a0 *= n0
        a1 *= n1
        a2 *= n2
        a3 *= n3
    q = tl.zeros((DKP,), tl.float32)
    k = tl.zeros((DKP,), tl.float32)
    v = tl.zeros((BV,), tl.float32)
    for back in tl.static_range(W - 1):
        q += old[6 * back] * old[6 * back + 1]
        k += old[6 * back + 2] * old[6 * back + 3]
        v += old[6 * back + 4] * old[6 * back + 5]
    tile = with_change(parts)
    # Only kernels of other steps see the state: it need not wait, and nobody has to wait for it.
    tl.store(tile_at, tile.to(state.dtype.element_ty), mask=in_tile & runs)
    if PREFETCH:
        wait(PDL)

    x = qkvz + row.to(tl.int64) * (C + HV * DV)
    q_new = tl.load(x + q_at, mask=in_k, other=0.0).to(tl.float32)
    k_new = tl.load(x + k_at, mask=in_k, other=0.0).to(tl.float32)
    v_new = tl.load(x + v_at, mask=in_v, other=0.0).to(tl.float32)
    z = tl.load(x + C + head * DV + v_column, mask=in_v, other=0.0).to(tl.float32)
    if GIVEN:
        of_beta = tl.load(gates + row * (2 * HV) + head)
        of_alpha = tl.load(gates + row * (2 * HV) + HV + head)
    else:
        h0, h1, h2, h3 = load_floats(h + row.to(tl.int64) * H + quad, in_h)
    # Entry position % W is read by nobody now: the programs that share a key head do not disturb each other.
    now = ring + position % W * C
    tl.store(now + v_at, v_new, mask=in_v & runs)
    first = (head // HK if TILED else head % (HV // HK)) == 0
    owns = runs & first & (part == 0)
    tl.store(now + q_at, q_new, mask=in_k & owns)
    tl.store(now + k_at, k_new, mask=in_k & owns)
    q = silu(q + q_new * q_tap)
    k = silu(k + k_new * k_tap)
    v = silu(v + v_new * v_tap)
    s_k, s_q = sum_pair(tile * k[:, None], tile * q[:, None])
    if GIVEN:
        qq, kk, kq = _sum_triple(q * q, k * k, k * q)
    else:
        # Axis 0 lies within a thread; what is left has the layout of q and k where LANES is DKP.
        hh = tl.sum((h0 * h0 + h1 * h1) + (h2 * h2 + h3 * h3), 0)
        hb = tl.sum((h0 * b0 + h1 * b1) + (h2 * b2 + h3 * b3), 0)
        ha = tl.sum((h0 * a0 + h1 * a1) + (h2 * a2 + h3 * a3), 0)
        qq, kk, kq, hh, hb, ha = _sum_six(q * q, k * k, k * q, hh, hb, ha)
        scale = tl.rsqrt(hh / H + norm_eps)
        of_beta = hb * scale
        of_alpha = ha * scale
    beta = sigmoid(of_beta)
    decay = tl.exp(-rate * softplus(of_alpha + bias))
    k_scale = tl.rsqrt(kk + L2_EPS)
    q_scale *= tl.rsqrt(qq + L2_EPS)
    change = (v - s_k * (k_scale * decay)) * beta
    o = s_q * (q_scale * decay) + change * (kq * k_scale * q_scale)
    # Nobody reads this entry now, as with the ring.
    record = pending + ((slot * 2 + position % 2) * HV + head) * (DK + DV + 1)
    tl.store(record + DK + v_column, change, mask=in_v & runs)
    tl.store(record + i, k * k_scale, mask=in_k & runs & (part == 0))
    tl.store(record + DK + DV, decay, mask=runs & (part == 0))

    gated = o * gain * silu(z)
    y_at = y + row.to(tl.int64) * (HV * DV) + head * DV + v_column
    if DEFER:
        groups = tl.reshape(gated, (BV // 32, 32))
        largest = tl.max(tl.abs(groups), 1)
        # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
        rounded = (groups * (127.0 / tl.maximum(largest, 1e-30))[:, None] + 12582912.0).to(tl.int32, bitcast=True)
        group = part * (BV // 32) + tl.arange(0, BV // 32)
        column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
        y_at = y + row.to(tl.int64) * (HV * DV) + head * DV + column
        tl.store(y_at, ((rounded << 24) >> 24).to(tl.int8), mask=column < DV)
        scale_at = scale_of_y + (row * HV + head) * (DV // 32) + group
        tl.store(scale_at, largest * (1.0 / 127.0), mask=group < DV // 32)
        OWN: tl.constexpr = SLOTS_OF_SQUARES // SHARERS
        own = tl.arange(0, OWN)
        total = tl.where(own == 0, tl.sum(o * o, 0), 0.0)
        tl.store(squares + (row * HV + head) * SLOTS_OF_SQUARES + part * OWN + own, total)
    else:
        gated *= tl.rsqrt(tl.sum(o * o, 0) / DV + eps)
        if EIGHTS:
            largest = tl.max(tl.abs(gated), 0)
            rounded = (gated * (127.0 / tl.maximum(largest, 1e-30)) + 12582912.0).to(tl.int32, bitcast=True)
            rounded = (rounded << 24) >> 24
            c = tl.arange(0, BV)
            block = row // 8 * HV + head
            at = c // 16 % 2 * (BV * 4) + row % 8 * (BV // 2) + c // 32 * 16 + c % 16
            tl.store(y + block * (BV * 8) + at, rounded.to(tl.int8))
            factor = scale_of_y + block * 16 + row % 8 * 2
            tl.store(factor, largest * (1.0 / 127.0))
            tl.store(factor + 1, tl.sum(rounded, 0).to(tl.float32))
        else:
            tl.store(y_at, gated.to(y.dtype.element_ty), mask=in_v)


@dataclass(frozen=True)
class Tiling:
    """parts: programs that share a head (of a ``rounded`` result), 1, 2 or 4. warps: of a program."""

    parts: int
    warps: int


def choose(rows: int, heads: int, value_dim: int, form: str, multiprocessors: int) -> Tiling:
    """As measured in docs/performance/kernels_delta.md. A program rounds whole groups of 32 columns."""
    parts = PARTS if form == "rounded" else 1
    width = triton.next_power_of_2(value_dim)
    while parts > 1 and (rows * heads * parts > 2 * multiprocessors or width // parts < 32):
        parts //= 2
    return Tiling(parts, 2 if width // parts == 32 else 4)


def delta_decode(
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
    active: torch.Tensor | None,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
    form: str,
    gates: torch.Tensor | None,
    prefetch: bool,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch ``_delta_decode_kernel``; arguments and result as for ``ostinato.kernels.delta.delta_decode``."""
    rows, hidden = h.shape
    key_dim, value_dim = state.shape[2:]
    if gates is not None and tiling is None and takes(key_dim, value_dim, form):
        return delta_token(
            qkvz, gates, conv_weight, a_log, dt_bias, gate_norm, conv_state, state, pending, slots, positions, active,
            num_k_heads, num_v_heads, tiled, prefetch,
        )  # fmt: skip
    if hidden % 4:
        raise KernelError(f"delta_decode on a GPU takes a hidden size that is a multiple of 4, got {hidden}")
    chosen = tiling or choose(rows, num_v_heads, value_dim, form, num_multiprocessors(qkvz.device))
    rounded, eights = form == "rounded", form == "eights"
    lanes = 32 * chosen.warps
    device, columns = qkvz.device, num_v_heads * value_dim
    if eights:
        assert chosen.parts == 1, "a program rounds a whole head"
        shape = (triton.cdiv(rows, 8), num_v_heads)
        make = torch.zeros if rows % 8 else torch.empty  # rows beyond the last are zeros
        y = make((*shape, 8 * SPAN), dtype=torch.int8, device=device)
        scale = make((*shape, 8, 2), dtype=torch.float32, device=device)
    else:
        y = torch.empty((rows, columns), dtype=torch.int8 if rounded else qkvz.dtype, device=device)
        scale = torch.empty((rows, columns // 32) if rounded else (0,), dtype=torch.float32, device=device)
    squares = torch.empty((rows, num_v_heads, PARTS) if rounded else (0,), dtype=torch.float32, device=device)
    _delta_decode_kernel[(num_v_heads * chosen.parts, rows)](
        qkvz,
        h,
        norm,
        beta_alpha,
        conv_weight,
        a_log,
        dt_bias,
        gate_norm,
        conv_state,
        state,
        pending,
        slots,
        positions,
        positions if active is None else active,
        h if gates is None else gates,
        y,
        squares,
        scale,
        norm_eps,
        eps,
        key_dim**-0.5,
        H=hidden,
        LANES=lanes,
        STEPS=triton.next_power_of_2(triton.cdiv(hidden // 4, lanes)),
        HK=num_k_heads,
        HV=num_v_heads,
        DK=key_dim,
        DV=value_dim,
        DKP=triton.next_power_of_2(key_dim),
        BV=triton.next_power_of_2(value_dim) // chosen.parts,
        W=conv_weight.shape[0],
        SHARERS=chosen.parts,
        TILED=tiled,
        DEFER=rounded,
        EIGHTS=eights,
        HAS_ACTIVE=active is not None,
        PREFETCH=prefetch,
        GIVEN=gates is not None,
        L2_EPS=L2_EPS,
        SLOTS_OF_SQUARES=PARTS,
        num_warps=chosen.warps,
        **launch_options(qkvz.device),
    )
    return y, squares, scale
