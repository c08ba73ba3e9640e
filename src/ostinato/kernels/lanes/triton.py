"""Sums over the lanes and warps of a program, by hand.

Triton's reductions exchange whole tensors, with a barrier or more wherever threads of several warps meet, and five
shuffles for each sum of a warp. A barrier and its way through shared memory take some 50 ns, in kernels of two
microseconds. Here a program of one token says which lane has what: every tensor has one element a thread, in the order
of the threads, and a function names the lanes that it meets by a mask: 1 is the neighbour, 16 the other half warp.
Sums of several rows are taken together: at each mask a lane gives half of its rows away and keeps the other half, so
that R sums of 32 lanes take about R + 5 shuffles, and each lane ends with one of them.

All of it is PTX, since Triton does not show its lanes; the interpreter has the same on the flat tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.triton import INTERPRETED, nothing


@triton.jit
def _of_pairs(x, MASK: tl.constexpr, MAXIMUM: tl.constexpr):
    """For the interpreter: sum or maximum of each two elements MASK apart, in both places."""
    SIZE: tl.constexpr = x.numel
    pairs = tl.reshape(x, (SIZE // (2 * MASK), 2, MASK))
    found = (tl.max(pairs, 1) if MAXIMUM else tl.sum(pairs, 1))[:, None, :]
    return tl.reshape(tl.broadcast_to(found, pairs.shape), x.shape)


@triton.jit
def _with_other(x, MASK: tl.constexpr, OP: tl.constexpr):
    return tl.inline_asm_elementwise(
        f"{{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, {MASK}, 31, 0xffffffff; {OP}.f32 $0, $1, t; }}",
        "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def add_across(x, MASK: tl.constexpr):
    """x, float32, plus that of the lane whose number differs by MASK."""
    return _of_pairs(x, MASK, False) if INTERPRETED else _with_other(x, MASK, "add")


@triton.jit
def max_across(x, MASK: tl.constexpr):
    """The larger of x, float32, and that of the lane whose number differs by MASK."""
    return _of_pairs(x, MASK, True) if INTERPRETED else _with_other(x, MASK, "max")


@triton.jit
def of_lane(x, lane):
    """x, float32, of the lane of that number in the same warp, int32."""
    if INTERPRETED:
        SIZE: tl.constexpr = x.numel
        from_lane = tl.arange(0, SIZE) // 32 * 32 + tl.reshape(lane, (SIZE,))
        return tl.reshape(tl.gather(tl.reshape(x, (SIZE,)), from_lane, 0), x.shape)
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=f,f,r", [x, lane], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def fold(a, b, MASK: tl.constexpr):
    """Of each two lanes MASK apart the lower gets the sum of both a, the upper the sum of both b."""
    if INTERPRETED:
        SIZE: tl.constexpr = a.numel
        upper = tl.reshape(tl.arange(0, SIZE) // MASK % 2 == 1, a.shape)
        return tl.where(upper, _of_pairs(b, MASK, False), _of_pairs(a, MASK, False))
    else:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 l; .reg .f32 keep, give; .reg .pred p;
            mov.u32 l, %tid.x;
            and.b32 l, l, {MASK};
            setp.ne.u32 p, l, 0;
            selp.f32 keep, $2, $1, p;
            selp.f32 give, $1, $2, p;
            shfl.sync.bfly.b32 give, give, {MASK}, 31, 0xffffffff;
            add.f32 $0, keep, give;
            }}""",
            "=f,f,f", [a, b], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _fold_at(values, AT: tl.constexpr, HALF: tl.constexpr, MASK: tl.constexpr):
    return fold(values[AT], values[AT + HALF], MASK)


@triton.jit
def sum_rows(values, R: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr, SPAN: tl.constexpr):
    """COUNT tuples of R sums, one behind the other, each over lanes that differ in the bits from FIRST below SPAN.

    R: a power of two. Returns as many tuples of those sums that a lane keeps: ``row_of`` and the ones that follow it,
    R / (SPAN / FIRST) or at least one.
    """
    for level in tl.static_range(5):
        if FIRST << level < SPAN:
            found = nothing()
            if R >> (level + 1) > 0:
                for i in tl.static_range(COUNT):
                    for r in tl.static_range(R >> (level + 1)):
                        found += (_fold_at(values, (R >> level) * i + r, R >> (level + 1), FIRST << level),)
            else:
                for i in tl.static_range(COUNT):
                    found += (add_across(values[i], FIRST << level),)
            values = found
    return values


