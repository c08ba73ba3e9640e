"""The experts of the largest logits of a token, found by the first warp of a program.

A warp holds the logits as integers in the same order, 32 apart in each lane, sorted within the lane. The largest of all
is the maximum over the lanes' first, one instruction, after which the lane that had it moves on to its next. This is
PTX since Triton can have neither a lane's own numbers nor one warp alone at work. Every thread of a program has to come
here, one element a thread: there is a barrier in it.

The lowest bits of these integers are the expert's number: of logits that differ by less than 2^-15 of themselves (for
256 experts) the lower expert comes first, as of equal ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.triton import INTERPRETED, nothing

LEAST = tl.constexpr(-(2**31))


@triton.constexpr_function
def _sorting_network(n: int) -> list[tuple[int, int]]:
    """Pairs to put in order, one after the other: Batcher's odd-even merge sort of n = 2^i values."""
    pairs = []
    size = 1
    while size < n:
        step = size
        while step:
            for start in range(step % size, n - step, 2 * step):
                for i in range(start, min(start + step, n - step)):
                    if i // (2 * size) == (i + step) // (2 * size):
                        pairs.append((i, i + step))
            step //= 2
        size *= 2
    return pairs


@triton.constexpr_function
def _choice(padded: int, count: int, nth: bool) -> str:
    """PTX of the experts of the ``count`` largest of up to ``padded`` logits, or of the nth alone.

    Operands: the results, the logits' address, the number of experts and, for one result, its place from 0. The first
    warp finds all of them, the others read them in shared memory: the arithmetic of every warp would take as long as
    there are warps.
    """
    lists = padded // 32
    logits, number, place = (f"${i + (1 if nth else count)}" for i in range(3))
    lines = [
        f".shared .align 16 .b32 found[{-count % 4 + count}];",
        f".reg .b32 lane, last, t, key, k<{lists}>;",
        f".reg .pred p, in<{lists}>;",
        ".reg .b64 at;",
        "mov.u32 lane, %tid.x;",
        "setp.ge.u32 p, lane, 32;",
        "@p bra OTHERS;",
        f"sub.u32 last, {number}, 1;",
        f"mad.wide.u32 at, lane, 4, {logits};",
    ]
    for i in range(lists):
        lines += [
            f"add.u32 t, lane, {32 * i};",
            f"setp.le.u32 in{i}, t, last;",
            f"mov.b32 k{i}, 0;",
            f"@in{i} ld.relaxed.gpu.global.b32 k{i}, [at + {128 * i}];",
        ]
    for i in range(lists):  # integers in the order of floats, each unique: the expert's complement in the lowest bits
        lines += [
            f"shr.s32 t, k{i}, 31;",
            "and.b32 t, t, 0x7fffffff;",
            f"xor.b32 k{i}, k{i}, t;",
            f"and.b32 k{i}, k{i}, {-padded};",
            f"sub.u32 t, {padded - 1 - 32 * i}, lane;",
            f"or.b32 k{i}, k{i}, t;",
            f"selp.b32 k{i}, k{i}, {LEAST.value}, in{i};",
        ]
    for low, upp in _sorting_network(lists):
        lines += [f"max.s32 t, k{low}, k{upp};", f"min.s32 k{upp}, k{low}, k{upp};", f"mov.b32 k{low}, t;"]
    for turn in range(count):
        lines += [
            "redux.sync.max.s32 key, k0, 0xffffffff;",
            "not.b32 t, key;",
            f"and.b32 t, t, {padded - 1};",
            "min.u32 t, t, last;",  # NaNs among the logits lead to some expert, never to none
            f"st.shared.b32 [found + {4 * turn}], t;",
            "setp.eq.s32 p, k0, key;",
        ]
        for i in range(min(lists, count - 1 - turn)):
            lines.append(f"selp.b32 k{i}, {f'k{i + 1}' if i + 1 < lists else LEAST.value}, k{i}, p;")
    lines += ["OTHERS:", "bar.sync 0;"]
    if nth:
        lines += ["mov.u32 t, found;", f"mad.lo.u32 t, {place}, 4, t;", "ld.shared.b32 $0, [t];"]
    else:
        lines += [f"ld.shared.b32 ${turn}, [found + {4 * turn}];" for turn in range(count)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _constraints(count: int, inputs: str) -> str:
    return ",".join(["=&r"] * count + [inputs])


@triton.constexpr_function
def _types(count: int) -> tuple[tl.dtype, ...]:
    return (tl.int32,) * count


@triton.jit
def _keys(logits, E, EP: tl.constexpr):
    """For the interpreter: the same integers [EP]."""
    e = tl.arange(0, EP)
    bits = tl.load(logits + tl.minimum(e, E - 1)).to(tl.int32, bitcast=True)
    return tl.where(e < E, ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) & -EP) | (EP - 1 - e), LEAST)


@triton.jit
def largest(logits, E, EP: tl.constexpr, COUNT: tl.constexpr):
    """The experts of the COUNT largest of E logits, float32, from the largest on: a tuple of int32 numbers.

    EP: a power of two from E and from 32. Logits are read from the L2 cache, where any earlier kernel's writes are.
    """
    if INTERPRETED:
        keys = _keys(logits, E, EP)
        experts = nothing()
        for _ in tl.static_range(COUNT):
            key = tl.max(keys, 0)
            experts += (tl.minimum(EP - 1 - (key & (EP - 1)), E - 1),)
            keys = tl.where(keys == key, LEAST, keys)
        return experts
    else:
        return tl.inline_asm_elementwise(
            _choice(EP, COUNT, False), _constraints(COUNT, "l,r"), [logits, E], dtype=_types(COUNT), is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def nth_largest(logits, n, E, EP: tl.constexpr, COUNT: tl.constexpr):
    """Of the tuple ``largest``, what stands at each n, an int32 tensor of numbers below COUNT."""
    if INTERPRETED:
        keys = _keys(logits, E, EP)
        found = n * 0
        for i in tl.static_range(COUNT):
            key = tl.max(keys, 0)
            found = tl.where(n == i, tl.minimum(EP - 1 - (key & (EP - 1)), E - 1), found)
            keys = tl.where(keys == key, LEAST, keys)
        return found
    else:
        return tl.inline_asm_elementwise(
            _choice(EP, COUNT, True), _constraints(1, "l,r,r"), [logits, E, n], dtype=tl.int32, is_pure=False, pack=1
        )
