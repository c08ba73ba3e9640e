"""Four-bit weights to bfloat16 in registers, without conversions from integers."""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.kernels.triton import INTERPRETED


@triton.jit
def spread(scale, SHAPE: tl.constexpr):
    """A value of each group, [BN, NG], for each of its 16 bytes: SHAPE is [BN, NG * 16]."""
    return tl.reshape(tl.broadcast_to(scale[:, :, None], (scale.shape[0], scale.shape[1], 16)), SHAPE)


@triton.jit
def unpack(packed, scale, summand, upper, upper_summand):
    """The weights of packed [BN, NG * 16] nibble pairs, low nibbles then high ones: bfloat16 of the same shape.

    0x4300 | q is the bfloat16 128 + q, and with 16 zero bits below it the float32: no conversion from integers.
    """
    shape: tl.constexpr = packed.shape
    if INTERPRETED:
        q = packed.to(tl.int32)
        low = (q & 15).to(tl.float32) * spread(scale, shape) + spread(summand, shape)
        high = (q >> 4).to(tl.float32) * spread(upper, shape) + spread(upper_summand, shape)
        return low.to(tl.bfloat16), high.to(tl.bfloat16)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, p, q, r, s;
            .reg .f32 e, f;
            prmt.b32 a, $4, 0x43434343, 0x4140;
            prmt.b32 b, $4, 0x43434343, 0x4342;
            and.b32 p, a, 0xff0fff0f;
            and.b32 q, b, 0xff0fff0f;
            shr.u32 r, a, 4;
            shr.u32 s, b, 4;
            lop3.b32 r, r, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 s, s, 0x000f000f, 0x43004300, 0xea;
            shl.b32 a, p, 16;
            and.b32 b, p, 0xffff0000;
            fma.rn.f32 e, a, $5, $9;
            fma.rn.f32 f, b, $5, $9;
            cvt.rn.bf16x2.f32 $0, f, e;
            shl.b32 a, q, 16;
            and.b32 b, q, 0xffff0000;
            fma.rn.f32 e, a, $5, $9;
            fma.rn.f32 f, b, $5, $9;
            cvt.rn.bf16x2.f32 $1, f, e;
            shl.b32 a, r, 16;
            and.b32 b, r, 0xffff0000;
            fma.rn.f32 e, a, $13, $17;
            fma.rn.f32 f, b, $13, $17;
            cvt.rn.bf16x2.f32 $2, f, e;
            shl.b32 a, s, 16;
            and.b32 b, s, 0xffff0000;
            fma.rn.f32 e, a, $13, $17;
            fma.rn.f32 f, b, $13, $17;
            cvt.rn.bf16x2.f32 $3, f, e;
            }""",
            "=&r,=&r,=&r,=&r,r,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
            [
                packed,
                spread(scale, shape),
                spread(summand - 128.0 * scale, shape),
                spread(upper, shape),
                spread(upper_summand - 128.0 * upper, shape),
            ],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def in_order(low, high):
    """Columns 0 … 15 and 16 … 31 of each 32, [BN, NG * 16] each, as one tile [BN, NG * 32]; nothing leaves a thread."""
    NG: tl.constexpr = low.shape[1] // 16
    four: tl.constexpr = (low.shape[0], NG, 16, 2)
    both = tl.reshape(tl.join(low, high), four)
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (low.shape[0], NG * 32))
