"""One token's delta rule, in programs of 32 value columns of a head whose warps meet once.

What ``decode`` computes, cut so that little goes from thread to thread. The warps share the rows of the state and have
all columns of the program, whole cache lines; a lane convolves one element of q and k of its warp's rows and hands it
to those that need it by shuffles; sums over the rows go through shared memory once (``kernels.lanes``), and from there
on each warp has everything, a lane for a column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ostinato.kernels.delta.ref import L2_EPS, PARTS
from ostinato.kernels.delta.triton import sigmoid, silu, softplus
from ostinato.kernels.lanes.triton import max_lanes, of_lane, row_of, share, sum_lanes, sum_rows
from ostinato.kernels.launch import launch_options
from ostinato.kernels.triton import int8_of, load_float, load_floats, nothing, store_own, store_quad, trigger, wait

COLUMNS = 32  # of a program: as many as share a scale


@triton.jit
def _token_kernel(
    qkvz, gates, conv_weight, a_log, dt_bias, gate_norm, conv_state, state, pending, slots, positions, active, y,
    squares, scale_of_y, q_scale, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WARPS: tl.constexpr, SHARERS: tl.constexpr, TILED: tl.constexpr, HAS_ACTIVE: tl.constexpr,
    PREFETCH: tl.constexpr, L2_EPS: tl.constexpr, SLOTS_OF_SQUARES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """SHARERS programs share a head, WARPS * 32 keys from DK on. WIDTH: of the convolution."""
    trigger(PDL)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    part = tl.program_id(0) % SHARERS
    head = tl.program_id(0) // SHARERS
    row = tl.program_id(1)
    key_head = head % HK if TILED else head // (HV // HK)
    lane = tl.arange(0, 32)[None, :] + tl.arange(0, WARPS)[:, None] * 0
    warp = tl.arange(0, WARPS)[:, None] + lane * 0
    quad = part * 32 + lane % 8 * 4  # the columns of a lane's part of the state
    k_row = warp * 32 + lane // 8 * 8  # and the first of its eight rows
    key = warp * 32 + lane  # the lane's own element of q and k
    own = part * 32 + lane  # and its column, at the end
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
    of_head = state + (slot * HV + head) * (DK * DV) + k_row * DV + quad
    tiles = nothing()
    for i in tl.static_range(8):
        tiles += load_floats(of_head + i * DV, (k_row + i < DK) & (quad < DV) & past)
    last_key = load_float(record + key, in_k & past)
    changes = nothing()
    for c in tl.static_range(4):
        changes += (load_float(record + DK + quad + c, (quad < DV) & past),)
    last_decay = load_float(record + DK + DV + lane * 0, (lane >= 0) & past)
    ring = conv_state + slot * (WIDTH * C)
    old = nothing()
    for back in tl.static_range(1, WIDTH):
        tap = conv_weight + (WIDTH - 1 - back) * C
        at = ring + (position - back + WIDTH) % WIDTH * C
        known = position >= back
        old += (
            load_float(at + q_at, in_k & known), load_float(tap + q_at, in_k),
            load_float(at + k_at, in_k & known), load_float(tap + k_at, in_k),
            load_float(at + v_at, in_v & known), load_float(tap + v_at, in_v),
        )  # fmt: skip
    last_tap = conv_weight + (WIDTH - 1) * C
    q_tap = load_float(last_tap + q_at, in_k)
    k_tap = load_float(last_tap + k_at, in_k)
    v_tap = load_float(last_tap + v_at, in_v)
    gain = load_float(gate_norm + own, in_v)
    rate = tl.exp(tl.load(a_log + head))
    bias = tl.load(dt_bias + head)

    q = lane * 0.0
    k = lane * 0.0
    v = lane * 0.0
    for back in tl.static_range(WIDTH - 1):
        q += old[6 * back] * old[6 * back + 1]
        k += old[6 * back + 2] * old[6 * back + 3]
        v += old[6 * back + 4] * old[6 * back + 5]
    before = nothing()
    for i in tl.static_range(8):
        of_row = of_lane(last_key, lane // 8 * 8 + i)
        for c in tl.static_range(4):
            before += (tiles[4 * i + c] * last_decay + of_row * changes[c],)
    # Only kernels of other steps see the state: it need not wait, and nobody has to wait for it.
    for i in tl.static_range(8):
        store_quad(
            of_head + i * DV, before[4 * i], before[4 * i + 1], before[4 * i + 2], before[4 * i + 3],
            (k_row + i < DK) & (quad < DV) & runs,
        )  # fmt: skip
    if PREFETCH:
        wait(PDL)

    x = qkvz + row.to(tl.int64) * (C + HV * DV)
    q_new = load_float(x + q_at, in_k)
    k_new = load_float(x + k_at, in_k)
    v_new = load_float(x + v_at, in_v)
    z = load_float(x + C + head * DV + own, in_v)
    b = tl.load(gates + row * (2 * HV) + head)
    a = tl.load(gates + row * (2 * HV) + HV + head)
    q = silu(q + q_new * q_tap)
    k = silu(k + k_new * k_tap)
    v = silu(v + v_new * v_tap)
    products = nothing()
    for _ in tl.static_range(8):
        products += (lane * 0.0,)
    for i in tl.static_range(8):
        of_k = of_lane(k, lane // 8 * 8 + i)
        of_q = of_lane(q, lane // 8 * 8 + i)
        more = nothing()
        for c in tl.static_range(4):
            more += (products[c] + before[4 * i + c] * of_k,)
        for c in tl.static_range(4):
            more += (products[4 + c] + before[4 * i + c] * of_q,)
        products = more
    s_k, s_q = sum_rows(products, 4, 2, 8, 32)
    lengths = sum_rows((q * q, k * k, k * q, lane * 0.0), 4, 1, 1, 32)[0]  # each in eight lanes
    if WARPS > 1:
        column = lane % 8 * 4 + row_of(lane, 4, 8, 32)
        base = warp * 68
        written = nothing() + (s_k, base + column, lane >= 0, s_q, base + 32 + column, lane >= 0)  # noqa: RUF005
        written += (lengths, base + 64 + row_of(lane, 4, 1, 32), lane < 4)
        places = nothing()
        for i in tl.static_range(WARPS):
            places += (lane + i * 68, lane + (i * 68 + 32))
        for i in tl.static_range(WARPS):
            places += (lane * 0 + (i * 68 + 64), lane * 0 + (i * 68 + 65), lane * 0 + (i * 68 + 66))
        found = share(written, places, 3, 5 * WARPS, 68 * WARPS)
        s_k = found[0]
        s_q = found[1]
        qq = found[2 * WARPS]
        kk = found[2 * WARPS + 1]
        kq = found[2 * WARPS + 2]
        for i in tl.static_range(1, WARPS):
            s_k += found[2 * i]
            s_q += found[2 * i + 1]
            qq += found[2 * WARPS + 3 * i]
            kk += found[2 * WARPS + 3 * i + 1]
            kq += found[2 * WARPS + 3 * i + 2]
    else:
        keeper = lane // 4 + row_of(lane, 4, 1, 4) * 8  # of the lane's column: its two lowest bits change places
        s_k = of_lane(s_k, keeper)
        s_q = of_lane(s_q, keeper)
        qq = of_lane(lengths, lane * 0)
        kk = of_lane(lengths, lane * 0 + 2)
        kq = of_lane(lengths, lane * 0 + 1)
    beta = sigmoid(b)
    decay = tl.exp(-rate * softplus(a + bias))
    k_scale = tl.rsqrt(kk + L2_EPS)
    q_scale *= tl.rsqrt(qq + L2_EPS)
    change = (v - s_k * (k_scale * decay)) * beta
    o = s_q * (q_scale * decay) + change * (kq * k_scale * q_scale)
    gated = o * gain * silu(z)
    largest = max_lanes(tl.abs(gated), 1, 32)
    square = sum_lanes(o * o, 1, 32)
    of_row = row.to(tl.int64) * HV + head
    writes = in_v & (warp == 0)
    one = (warp == 0) & (lane == 0)
    store_own(y + of_row * DV + own, int8_of(gated, largest), writes)
    store_own(scale_of_y + of_row * (DV // 32) + part + lane * 0, largest * (1.0 / 127.0), one & (part < DV // 32))
    OWN: tl.constexpr = SLOTS_OF_SQUARES // SHARERS
    for i in tl.static_range(OWN):
        slot_of_square = squares + of_row * SLOTS_OF_SQUARES + part * OWN + i
        store_own(slot_of_square + lane * 0, square if i == 0 else lane * 0.0, one)
    # Entry position % WIDTH is read by nobody now: the programs that share a key head do not disturb each other.
    now = ring + position % WIDTH * C
    store_own(now + v_at, v_new, writes & runs)
    is_first = (head // HK if TILED else head % (HV // HK)) == 0
    leads = in_k & (runs & (part == 0))
    store_own(now + q_at, q_new, leads & is_first)
    store_own(now + k_at, k_new, leads & is_first)
    # Nobody reads this one now, as with the ring.
    record = pending + ((slot * 2 + position % 2) * HV + head) * (DK + DV + 1)
    store_own(record + DK + own, change, writes & runs)
    store_own(record + key, k * k_scale, leads)
    store_own(record + DK + DV + lane * 0, decay + lane * 0.0, one & leads)


def takes(key_dim: int, value_dim: int, form: str) -> bool:
    """Whether the kernel is made for heads of these sizes and a result of this form."""
    return form == "rounded" and key_dim <= 256 and value_dim <= PARTS * COLUMNS


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``delta_decode`` in the form ``rounded`` with its gates given, where ``takes`` allows."""
    rows, device = qkvz.shape[0], qkvz.device
    key_dim, value_dim = state.shape[2:]
    sharers = triton.next_power_of_2(value_dim // COLUMNS)
    warps = triton.next_power_of_2(triton.cdiv(key_dim, 32))
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
