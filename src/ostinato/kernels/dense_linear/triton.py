"""Products with a matrix of floats: at the speed of memory for few rows of x, the vendor's product for more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ostinato.kernels.block_linear.triton import _finish
from ostinato.kernels.launch import launch_options, num_multiprocessors
from ostinato.kernels.rms_norm.triton import rms_norm
from ostinato.kernels.triton import gate_times_up, trigger, wait

MAX_TOKENS = 8  # rows of x up to which the kernel here reads a small matrix, to spare the kernels around a product
SMALL = 2**22  # elements of such a matrix


@triton.jit
def _dense_matvec_kernel(
    x, stride_x, norm, eps, weight, bias, residual, out, M, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    STEPS: tl.constexpr = (K + BK - 1) // BK
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BK)
    store = (n < N)[:, None] & (row < M)[None, :]
    where = row[None, :] * N + n[:, None]
    at = weight + rows[:, None] * K + column[None, :]
    w = tl.load(at, mask=(column < K)[None, :], other=0.0)
    u = w
    if GATE is not None:
        at_up = weight + (rows + N)[:, None] * K + column[None, :]
        u = tl.load(at_up, mask=(column < K)[None, :], other=0.0)
    wait(PDL)
    if RESIDUAL:
        added = tl.load(residual + where, mask=store, other=0.0)
    acc = tl.zeros((BN, ROWS, BK), tl.float32)
    up = acc
    squares = tl.zeros((ROWS, BK), tl.float32)
    for step in range(STEPS):
        k = step * BK + column
        inside = (row < M)[:, None] & (k < K)[None, :]
        value = tl.load(x + row[:, None] * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:  # the root mean square only scales a row, so it is applied at the end
            squares += value * value
            value *= tl.load(norm + k, mask=k < K, other=0.0)[None, :]
        if STEPS > 1:
            next_k = (k + BK)[None, :]
            next_w = tl.load(at + (step + 1) * BK, mask=next_k < K, other=0.0)
            if GATE is not None:
                next_u = tl.load(at_up + (step + 1) * BK, mask=next_k < K, other=0.0)
        acc += w.to(tl.float32)[:, None, :] * value[None]
        if GATE is not None:
            up += u.to(tl.float32)[:, None, :] * value[None]
        if STEPS > 1:
            w = next_w
            if GATE is not None:
                u = next_u
    y = tl.sum(acc, 2)
    if NORM:
        root = tl.rsqrt(tl.sum(squares, 1) / K + eps)[None, :]
        y *= root
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATE is not None:
        z = tl.sum(up, 2)
        if NORM:
            z *= root
        if BIAS:
            z += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        y = gate_times_up(y, z, GATE)
    if RESIDUAL:
        y += added
    tl.store(out + where, y.to(out.dtype.element_ty), mask=store)


def dense_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Launch the kernels for x [M, K]; arguments as the op's."""
    tokens, k = x.shape
    n = weight.shape[0] // (1 if gated is None else 2)
    out = torch.empty((tokens, n), dtype=out_dtype, device=x.device)
    if tokens == 0:
        return out
    if tokens == 1 or (tokens <= MAX_TOKENS and n * k <= SMALL):
        count = triton.next_power_of_2(tokens)
        if n <= num_multiprocessors(x.device) * 8:
            rows, block, warps = 1, 2048, 4
        elif n <= num_multiprocessors(x.device) * 32:
            rows, block, warps = 2, 1024, 2
        else:
            rows, block, warps = 4, 512, 1
        block = max(32, min(triton.next_power_of_2(k), block // count))
        _dense_matvec_kernel[(triton.cdiv(n, rows),)](
            x, x.stride(0), norm if norm is not None else x, eps, weight, bias if bias is not None else x,
            residual if residual is not None else out, out, tokens, n, k, rows, block, count,
            norm is not None, bias is not None, residual is not None, gated,
            num_warps=warps, **launch_options(x.device),
        )  # fmt: skip
        return out
    if norm is not None:
        x = rms_norm(x, norm, eps, weight.dtype)
    product = F.linear(x.to(weight.dtype), weight)
    if bias is None and residual is None and gated is None and product.dtype == out_dtype:
        return product
    _finish(product, 1, bias, residual, gated, out)
    return out
