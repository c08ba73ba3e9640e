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
def nothing():
    """The empty tuple, to which type checkers let a tuple of any length be added."""
    return ()


@triton.jit
def trigger(PDL: tl.constexpr):
    """Let the next kernel of the stream start: the first statement of a kernel that has no reason to wait with it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until all earlier kernels of the stream are done and their writes are visible."""
    if PDL:
        gdc_wait()


@triton.jit
def fence():
    """Keeps what is loaded before it before what is computed behind it; ``wait`` does so too.

    The assembler would put each load next to its use, with few of them on their way at a time. It moves nothing over
    an exit, even one that no program takes.
    """
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.eq.u32 p, $1, 0x7fffffff; @p exit; mov.u32 $0, 0; }",
            "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def dp4a(a, b, c):
    """c + the dot product of the four signed bytes of a and b; int32 tensors of one shape."""
    if INTERPRETED:
        for lane in tl.static_range(4):
            c += ((a << (24 - 8 * lane)) >> 24) * ((b << (24 - 8 * lane)) >> 24)
        return c
    else:
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
def _load_four(pointer, inside, BITS: tl.constexpr):
    """Four adjacent values of 32 or 16 bits as four tensors of integers, zeros outside; pointers aligned to all four.

    One vector load a thread, in the layout of the pointers: Triton would choose a layout for a tensor [..., 4] by the
    contiguity of its values alone, and then move them between threads through shared memory.
    """
    if INTERPRETED:
        return (
            tl.load(pointer, mask=inside, other=0),
            tl.load(pointer + 1, mask=inside, other=0),
            tl.load(pointer + 2, mask=inside, other=0),
            tl.load(pointer + 3, mask=inside, other=0),
        )
    else:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .pred p;
            setp.ne.b32 p, $5, 0;
            mov.b{BITS} $0, 0; mov.b{BITS} $1, 0; mov.b{BITS} $2, 0; mov.b{BITS} $3, 0;
            @p ld.global.v4.b{BITS} {{$0, $1, $2, $3}}, [$4];
            }}""",
            "=&r,=&r,=&r,=&r,l,r" if BITS == 32 else "=&h,=&h,=&h,=&h,l,r",
            [pointer, inside.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32) if BITS == 32 else (tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_words(pointer, inside):
    """Four adjacent int32 as four tensors, zeros outside; pointers of 16-byte alignment."""
    return _load_four(pointer, inside, 32)


@triton.jit
def load_halves(pointer, inside):
    """Four adjacent 16-bit values as int16 tensors, zeros outside; pointers of 8-byte alignment."""
    return _load_four(pointer, inside, 16)


@triton.jit
def load_floats(pointer, inside):
    """Four adjacent float32, bfloat16 or float16 values as float32 tensors, zeros outside."""
    kind: tl.constexpr = pointer.dtype.element_ty
    if kind == tl.float32:
        a, b, c, d = load_words(pointer, inside)
    else:
        a, b, c, d = load_halves(pointer, inside)
    return (
        a.to(kind, bitcast=True).to(tl.float32),
        b.to(kind, bitcast=True).to(tl.float32),
        c.to(kind, bitcast=True).to(tl.float32),
        d.to(kind, bitcast=True).to(tl.float32),
    )


@triton.jit
def load_word(pointer, inside):
    """One int32, int16 or int8 each, sign-extended to int32, or one float16 as float32; zeros outside.

    Like load_words: in the layout of the pointers.
    """
    if INTERPRETED:
        found = tl.load(pointer, mask=inside, other=0)
        return found.to(tl.float32 if found.dtype == tl.float16 else tl.int32)
    elif pointer.dtype.element_ty == tl.float16:
        return load_float(pointer, inside)
    elif pointer.dtype.element_ty == tl.int8:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.s8 $0, [$1]; }",
            "=&r,l,r", [pointer, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif pointer.dtype.element_ty == tl.int16:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.s16 $0, [$1]; }",
            "=&r,l,r", [pointer, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }",
            "=&r,l,r", [pointer, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_float(pointer, inside):
    """One float32, float16 or bfloat16 each as float32, zeros outside, in the layout of the pointers."""
    kind: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED:
        return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    elif kind == tl.float32:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }",
            "=&f,l,r", [pointer, inside.to(tl.int32)], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b16 $0, 0; @p ld.global.b16 $0, [$1]; }",
            "=&h,l,r", [pointer, inside.to(tl.int32)], dtype=tl.int16, is_pure=False, pack=1,
        )  # fmt: skip
        return bits.to(kind, bitcast=True).to(tl.float32)


@triton.jit
def store_own(pointer, value, inside):
    """One int8, float32, float16 or bfloat16 each, by the thread that has it.

    Like load_word: Triton would move values between threads to store neighbours at once.
    """
    kind: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED:
        tl.store(pointer, value.to(kind), mask=inside)
    elif kind == tl.int8:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b8 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [pointer, value.to(tl.int32), inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif kind == tl.float32:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }", "=r,l,r,r",
            [pointer, value.to(tl.float32).to(tl.int32, bitcast=True), inside.to(tl.int32)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        bits = value.to(kind).to(tl.int16, bitcast=True)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,h,r", [pointer, bits, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def store_quad(pointer, a, b, c, d, inside):
    """Four adjacent values, float32 or bfloat16 in memory, by the thread that has them; aligned to all four."""
    kind: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED:
        tl.store(pointer, a.to(kind), mask=inside)
        tl.store(pointer + 1, b.to(kind), mask=inside)
        tl.store(pointer + 2, c.to(kind), mask=inside)
        tl.store(pointer + 3, d.to(kind), mask=inside)
    elif kind == tl.float32:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
            "=r,l,r,r,r,r,r",
            [
                pointer, a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True), c.to(tl.int32, bitcast=True),
                d.to(tl.int32, bitcast=True), inside.to(tl.int32),
            ],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.global.v4.b16 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
            "=r,l,h,h,h,h,r",
            [
                pointer, a.to(kind).to(tl.int16, bitcast=True), b.to(kind).to(tl.int16, bitcast=True),
                c.to(kind).to(tl.int16, bitcast=True), d.to(kind).to(tl.int16, bitcast=True), inside.to(tl.int32),
            ],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def int8_of(x, largest):
    """x, of at most ``largest``, as int8 with the scale ``largest`` / 127: in the lowest byte of an int32."""
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    return (x * (127.0 / tl.maximum(largest, 1e-30)) + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def quantize_quad(a, b, c, d, inverse):
    """Four int8 in a word: each value times ``inverse``, rounded to the nearest even."""
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the sum, in two's complement.
    first = (a * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255
    second = ((b * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255) << 8
    third = ((c * inverse + 12582912.0).to(tl.int32, bitcast=True) & 255) << 16
    fourth = (d * inverse + 12582912.0).to(tl.int32, bitcast=True) << 24
    return (first | second) | (third | fourth)


@triton.jit
def dot_bfloat16(a, b, acc):
    """acc + a @ b of bfloat16 operands, summed in float32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)