@triton.jit
def row_of(lane, R: tl.constexpr, FIRST: tl.constexpr, SPAN: tl.constexpr):
    """The first of R sums that a lane keeps of ``sum_rows``."""
    row = lane * 0
    for level in tl.static_range(5):
        if FIRST << level < SPAN and R >> (level + 1) > 0:
            row += (lane // (FIRST << level)) % 2 * (R >> (level + 1))
    return row


@triton.jit
def sum_lanes(x, FIRST: tl.constexpr, SPAN: tl.constexpr):
    """The sum over lanes that differ in the bits from FIRST below SPAN, in all of them."""
    for level in tl.static_range(5):
        if FIRST << level < SPAN:
            x = add_across(x, FIRST << level)
    return x


@triton.jit
def max_lanes(x, FIRST: tl.constexpr, SPAN: tl.constexpr):
    """The maximum over lanes that differ in the bits from FIRST below SPAN, in all of them."""
    for level in tl.static_range(5):
        if FIRST << level < SPAN:
            x = max_across(x, FIRST << level)
    return x


@triton.constexpr_function
def _share(writes: int, reads: int, size: int) -> str:
    lines = [
        f".shared .align 16 .b32 shared_values[{-size % 4 + size}];",
        ".reg .pred p;",
        ".reg .b32 base, at;",
        "mov.u32 base, shared_values;",
    ]
    for i in range(writes):
        value, place, when = (f"${reads + 3 * i + part}" for part in range(3))
        lines += [
            f"setp.ne.b32 p, {when}, 0;",
            f"mad.lo.u32 at, {place}, 4, base;",
            f"@p st.shared.f32 [at], {value};",
        ]
    lines.append("bar.sync 0;")
    for i in range(reads):
        lines += [f"mad.lo.u32 at, ${reads + 3 * writes + i}, 4, base;", f"ld.shared.f32 ${i}, [at];"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _share_constraints(writes: int, reads: int) -> str:
    return ",".join(["=&f"] * reads + ["f,r,r"] * writes + ["r"] * reads)


@triton.constexpr_function
def _floats(count: int) -> tuple[tl.dtype, ...] | tl.dtype:
    return (tl.float32,) * count if count > 1 else tl.float32


@triton.jit
def share(written, places, WRITES: tl.constexpr, READS: tl.constexpr, SIZE: tl.constexpr):
    """Values by way of shared memory, and the one barrier that this takes, for all threads of the program.

    written: WRITES times value, place and whether the thread writes it there, one behind the other. places: READS
    places to read at, at least two. A place is a number below SIZE, int32; no two threads write at one.
    """
    if INTERPRETED:
        PLACES: tl.constexpr = triton.next_power_of_2(SIZE)
        shared = tl.zeros((PLACES,), tl.float32)
        for i in tl.static_range(WRITES):
            at = tl.reshape(tl.where(written[3 * i + 2], written[3 * i + 1], -1), (written[3 * i].numel, 1))
            value = tl.reshape(written[3 * i], (written[3 * i].numel, 1))
            shared += tl.sum(tl.where(at == tl.arange(0, PLACES)[None, :], value, 0.0), 0)
        found = nothing()
        for i in tl.static_range(READS):
            at = tl.reshape(places[i], (places[i].numel,))
            found += (tl.reshape(tl.gather(shared, at, 0), places[i].shape),)
        return found
    else:
        operands = nothing()
        for i in tl.static_range(WRITES):
            operands += (written[3 * i], written[3 * i + 1], written[3 * i + 2].to(tl.int32))
        for i in tl.static_range(READS):
            operands += (places[i],)
        return tl.inline_asm_elementwise(
            _share(WRITES, READS, SIZE), _share_constraints(WRITES, READS), operands, dtype=_floats(READS),
            is_pure=False, pack=1,
        )  # fmt: skip
