"""Attention with an output gate and with caches in float8_e4m3fn, in both ops and the append."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.decode_attention import decode_attention, fused_decode_attention
from ostinato.kernels.decode_attention.ref import decode_attention_ref, fused_decode_attention_ref
from ostinato.kernels.decode_attention.triton import Tiling
from ostinato.kernels.decode_attention.triton import decode_attention as decode_kernel
from ostinato.kernels.decode_attention.triton import fused_decode_attention as fused_kernel
from ostinato.kernels.prefill_attention import prefill_attention
from ostinato.kernels.prefill_attention.ref import prefill_attention_ref
from ostinato.kernels.prefill_attention.triton import prefill_attention as prefill_kernel
from ostinato.kernels.rope import rope_append
from ostinato.kernels.rope.ref import FP8, quantize_fp8, rope_append_ref
from ostinato.kernels.rope.triton import rope_append as append_kernel

from .paged import cached, fp8, inputs

CPU = torch.device("cpu")
# Sums of up to 48 products of numbers of size one; the largest value is below 4, so this is some 50 units of 2^-24.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
CASES = [
    {"rows": 1, "heads": 4, "kv_heads": 1, "dim": 16, "rotary": 8, "norms": True},
    {"rows": 3, "heads": 6, "kv_heads": 2, "dim": 32, "rotary": 32, "page_size": 5, "max_position": 33},
]


def copied(given: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def randomized(given: dict) -> dict:
    return given | {name: torch.randn_like(given[name]) for name in ("k_cache", "v_cache")}


def test_fp8_keeps_four_significant_bits_of_every_vector() -> None:
    x = torch.randn(7, 5, 33) * torch.logspace(-6, 6, 7)[:, None, None]
    x[3, 2] = 0.0
    stored, scale = quantize_fp8(x)
    assert stored.dtype == FP8
    assert scale.shape == (7, 5)
    back = stored.float() * scale[..., None]
    largest = x.abs().amax(-1, keepdim=True)
    # Half of the last of four bits of a value (2^-4), or of the subnormals' spacing: largest / 448 * 2^-9 / 2.
    assert ((back - x).abs() <= x.abs() * 2**-4 * (1 + 1e-6) + largest / 448 * 2**-10).all()
    assert (back[3, 2] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gate_multiplies_the_result_by_its_sigmoid(case: dict) -> None:
    given = randomized(inputs(CPU, **case, gated=True))
    num_gates = given["num_heads"] * case["dim"]
    plain = copied(given) | {"qkv": given["qkv"][:, :-num_gates].contiguous()}
    expected = fused_decode_attention(**plain, scale=0.3)[0] * torch.sigmoid(given["qkv"][:, -num_gates:])
    torch.testing.assert_close(fused_decode_attention(**given, scale=0.3, gated=True)[0], expected, **FLOAT32)
    assert torch.equal(given["k_cache"], plain["k_cache"])
    assert torch.equal(given["v_cache"], plain["v_cache"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_append_skips_the_gates(case: dict) -> None:
    given = inputs(CPU, **case, gated=True)
    plain = copied(given) | {"qkv": given["qkv"][:, : -given["num_heads"] * case["dim"]].contiguous()}
    assert torch.equal(rope_append(**given, gated=True), rope_append(**plain))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name], plain[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_append_stores_what_quantize_fp8_makes(case: dict) -> None:
    wide = inputs(CPU, **case)
    given, scales = fp8(copied(wide))
    q = rope_append(**given, **scales)
    assert torch.equal(q, rope_append(**wide))
    for name in ("k", "v"):
        expected, scale = quantize_fp8(wide[f"{name}_cache"])
        written = scale.isfinite()
        assert written.sum() == case["rows"] * case["kv_heads"]
        assert torch.equal(scales[f"{name}_scale"].isfinite(), written)
        assert torch.equal(scales[f"{name}_scale"][written], scale[written])
        assert torch.equal(given[f"{name}_cache"][written].float(), expected[written].float())


def dequantized(given: dict, scales: dict) -> dict:
    return given | {f"{n}_cache": given[f"{n}_cache"].float() * scales[f"{n}_scale"][..., None] for n in ("k", "v")}


@pytest.mark.parametrize("window", [0, 9])
def test_decode_of_fp8_is_decode_of_what_it_stands_for(window: int) -> None:
    given, scales = fp8(cached(CPU, [0, 7, 8, 47], 6, 2, 32))
    expected = decode_attention(**dequantized(given, scales), scale=0.3, window=window)
    got = decode_attention(**given, scale=0.3, window=window, **scales)
    torch.testing.assert_close(got, expected, **FLOAT32)


@pytest.mark.parametrize(("first", "tokens"), [(0, 20), (13, 20), (47, 1)])
def test_prefill_of_fp8_with_a_gate(first: int, tokens: int) -> None:
    given, scales = fp8(cached(CPU, [first + tokens - 1, 3], 6, 2, 32))
    row = torch.randn(tokens, 1000)
    rows = {"slots": given["slots"][:1].repeat(tokens), "positions": torch.arange(first, first + tokens).int()}
    given |= {"q": torch.randn(tokens, 6, 32), **rows}
    gate = row[:, 11 : 11 + 6 * 32]
    expected = prefill_attention(**dequantized(given, scales), scale=0.3) * torch.sigmoid(gate)
    torch.testing.assert_close(prefill_attention(**given, scale=0.3, **scales, gate=gate), expected, **FLOAT32)


def test_fused_decode_attends_to_what_it_stored() -> None:
    given, scales = fp8(inputs(CPU, **CASES[1], gated=True), filled=True)
    again, again_scales = copied(given), copied(scales)
    got, _ = fused_decode_attention(**given, scale=0.3, gated=True, **scales)
    q = rope_append(**again, gated=True, **again_scales)
    read = [again[name] for name in ("k_cache", "v_cache", "page_table", "slots", "positions")]
    expected = decode_attention(q, *read, scale=0.3, **again_scales) * torch.sigmoid(given["qkv"][:, -6 * 32 :])
    torch.testing.assert_close(got, expected, **FLOAT32)


def same_caches(given: dict, scales: dict, again: dict, again_scales: dict) -> None:
    """V bit for bit; a key, whose norm and rotation may round otherwise, to one step of its format."""
    assert torch.equal(given["v_cache"].view(torch.uint8), again["v_cache"].view(torch.uint8))
    assert torch.equal(scales["v_scale"].nan_to_num(), again_scales["v_scale"].nan_to_num())
    torch.testing.assert_close(scales["k_scale"], again_scales["k_scale"], rtol=1e-5, atol=0, equal_nan=True)
    got, expected = given["k_cache"].float(), again["k_cache"].float()
    torch.testing.assert_close(got, expected, rtol=2**-3, atol=2**-9, equal_nan=True)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_append_kernel_equals_reference(case: dict, scaled: bool, device: torch.device) -> None:
    given = inputs(device, **case, gated=True)
    if not scaled:
        again = copied(given)
        torch.testing.assert_close(
            append_kernel(*given.values(), gated=True), rope_append_ref(*again.values(), gated=True), **FLOAT32
        )
        torch.testing.assert_close(given["v_cache"], again["v_cache"], rtol=0, atol=0, equal_nan=True)
        return
    given, scales = fp8(given)
    again, again_scales = copied(given), copied(scales)
    got = append_kernel(*given.values(), *scales.values(), True)
    torch.testing.assert_close(got, rope_append_ref(*again.values(), *again_scales.values(), True), **FLOAT32)
    same_caches(given, scales, again, again_scales)


def test_append_kernel_rounds_like_the_reference_at_every_magnitude(device: torch.device) -> None:
    given = inputs(device, 4, 1, 2, 64, 2, max_position=40)
    given["qkv"] *= torch.logspace(-8, 3, given["qkv"].shape[1], device=device)  # most fall into the subnormals
    given["qkv"][0, -64:] = 0.0
    given, scales = fp8(given)
    again, again_scales = copied(given), copied(scales)
    append_kernel(*given.values(), *scales.values())
    rope_append_ref(*again.values(), *again_scales.values())
    same_caches(given, scales, again, again_scales)


@pytest.mark.parametrize("attended", [(0, 0.0), (9, 0.0), (16, 3.0)], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 6])
def test_decode_kernel_equals_reference_over_fp8(splits: int, attended: tuple, device: torch.device) -> None:
    given, scales = fp8(cached(device, [0, 7, 16, 47], 6, 2, 32))
    expected = decode_attention_ref(*given.values(), 0.3, *attended, *scales.values())
    got = decode_kernel(*given.values(), 0.3, *attended, False, *scales.values(), tiling=Tiling(16, splits, 4, 1))
    torch.testing.assert_close(got, expected, **FLOAT32)


@pytest.mark.parametrize("position", ["random", 0, 15, 16, 33])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("scaled", "gated"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_kernel_equals_reference(
    case: dict, scaled: bool, gated: bool, own: bool, position: object, device: torch.device
) -> None:
    case = case | {"max_position": 34}
    given, scales = fp8(inputs(device, **case, gated=gated), filled=True)
    if not scaled:
        given, scales = dequantized(given, scales), {"k_scale": None, "v_scale": None}
    if position != "random":
        given["positions"].fill_(position)
    again, again_scales = copied(given), copied(scales)
    expected, _ = fused_decode_attention_ref(*again.values(), 0.2, 0, 0.0, *again_scales.values(), gated)
    cut = Tiling(16, 2, 4, 1, own=own)
    got, _ = fused_kernel(*given.values(), 0.2, 0, 0.0, True, *scales.values(), gated, tiling=cut)
    if scaled:
        same_caches(given, scales, again, again_scales)
        # A key that falls to another step of its format, 2^-3 of one of D numbers, moves its score a little.
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)
    else:
        torch.testing.assert_close(got, expected, **FLOAT32)


@pytest.mark.parametrize("attended", [(0, 0.0), (7, 0.0), (16, 2.0)], ids=str)
@pytest.mark.parametrize(("first", "tokens"), [(0, 37), (13, 20), (47, 1)])
def test_prefill_kernel_equals_reference(first: int, tokens: int, attended: tuple, device: torch.device) -> None:
    given, scales = fp8(cached(device, [first + tokens - 1, 3], 6, 2, 32))
    rows = {
        "slots": given["slots"][:1].repeat(tokens),
        "positions": torch.arange(first, first + tokens, dtype=torch.int32, device=device),
    }
    given |= {"q": torch.randn(tokens, 6, 32, device=device), **rows}
    gate = torch.randn(tokens, 1000, device=device)[:, 11 : 11 + 6 * 32]
    plain = dequantized(given, scales)
    for caches, extra in ((given, (*scales.values(), gate)), (plain, (None, None, gate))):
        got = prefill_kernel(*caches.values(), 0.3, *attended, *extra, blocks=(16, 16, 4, 1))
        expected = prefill_attention_ref(*caches.values(), 0.3, *attended, *extra)
        torch.testing.assert_close(got, expected, **FLOAT32)


def test_half_precision_over_fp8_is_as_good_as_its_rounding(device: torch.device) -> None:
    given, scales = fp8(cached(device, [40, 7], 6, 2, 32))
    given["q"] = given["q"].half()
    expected = decode_attention_ref(given["q"].float(), *list(given.values())[1:], 0.3, 0, 0.0, *scales.values())
    got = decode_kernel(*given.values(), 0.3, 0, 0.0, False, *scales.values(), tiling=Tiling(16, 2, 4, 1))
    # Rounded results and probabilities, 2^-11 each of sums below 4.
    torch.testing.assert_close(got.float(), expected, rtol=2**-10, atol=2**-9)


def test_refuses_scales_that_do_not_fit() -> None:
    plain = cached(CPU, [4, 7], 6, 2, 32) | {"scale": 1.0}
    given, scales = fp8(plain)
    for change, message in (
        (given, "with caches of torch.float8_e4m3fn and only with them"),
        (plain | scales, "only with them, got caches of torch.float32 with it"),
        (given | scales | {"v_scale": scales["v_scale"].half()}, "v_scale contiguous float32"),
        (given | scales | {"k_scale": scales["k_scale"][:1]}, "k_scale contiguous float32"),
    ):
        with pytest.raises(KernelError, match=message):
            decode_attention(**change)
        with pytest.raises(KernelError, match=message):
            prefill_attention(**change)


def test_refuses_odd_heads_in_fp8() -> None:
    given, scales = fp8(cached(CPU, [4], 1, 1, 5))
    with pytest.raises(KernelError, match="heads of an even size"):
        decode_attention(**given, scale=1.0, **scales)


def test_refuses_a_row_or_a_gate_of_another_width() -> None:
    given = inputs(CPU, 2, 6, 2, 16, 16, gated=True)
    with pytest.raises(KernelError, match=r"takes qkv \[M, 160\]"):
        fused_decode_attention(**given, scale=1.0)
    with pytest.raises(KernelError, match="and 6 gates"):
        rope_append(**inputs(CPU, 2, 6, 2, 16, 16), gated=True)
    with pytest.raises(KernelError, match="takes a gate"):
        prefill_attention(**cached(CPU, [4, 7], 6, 2, 32), scale=1.0, gate=torch.zeros(2, 10))


def test_traces_as_one_node() -> None:
    """The registered ops have fake implementations with the shapes of the real ones."""
    given, scales = fp8(inputs(CPU, 3, 6, 2, 16, 16, gated=True), filled=True)
    torch.library.opcheck(
        torch.ops.ostinato.fused_decode_attention.default,
        (*given.values(), 1.0, 0, 0.0, False, *scales.values(), True, False),
        test_utils="test_faketensor",  # PyTorch's test of schemas cannot compare float8 tensors
    )
