"""The device side that all kernels share: dependent launch and dp4a, with what Triton's interpreter needs of them.

Imported by the ``triton.py`` of an op only. Set TRITON_INTERPRET=1 before Triton is first imported, and kernels run
on CPU tensors: the dependency calls vanish there and dp4a is computed by shifts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(INTERPRETED.value)


@triton.jit
def trigger(PDL: tl.constexpr):
    """Let the next kernel of the stream start: the first statement of every kernel."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until all earlier kernels of the stream are done and their writes are visible."""
    if PDL:
        gdc_wait()


@triton.jit
def dp4a(a, b, c):
    """c + the dot product of the four signed bytes of a and b; int32 tensors of one shape."""
    if INTERPRETED:
        for lane in tl.static_range(4):
            c += ((a << (24 - 8 * lane)) >> 24) * ((b << (24 - 8 * lane)) >> 24)
        return c
    else:  # noqa: RET505 (a branch not taken must not be compiled)
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def gate_times_up(gate, up, GATE: tl.constexpr):
    """act(gate) * up of float32 values. GATE: ``silu`` or ``gelu_tanh``."""
    z = gate
    if GATE == "gelu_tanh":  # 0.5 * (1 + tanh(z)) is sigmoid(2 * z)
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(tl.maximum(z, -80.0)) * up  # below that exp(-z) overflows


@triton.jit
def quantize_quads(lo, hi):
    """int8 activations from the halves of groups of 32.

    lo, hi: float32 [ROWS, NG, 4, 4], elements 0 … 15 and 16 … 31 of each group as [quad, lane].
    Returns the words of each half, int32 [ROWS, NG, 4], four int8 each, and the scales, float32 [ROWS, NG].
    """
    largest = tl.max(tl.max(tl.maximum(tl.abs(lo), tl.abs(hi)), 3), 2)
    inverse = (127.0 / tl.maximum(largest, 1e-30))[:, :, None, None]
    shift = 8 * tl.arange(0, 4)[None, None, None, :]
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    low = ((lo * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255) << shift
    upper = ((hi * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255) << shift
    return tl.sum(low, 3), tl.sum(upper, 3), largest * (1.0 / 127.0)


@triton.jit
def dot_bfloat16(a, b, acc):
    """acc + a @ b of bfloat16 operands, summed in float32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:  # noqa: RET505
        return tl.dot(a, b, acc)
