"""Where the compiler puts the operands of the tensor-core instructions in the products of lists of picks."""

import pytest

from .layouts import assert_lane_4r_j_holds_index_r_j

COMMON = {"order": "*i32", "blocks": "*i32", "words": "*i32", "d": "*fp16", "m": "*fp16", "act_scales": "*fp32"}
NUMBERS = {"M": "i32", "E": "i32", "NUM_SHARED": "i32"}
TYPES = {
    "_gate_up_mma_kernel": {**COMMON, "x_words": "*i32", "x_scales": "*fp32", "roots": "*fp32", "act": "*i8"},
    "_down_mma_kernel": {**COMMON, "act_words": "*i32", "weights": "*fp32", "parts": "*fp32"},
}
SIZES = {"F": 512, "PICKS": 9, "PDL": True}


@pytest.mark.parametrize(
    ("name", "constants", "warps", "groups"),
    [
        ("_gate_up_mma_kernel", {"K": 2048, "RT": 1}, 8, 8),  # of two matrices two groups in a loop and two behind it
        ("_gate_up_mma_kernel", {"K": 384, "RT": 2}, 4, 4),
        ("_down_mma_kernel", {"H": 2048, "RT": 2, "WARPS": 4, "DEPTH": 4}, 4, 4),
    ],
)
def test_lane_4r_j_of_a_warp_holds_index_r_j(name, constants, warps, groups):
    assert_lane_4r_j_holds_index_r_j(
        "ostinato.kernels.moe.lists.triton", name, {**TYPES[name], **NUMBERS}, {**SIZES, **constants}, tuple(NUMBERS),
        warps, 4 * groups,
    )  # fmt: skip
