"""One token's delta rule, in programs of 32 value columns of a head whose warps meet once.

What ``decode`` computes, cut so that almost nothing goes from thread to thread: a warp has some columns and all rows of
the state, four rows of q and k come to be in the lane that convolves them, its neighbours' by a shuffle, and the sums
over the rows stay in the warp (``kernels.lanes``). Each warp convolves all of q and k for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.delta.ref import L2_EPS, PARTS
from ostinato.kernels.delta.triton import sigmoid, silu, softplus
from ostinato.kernels.lanes.triton import max_lanes, of_lane_across, share, sum_lanes, sum_rows
from ostinato.kernels.launch import launch_options
from ostinato.kernels.triton import load_float, load_floats, nothing, store_own, store_quad, trigger, wait

COLUMNS = 32  # of a program: as many as share a scale


@triton.jit
def _token_kernel(
    qkvz, gates, conv_weight, a_log, dt_bias, gate_norm, conv_state, state, pending, slots, positions, active, y,
    squares, scale_of_y, q_scale, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WARPS: tl.constexpr, SHARERS: tl.constexpr, TILED: tl.constexpr, HAS_ACTIVE: tl.constexpr,
    PREFETCH: tl.constexpr, L2_EPS: tl.constexpr, SLOTS_OF_SQUARES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """SHARERS programs share a head. WIDTH: of the convolution."""
    trigger(PDL)
    QUADS: tl.constexpr = 8 // WARPS  # of columns in a warp
    C: tl.constexpr = 2 * HK * DK + HV * DV
    part = tl.program_id(0) % SHARERS
    head = tl.program_id(0) // SHARERS
    row = tl.program_id(1)
    key_head = head % HK if TILED else head // (HV // HK)
    lane = tl.arange(0, 32)[None, :] + tl.arange(0, WARPS)[:, None] * 0
    warp = tl.arange(0, WARPS)[:, None] + lane * 0
    quad = part * 32 + (warp * QUADS + lane % QUADS) * 4  # the columns of a lane's part of the state
    own = quad + lane // 8  # the one that it has, once the lanes have added what they have
    writes = (lane % 8 < QUADS) & (own < DV)
    key = 4 * lane  # the first of the lane's elements of q and k
    in_k = key < DK
    in_v = own < DV
    q_at = key_head * DK + key
    k_at = HK * DK + q_at
    v_at = 2 * HK * DK + head * DV + own

    if not PREFETCH:
        wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    runs = position >= 0
    if HAS_ACTIVE:
        runs = runs & (tl.load(active + row) != 0)
    # All loads before anything that needs one: each would wait for the memory of the last.
    past = position > 0
    record = pending + ((slot * 2 + (position + 1) % 2) * HV + head) * (DK + DV + 1)
    of_head = state + (slot * HV + head) * (DK * DV) + quad
    tiles = nothing()
    keys = nothing()
    for across in tl.static_range(QUADS):
        for t in tl.static_range(4):
            k_row = 4 * (lane ^ across) + t
            tiles += load_floats(of_head + k_row * DV, (k_row < DK) & (quad < DV) & past)
            keys += (load_float(record + k_row, (k_row < DK) & past),)
    changes = nothing()
    for c in tl.static_range(4):
        changes += (load_float(record + DK + quad + c, (quad < DV) & past),)
    last_decay = load_float(record + DK + DV + lane * 0, (lane >= 0) & past)
    ring = conv_state + slot * (WIDTH * C)
    old = nothing()
    old_v = nothing()
    for back in tl.static_range(1, WIDTH):
        tap = conv_weight + (WIDTH - 1 - back) * C
        at = ring + (position - back + WIDTH) % WIDTH * C
        known = position >= back
        old += load_floats(at + q_at, in_k & known) + load_floats(tap + q_at, in_k)
        old += load_floats(at + k_at, in_k & known) + load_floats(tap + k_at, in_k)
        old_v += (load_float(at + v_at, in_v & known), load_float(tap + v_at, in_v))
    last_tap = conv_weight + (WIDTH - 1) * C
    taps = load_floats(last_tap + q_at, in_k) + load_floats(last_tap + k_at, in_k)
    v_tap = load_float(last_tap + v_at, in_v)
    gain = load_float(gate_norm + own, in_v)
    rate = tl.exp(tl.load(a_log + head))
    bias = tl.load(dt_bias + head)

    sums = nothing()  # of the convolution, but for the last tap: four of q, four of k
    for i in tl.static_range(8):
        total = lane * 0.0
        for back in tl.static_range(WIDTH - 1):
            total += old[16 * back + i // 4 * 8 + i % 4] * old[16 * back + i // 4 * 8 + 4 + i % 4]
        sums += (total,)
    v = lane * 0.0
    for back in tl.static_range(WIDTH - 1):
        v += old_v[2 * back] * old_v[2 * back + 1]
    before = nothing()
    for i in tl.static_range(4 * QUADS):
        for c in tl.static_range(4):
            before += (tiles[4 * i + c] * last_decay + keys[i] * changes[c],)
    # Only kernels of other steps see the state: it need not wait, and nobody has to wait for it.
    for across in tl.static_range(QUADS):
        for t in tl.static_range(4):
            k_row = 4 * (lane ^ across) + t
            store_quad(
                of_head + k_row * DV, before[16 * across + 4 * t], before[16 * across + 4 * t + 1],
                before[16 * across + 4 * t + 2], before[16 * across + 4 * t + 3],
                (k_row < DK) & (quad < DV) & runs,
            )  # fmt: skip
    if PREFETCH:
        wait(PDL)

    x = qkvz + row.to(tl.int64) * (C + HV * DV)
    new = load_floats(x + q_at, in_k) + load_floats(x + k_at, in_k)
    v_new = load_float(x + v_at, in_v)
    z = load_float(x + C + head * DV + own, in_v)
    b = tl.load(gates + row * (2 * HV) + head)
    a = tl.load(gates + row * (2 * HV) + HV + head)
    # Entry position % WIDTH is read by nobody now: the programs that share a key head do not disturb each other.
    now = ring + position % WIDTH * C
    store_own(now + v_at, v_new, writes & runs)
    is_first = (head // HK if TILED else head % (HV // HK)) == 0
    owns = in_k & (warp == 0) & (runs & is_first & (part == 0))
    store_quad(now + q_at, new[0], new[1], new[2], new[3], owns)
    store_quad(now + k_at, new[4], new[5], new[6], new[7], owns)
    qs = nothing()
    ks = nothing()
    for i in tl.static_range(4):
        qs += (silu(sums[i] + new[i] * taps[i]),)
        ks += (silu(sums[4 + i] + new[4 + i] * taps[4 + i]),)
    v = silu(v + v_new * v_tap)
    qq = (qs[0] * qs[0] + qs[1] * qs[1]) + (qs[2] * qs[2] + qs[3] * qs[3])
    kk = (ks[0] * ks[0] + ks[1] * ks[1]) + (ks[2] * ks[2] + ks[3] * ks[3])
    kq = (ks[0] * qs[0] + ks[1] * qs[1]) + (ks[2] * qs[2] + ks[3] * qs[3])
    own_k = ks
    for across in tl.static_range(1, QUADS):
        for t in tl.static_range(4):
            qs += (of_lane_across(qs[t], across),)
            ks += (of_lane_across(ks[t], across),)
    products = nothing()
    for c in tl.static_range(4):
        total = before[c] * ks[0]
        for i in tl.static_range(1, 4 * QUADS):
            total += before[4 * i + c] * ks[i]
        products += (total,)
    for c in tl.static_range(4):
        total = before[c] * qs[0]
        for i in tl.static_range(1, 4 * QUADS):
            total += before[4 * i + c] * qs[i]
        products += (total,)
    s_k, s_q = sum_rows(products, 4, 2, 32, QUADS)
    beta = sigmoid(b)
    decay = tl.exp(-rate * softplus(a + bias))
    k_scale = tl.rsqrt(sum_lanes(kk, 32, 1) + L2_EPS)
    q_scale *= tl.rsqrt(sum_lanes(qq, 32, 1) + L2_EPS)
    change = (v - s_k * (k_scale * decay)) * beta
    o = s_q * (q_scale * decay) + change * (sum_lanes(kq, 32, 1) * k_scale * q_scale)
    gated = o * gain * silu(z)
    largest = max_lanes(max_lanes(tl.abs(gated), 32, 8), QUADS, 1)
    square = sum_lanes(sum_lanes(o * o, 32, 8), QUADS, 1)
    if WARPS > 1:
        places = nothing()
        for i in tl.static_range(2 * WARPS):
            places += (lane * 0 + i,)
        written = (largest, warp, lane == 0, square, warp + WARPS, lane == 0)
        found = share(written, places, 2, 2 * WARPS, 2 * WARPS)
        largest = found[0]
        square = found[WARPS]
        for i in tl.static_range(1, WARPS):
            largest = tl.maximum(largest, found[i])
            square += found[WARPS + i]
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    rounded = (gated * (127.0 / tl.maximum(largest, 1e-30)) + 12582912.0).to(tl.int32, bitcast=True)
    of_row = row.to(tl.int64) * HV + head
    store_own(y + of_row * DV + own, rounded, writes)
    one = (warp == 0) & (lane == 0)
    store_own(scale_of_y + of_row * (DV // 32) + part + lane * 0, largest * (1.0 / 127.0), one & (part < DV // 32))
    OWN: tl.constexpr = SLOTS_OF_SQUARES // SHARERS
    for i in tl.static_range(OWN):
        slot_of_square = squares + of_row * SLOTS_OF_SQUARES + part * OWN + i
        store_own(slot_of_square + lane * 0, square if i == 0 else lane * 0.0, one)
    # Nobody reads this entry now, as with the ring.
    record = pending + ((slot * 2 + position % 2) * HV + head) * (DK + DV + 1)
    store_own(record + DK + own, change, writes & runs)
    leads = runs & (part == 0)
    for t in tl.static_range(4):
        store_own(record + key + t, own_k[t] * k_scale, in_k & (warp == 0) & leads)
    store_own(record + DK + DV + lane * 0, decay + lane * 0.0, one & leads)


def takes(key_dim: int, value_dim: int, form: str) -> bool:
    """Whether the kernel is made for heads of these sizes and a result of this form."""
    return form == "rounded" and key_dim <= 128 and key_dim % 4 == 0 and value_dim <= PARTS * COLUMNS


def delta_token(
    qkvz: torch.Tensor,
    gates: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    gate_norm: torch.Tensor,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    pending: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    active: torch.Tensor | None,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
    prefetch: bool,
    warps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``delta_decode`` in the form ``rounded`` with its gates given, where ``takes`` allows. warps: 2, 4 or 8."""
    rows, device = qkvz.shape[0], qkvz.device
    key_dim, value_dim = state.shape[2:]
    sharers = triton.next_power_of_2(value_dim // COLUMNS)
    y = torch.empty((rows, num_v_heads * value_dim), dtype=torch.int8, device=device)
    scale = torch.empty((rows, num_v_heads * value_dim // COLUMNS), dtype=torch.float32, device=device)
    squares = torch.empty((rows, num_v_heads, PARTS), dtype=torch.float32, device=device)
    _token_kernel[(num_v_heads * sharers, rows)](
        qkvz, gates, conv_weight, a_log, dt_bias, gate_norm, conv_state, state, pending, slots, positions,
        positions if active is None else active, y, squares, scale, key_dim**-0.5,
        HK=num_k_heads, HV=num_v_heads, DK=key_dim, DV=value_dim, WIDTH=conv_weight.shape[0], WARPS=warps,
        SHARERS=sharers, TILED=tiled, HAS_ACTIVE=active is not None, PREFETCH=prefetch, L2_EPS=L2_EPS,
        SLOTS_OF_SQUARES=PARTS, num_warps=warps, **launch_options(device),
    )  # fmt: skip
    return y, squares, scale
