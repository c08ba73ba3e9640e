"""Attention with an output gate and with caches in float8_e4m3fn, in both ops and the append."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.decode_attention import decode_attention, fused_decode_attention
from ostinato.kernels.prefill_attention import prefill_attention
from ostinato.kernels.rope import rope_append
from ostinato.kernels.rope.ref import FP8, quantize_fp8

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
    expected = fused_decode_attention(**plain, scale=0.3) * torch.sigmoid(given["qkv"][:, -num_gates:])
    torch.testing.assert_close(fused_decode_attention(**given, scale=0.3, gated=True), expected, **FLOAT32)
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
    got = fused_decode_attention(**given, scale=0.3, gated=True, **scales)
    q = rope_append(**again, gated=True, **again_scales)
    read = [again[name] for name in ("k_cache", "v_cache", "page_table", "slots", "positions")]
    expected = decode_attention(q, *read, scale=0.3, **again_scales) * torch.sigmoid(given["qkv"][:, -6 * 32 :])
    torch.testing.assert_close(got, expected, **FLOAT32)


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
        (*given.values(), 1.0, 0, 0.0, False, *scales.values(), True),
        test_utils="test_faketensor",  # PyTorch's test of schemas cannot compare float8 tensors
    )
