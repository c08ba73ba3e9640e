"""The wide product of block_linear against plain PyTorch, at tiny and odd shapes."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear import eights_linear, prefers_eights
from ostinato.kernels.block_linear.eights import by_eights, from_eights
from ostinato.kernels.block_linear.ref import block_linear_int8_ref, block_linear_ref, eights_linear_ref
from ostinato.kernels.registry import load
from ostinato.kernels.tuning import Tiles
from ostinato.quant.blocks import KINDS, dequantize

from .block_weights import operands, random_weight

WIDE = ["I4_64", "I4_128", "I6_64"]
TILES = {
    "one step": Tiles("wide", rows=16, groups=4, tokens=8, warps=2),
    "several steps": Tiles("wide", rows=16, groups=1, tokens=8, warps=1),
    "masked": Tiles("wide", rows=32, groups=2, tokens=16, warps=2),
}


def launch(x, weight, tiles, norm=None, eps=0.0, bias=None, residual=None, gated=None, out_dtype=torch.float32):
    kernel = load("ostinato.kernels.block_linear.triton:block_linear")
    return kernel(x, *operands(weight), norm, eps, bias, residual, gated, out_dtype, tiles)


def grid_rows(m, k, group, device):
    """Rows that int8 keeps exactly: integers with a 127 in each group, times a power of two for each group."""
    x = torch.randint(-126, 127, (m, k // group, group), device=device).float()
    x[:, :, 5] = 127
    return (x * torch.tensor([0.5, 0.25, 2.0], device=device)[torch.arange(k // group) % 3][:, None]).flatten(1)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 7, 128), (3, 40, 384), (13, 17, 256)])
@pytest.mark.parametrize("kind", WIDE)
def test_product_is_exact_for_activations_on_the_grid(kind, m, n, k, tiles, device):
    weight = random_weight(kind, n, k, device)
    x = grid_rows(m, k, KINDS[kind].group, device)
    found = launch(x, weight, tiles)
    # Float32 sums of scaled spans in another order: a few roundings of at most the sum of magnitudes.
    bound = float((x.abs() @ dequantize(weight).abs().T).max())
    torch.testing.assert_close(found, block_linear_ref(x, weight), rtol=0, atol=(k / 32 + 16) * 2.0**-22 * bound)


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_activations_are_rounded_with_one_scale_a_span(kind, tiles, device):
    weight = random_weight(kind, 19, 384, device)
    x = torch.randn(5, 384, device=device) * 3
    found = launch(x, weight, tiles)
    group = KINDS[kind].group
    expected = block_linear_int8_ref(x, weight, group=group)
    # At most one of a row's 384 activations may lie so close to a tie that it rounds the other way: one step of int8.
    step = (x.abs().view(5, -1, group).amax(-1) / 127).max() * dequantize(weight).abs().max()
    assert (found - expected).abs().max() <= step
    assert (found - expected).abs().median() < 1e-5
    exact = block_linear_ref(x, weight)
    assert (expected - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_norm_bias_and_residual_are_fused(tiles, x_dtype, device):
    weight = random_weight("I4_128", 21, 384, device)
    x = (torch.randn(9, 400, device=device) * 5).to(x_dtype)[:, 8:392]
    norm = torch.rand(384, device=device) + 0.5
    bias = torch.randn(21, device=device).bfloat16()
    residual = torch.randn(9, 21, device=device)
    before = residual.clone()
    found = launch(x, weight, tiles, norm=norm, eps=1e-5, bias=bias, residual=residual)
    expected = block_linear_int8_ref(x, weight, norm=norm, eps=1e-5, bias=bias, residual=residual, group=128)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("gated", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tiles", [TILES["one step"], TILES["masked"]], ids=["one step", "masked"])
def test_gate_and_up_are_multiplied(tiles, gated, kind, device):
    weight = random_weight(kind, 42, 256, device)
    x = torch.randn(3, 256, device=device) * 4
    bias = torch.randn(42, device=device)
    found = launch(x, weight, tiles, gated=gated, bias=bias, out_dtype=torch.bfloat16)
    expected = block_linear_int8_ref(x, weight, gated=gated, bias=bias, group=KINDS[kind].group)
    assert found.shape == (3, 21)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=5e-3)  # bfloat16, and a tie or two


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_rows_by_eight_come_back(rows):
    x = torch.randint(-127, 128, (rows, 384), dtype=torch.int8)
    scale = torch.rand(rows, 3)
    by_eight, factors = by_eights(x, scale)
    assert by_eight.shape == (-(-rows // 8), 3, 1024)
    plain, back = from_eights(by_eight, factors, rows)
    assert torch.equal(plain, x)
    assert torch.equal(back, scale)
    assert torch.equal(factors[0, 1, 0, 1], x[0, 128:256].sum().float())


@pytest.mark.parametrize("tiles", [None, *TILES.values()], ids=["rule", *TILES])
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_rows_that_are_rounded_by_eight_already(rows, tiles, device):
    weight = random_weight("I4_128", 19, 384, device)
    x = torch.randint(-127, 128, (rows, 384), dtype=torch.int8)
    given = [t.to(device) for t in by_eights(x, torch.rand(rows, 3) * 0.02)]
    residual = torch.randn(rows, 19, device=device)
    kernel = load("ostinato.kernels.block_linear.triton:eights_linear")
    found = kernel(*given, weight.words, weight.d, weight.m, "I4_128", rows, residual, tiles)
    expected = eights_linear_ref(*given, weight, rows, residual)
    # Float32 sums of scaled spans in another order, as above.
    wide = (x.to(device).abs().float() * 0.02) @ dequantize(weight).abs().T
    torch.testing.assert_close(found, expected, rtol=0, atol=(384 / 32 + 16) * 2.0**-22 * float(wide.max()) + 1e-6)


def test_rows_by_eight_that_do_not_fit_are_refused():
    cpu = torch.device("cpu")
    weight = random_weight("I4_128", 6, 256, cpu)
    x, factors = by_eights(torch.ones(3, 256, dtype=torch.int8), torch.ones(3, 2))
    assert eights_linear(x, factors, weight, rows=3).shape == (3, 6)
    for change, said in (
        ({"weight": random_weight("I4_64", 6, 256, cpu)}, "in groups of 128, got I4_64"),
        ({"rows": 9}, r"x \[2, 2, 1024\]"),
        ({"factors": factors.half()}, "float16"),
        ({"residual": torch.zeros(2, 6)}, r"residual \[3, 6\]"),
    ):
        with pytest.raises(KernelError, match=said) as caught:
            eights_linear(**{"x": x, "factors": factors, "weight": weight, "rows": 3, **change})
        assert "\n" not in str(caught.value)
    assert not prefers_eights(weight, 8)
