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
