"""Where the compiler puts the operands of the tensor-core instructions in block_linear's wide product."""

import pytest

from .layouts import assert_lane_4r_j_holds_index_r_j

POINTERS = {"x": "*i32", "factors": "*i32", "words": "*i32", "high": "*i32", "d": "*i16", "m": "*i16"}
POINTERS |= {"bias": "*fp16", "residual": "*fp32", "out": "*fp32"}


@pytest.mark.parametrize(
    ("kind", "right", "down", "count", "warps", "gate", "instructions"),
    [
        ((4, 128, 0, 1), 1, 1, 4, 4, None, 16),
        ((4, 128, 0, 1), 2, 2, 1, 2, "silu", 8),
        ((6, 64, 32, 0), 2, 2, 2, 1, None, 4),
    ],
)
def test_lane_4r_j_of_a_warp_holds_index_r_j(kind, right, down, count, warps, gate, instructions):
    bits, span, offset, sign = kind
    constants = {"K": 2048, "BITS": bits, "SPAN": span, "OFFSET": offset, "MIN_SIGN": sign, "RT": right, "TT": down}
    constants |= {"COUNT": count, "WARPS": warps, "BIAS": False, "RESIDUAL": False, "GATE": gate, "PDL": True}
    assert_lane_4r_j_holds_index_r_j(
        "ostinato.kernels.block_linear.wide.triton", "_wide_kernel", {**POINTERS, "M": "i32", "N": "i32"}, constants,
        ("M",), warps, instructions,
    )  # fmt: skip
