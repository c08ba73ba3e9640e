"""Products on packed 4-bit weights where warpgroups multiply asynchronously (compute capability 9.0).

The same product as ``_product_kernel``, written in Gluon, Triton's language with explicit layouts: while the tensor
cores multiply one step's tile, the threads unpack the next one's. Triton itself waits for each product whose operand
came from registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ostinato.kernels.block_linear.matvec.triton import half
from ostinato.kernels.grouped_linear.unpack.triton import in_order, unpack
from ostinato.kernels.triton import gate_times_up, trigger, wait

COLUMNS = gl.constexpr(64)  # of a step


@gluon.jit
def load_scales(
    d, m, sub_d, sub_m, over, sub, step, STEPS: gl.constexpr, GROUP: gl.constexpr, SUPER: gl.constexpr,
    MIN_SIGN: gl.constexpr,
):  # fmt: skip
    """What the scales of a step are made of, as it is in memory; of the last step, past the end."""
    now = gl.minimum(step, STEPS - 1)
    if SUPER == 32:
        where = over + now * 2
    else:
        where = over + now // (SUPER // COLUMNS)
    dd = gl.load(d + where)
    mm = dd
    sd = sub
    sm = sub
    if MIN_SIGN != 0:
        mm = gl.load(m + where)
    if GROUP != SUPER:
        sd = gl.load(sub_d + sub + now * 2).to(gl.int32)
        if MIN_SIGN != 0:
            sm = gl.load(sub_m + sub + now * 2).to(gl.int32)
    return dd, mm, sd, sm


@gluon.jit
def to_weights(
    packed, raw, GROUP: gl.constexpr, SUPER: gl.constexpr, OFFSET: gl.constexpr, MIN_SIGN: gl.constexpr
):  # fmt: skip
    """The bfloat16 tile [BN, COLUMNS] of packed [BN, COLUMNS / 2] and what load_scales found."""
    SUB: gl.constexpr = GROUP != SUPER
    dd = raw[0].to(gl.float32)
    mm = raw[1].to(gl.float32)
    scale, summand = half(dd, mm, raw[2], raw[3], False, GROUP, OFFSET, MIN_SIGN, SUB)
    upper, upper_summand = scale, summand
    if GROUP == 16:
        upper, upper_summand = half(dd, mm, raw[2], raw[3], True, GROUP, OFFSET, MIN_SIGN, SUB)
    low, high = unpack(packed, scale, summand, upper, upper_summand)
    return in_order(low, high)


@gluon.jit
def _wgmma_kernel(
    x, stride_x, bytes_, d, m, sub_d, sub_m, bias, residual, out, order, blocks, M, N, TOP_K, EXPERT_ROWS,
    K: gl.constexpr, GROUP: gl.constexpr, SUPER: gl.constexpr, OFFSET: gl.constexpr, MIN_SIGN: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr, GATE: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out [·, N]: BM rows of x times BN rows of W; half of them gate rows and half up rows where gated.

    The rest as in ``_product_kernel``. A step begins when x, W's tile and the next packed tile are in shared memory: it
    starts its product and unpacks the next tile. Once all warps are done with the product before, it asks for what lies
    STAGES - 1 steps ahead and stores the unpacked tile: of W two are enough.
    """
    trigger(PDL)
    KG: gl.constexpr = K // 32
    STEPS: gl.constexpr = K // COLUMNS
    WIDTH: gl.constexpr = BN // 2 if GATE is not None else BN
    of_x: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    of_w: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [num_warps, 1], [1, 0])
    of_groups: gl.constexpr = gl.BlockedLayout([1, 1, 16], [16, 2, 1], [num_warps, 1, 1], [2, 1, 0])
    of_scales: gl.constexpr = gl.SliceLayout(2, of_groups)
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BN, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    program = gl.program_id(0)
    num_n = gl.cdiv(N, WIDTH)
    wait(PDL)
    if ROWS == "all":
        wide = 8 * num_n
        first_block = (program // wide) * 8
        height = gl.minimum(gl.cdiv(M, BM) - first_block, 8)
        n_block = (program % wide) // height
        start = (first_block + program % height) * BM
        stop = M
        base = 0
    else:
        n_block = program % num_n
        block = blocks + (program // num_n) * 3
        base = gl.load(block).to(gl.int64) * EXPERT_ROWS
        start = gl.load(block + 1)
        stop = gl.load(block + 2)
        if start >= stop:
            return
    safe = gl.minimum(start + gl.arange(0, BM, gl.SliceLayout(1, of_x)), stop - 1)
    if ROWS == "gather":
        safe = gl.load(order + safe) // TOP_K
    x_at = x + safe.to(gl.int64)[:, None] * stride_x + gl.arange(0, COLUMNS, gl.SliceLayout(0, of_x))[None, :]
    bytes_ += base * (K // 2)
    d += base * (K // SUPER)
    m += base * (K // SUPER)
    sub_d += base * KG
    sub_m += base * KG
    local = gl.arange(0, BN, gl.SliceLayout(1, of_w))
    n = gl.minimum(n_block * WIDTH + local % WIDTH, N - 1) + (local // WIDTH) * N
    w_at = bytes_ + n[:, None] * (K // 2) + gl.arange(0, COLUMNS // 2, gl.SliceLayout(0, of_w))[None, :]
    local = gl.arange(0, BN, gl.SliceLayout(1, of_scales))
    n = gl.minimum(n_block * WIDTH + local % WIDTH, N - 1) + (local // WIDTH) * N
    g = gl.arange(0, 2, gl.SliceLayout(0, of_scales))
    over = n[:, None] * (K // SUPER) + (g // (SUPER // 32))[None, :]
    sub = n[:, None] * KG + g[None, :]

    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, COLUMNS], shared)
    w_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BN, COLUMNS], shared)
    p_tiles = gl.allocate_shared_memory(gl.uint8, [STAGES, BN, COLUMNS // 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    async_copy.async_copy_global_to_shared(p_tiles.index(0), w_at)
    async_copy.commit_group()
    for ahead in gl.static_range(STAGES - 1):  # a group: x of a step and W of the next
        if ahead < STEPS:
            async_copy.async_copy_global_to_shared(x_tiles.index(ahead), x_at + ahead * COLUMNS)
        if ahead + 1 < STEPS:
            async_copy.async_copy_global_to_shared(
                p_tiles.index((ahead + 1) % STAGES), w_at + (ahead + 1) * (COLUMNS // 2)
            )
        async_copy.commit_group()
    now = load_scales(d, m, sub_d, sub_m, over, sub, 0, STEPS, GROUP, SUPER, MIN_SIGN)
    then = load_scales(d, m, sub_d, sub_m, over, sub, 1, STEPS, GROUP, SUPER, MIN_SIGN)
    async_copy.wait_group(STAGES - 1)
    gl.thread_barrier()
    w_tiles.index(0).store(to_weights(p_tiles.index(0).load(of_w), now, GROUP, SUPER, OFFSET, MIN_SIGN))
    acc = warpgroup_mma_init(gl.zeros((BM, BN), gl.float32, of_acc))
    for step in range(STEPS):
        fence_async_shared()
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        acc = warpgroup_mma(x_tiles.index(step % STAGES), w_tiles.index(step % 2).permute((1, 0)), acc, is_async=True)
        # Not earlier: the fence would wait for these loads.
        late = load_scales(d, m, sub_d, sub_m, over, sub, step + 2, STEPS, GROUP, SUPER, MIN_SIGN)
        weights = to_weights(p_tiles.index((step + 1) % STAGES).load(of_w), then, GROUP, SUPER, OFFSET, MIN_SIGN)
        then = late
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        gl.thread_barrier()
        soon = step + STAGES - 1
        async_copy.async_copy_global_to_shared(x_tiles.index(soon % STAGES), x_at + soon * COLUMNS, mask=soon < STEPS)
        soon += 1
        async_copy.async_copy_global_to_shared(
            p_tiles.index(soon % STAGES), w_at + soon * (COLUMNS // 2), mask=soon < STEPS
        )
        async_copy.commit_group()
        w_tiles.index((step + 1) % 2).store(weights)
    total = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)

    if GATE is not None:
        gate, up = gl.split(gl.permute(gl.reshape(total, (BM, 2, WIDTH)), (0, 2, 1)))
    else:
        gate = total
        up = total
    result: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // WIDTH, WIDTH // 8], [num_warps, 1], [1, 0])
    n = n_block * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, gate.type.layout))
    if BIAS:
        n_safe = gl.minimum(n, N - 1)
        gate += gl.load(bias + n_safe).to(gl.float32)[None, :]
        if GATE is not None:
            up += gl.load(bias + N + n_safe).to(gl.float32)[None, :]
    if GATE is not None:
        gate = gate_times_up(gate, up, GATE)
    if RESIDUAL:
        value = gl.convert_layout(gate, result)
    else:
        value = gl.convert_layout(gate.to(out.dtype.element_ty), result)
    position = start + gl.arange(0, BM, gl.SliceLayout(1, result))
    n = n_block * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, result))
    store = (position < stop)[:, None] & (n < N)[None, :]
    if ROWS == "scatter":
        position = gl.load(order + gl.minimum(position, stop - 1))
    where = position.to(gl.int64)[:, None] * N + n[None, :]
    if RESIDUAL:
        value = (value + gl.load(residual + where, mask=store, other=0.0)).to(out.dtype.element_ty)
    gl.store(out + where, value, mask=store)
