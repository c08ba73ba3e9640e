"""Decode attention that rounds its result to int8 for the output product."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.decode_attention import fused_decode_attention
from ostinato.kernels.decode_attention.ref import fused_decode_attention_ref
from ostinato.kernels.decode_attention.triton import Tiling
from ostinato.kernels.decode_attention.triton import fused_decode_attention as kernel
from ostinato.kernels.rms_norm.ref import quantize_rows_ref

from .paged import fp8, inputs

CPU = torch.device("cpu")
CASES = [
    {"rows": 1, "heads": 4, "kv_heads": 1, "dim": 32, "rotary": 8, "norms": True},
    {"rows": 3, "heads": 6, "kv_heads": 2, "dim": 64, "rotary": 32, "page_size": 5},
    {"rows": 2, "heads": 3, "kv_heads": 1, "dim": 96, "rotary": 96, "page_size": 64},  # a program of 64 has 32 columns
]


def copied(given: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def cases(case: dict, device: torch.device, scaled: bool, gated: bool) -> tuple[dict, dict]:
    """Arguments over caches of random vectors, and the scales of those in FP8."""
    given = inputs(device, **case, max_position=44, gated=gated)
    if scaled:
        return fp8(given, filled=True)
    filled = {name: torch.randn_like(given[name]) for name in ("k_cache", "v_cache")}
    return given | filled, {"k_scale": None, "v_scale": None}


def assert_rounds(got: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor, tolerance: float) -> None:
    """Half a step of each group's scale, beside what the unrounded values may differ by."""
    x, scale = got
    assert (x.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (x.shape, scale.shape) == (expected.shape, (expected.shape[0], expected.shape[1] // 32))
    groups, wide = x.view(*scale.shape, 32), expected.view(*scale.shape, 32)
    torch.testing.assert_close(scale * 127, wide.abs().amax(-1), rtol=tolerance, atol=tolerance)
    assert (groups.int().abs().amax(-1) == torch.where(scale > 0, 127, 0)).all()
    error = (groups * scale[..., None] - wide).abs()
    assert (error <= scale[..., None] * 0.5 * (1 + 1e-5) + tolerance * (1 + wide.abs())).all()


@pytest.mark.parametrize(("splits", "columns", "own"), [(1, 64, False), (2, 16, False), (2, 64, True), (70, 32, True)])
@pytest.mark.parametrize("position", ["random", 0, 16, 44])
@pytest.mark.parametrize(("scaled", "gated"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_rounds_what_the_reference_attends(
    case: dict, scaled: bool, gated: bool, position: object, splits: int, columns: int, own: bool, device: torch.device
) -> None:
    """With one program at work, some or all; with fewer programs than tiles, and so many that two warps join them.

    16 columns are raised to a whole group.
    """
    given, scales = cases(case, device, scaled, gated)
    if position != "random":
        given["positions"].fill_(position)
    again, again_scales = copied(given), copied(scales)
    expected, _ = fused_decode_attention_ref(*again.values(), 0.2, 0, 0.0, *again_scales.values(), gated)
    cut = Tiling(16, splits, 4, 1, columns, own)
    got = kernel(*given.values(), 0.2, 0, 0.0, True, *scales.values(), gated, True, cut)
    # Without FP8: sums of up to 45 products of numbers of size one, some 50 units of 2^-24. With it a key that falls to
    # another step of its format, 2^-3 of one of D numbers, moves its score a little.
    assert_rounds(got, expected, 2**-6 if scaled else 1e-5)
    assert torch.equal(given["v_cache"].view(torch.uint8), again["v_cache"].view(torch.uint8))


@pytest.mark.parametrize("attended", [(9, 0.0), (0, 2.0)], ids=str)
def test_kernel_with_a_window_or_a_cap(attended: tuple, device: torch.device) -> None:
    given, _ = cases(CASES[1], device, scaled=False, gated=False)
    expected, _ = fused_decode_attention_ref(*copied(given).values(), 0.2, *attended)
    got = kernel(*given.values(), 0.2, *attended, True, rounded=True, tiling=Tiling(16, 2, 4, 1))
    assert_rounds(got, expected, 1e-5)


@pytest.mark.parametrize(("splits", "own"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("idle", [[1], [0, 1, 2]], ids=str)
def test_a_row_without_a_position_is_left_out(idle: list[int], splits: int, own: bool, device: torch.device) -> None:
    """Its zeros come from no number of its own; no other row and nothing in the cache changes for it."""
    given, _ = cases(CASES[1], device, scaled=False, gated=True)
    given["positions"][idle] = -1
    given["qkv"][idle] = torch.nan
    others = [row for row in range(3) if row not in idle]
    again, before = copied(given), copied(given)
    got = kernel(*given.values(), 0.2, 0, 0.0, True, gated=True, rounded=True, tiling=Tiling(16, splits, 4, 1, own=own))
    public = fused_decode_attention(**again, scale=0.2, gated=True, rounded=True)
    alone = before | {name: before[name][others] for name in ("qkv", "positions", "slots")}
    for x, scale in (got, public):
        assert not x[idle].any()
        assert (scale[idle] == 0).all()
    if others:
        expected, _ = fused_decode_attention_ref(*alone.values(), 0.2, 0, 0.0, gated=True)
        for x, scale in (got, public):
            assert_rounds((x[others], scale[others]), expected, 1e-5)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name], alone[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(again[name], alone[name], rtol=0, atol=1e-5)


def test_groups_of_zeros_have_no_scale(device: torch.device) -> None:
    given, _ = cases(CASES[0], device, scaled=False, gated=False)
    given["positions"].zero_()  # the result is the value that came with the token
    given["qkv"][:, -32:] = 0.0
    for x, scale in (
        kernel(*copied(given).values(), 0.2, 0, 0.0, False, rounded=True, tiling=Tiling(16, 2, 4, 1)),
        fused_decode_attention(**given, scale=0.2, rounded=True),
    ):
        assert not x.any()
        assert (scale == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_rounds_the_float32_result(case: dict) -> None:
    given, _ = cases(case, CPU, scaled=False, gated=True)
    expected, _ = fused_decode_attention(**copied(given), scale=0.3, gated=True)
    x, scale = fused_decode_attention(**given, scale=0.3, gated=True, rounded=True)
    for found, value in zip((x, scale), quantize_rows_ref(expected), strict=True):
        assert torch.equal(found, value)


def test_refuses_what_it_does_not_take() -> None:
    with pytest.raises(KernelError, match="groups of 32 columns, which do not divide heads of 16"):
        fused_decode_attention(**inputs(CPU, 2, 4, 2, 16, 16), scale=1.0, rounded=True)
    with pytest.raises(KernelError, match="fused_decode_attention: 5 query heads"):
        fused_decode_attention(**inputs(CPU, 2, 5, 2, 32, 16), scale=1.0, rounded=True)


@pytest.mark.parametrize("rounded", [False, True])
def test_results_without_data_look_like_the_references(rounded: bool) -> None:
    given = inputs(CPU, 3, 6, 2, 32, 16, torch.bfloat16, gated=True)
    shapes = []
    for device in ("cpu", "meta"):
        there = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        results = fused_decode_attention(**there, scale=1.0, gated=True, rounded=rounded)
        shapes.append([(t.shape, t.dtype) for t in results])
    assert shapes[0] == shapes[1]


def test_traces_as_one_node() -> None:
    given = inputs(CPU, 3, 6, 2, 32, 16)
    torch.library.opcheck(
        torch.ops.ostinato.fused_decode_attention.default,
        (*given.values(), 1.0, 0, 0.0, False, None, None, False, True),
        test_utils=("test_schema", "test_faketensor"),
    )
