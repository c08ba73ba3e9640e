"""The kernels of block_linear against plain PyTorch, at tiny and odd shapes, for every kind of block."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear import block_linear, int8_linear, int8_linear_beside, prefers_int8
from ostinato.kernels.block_linear.ref import (
    block_linear_int8_ref,
    block_linear_ref,
    int8_linear_beside_ref,
    int8_linear_ref,
)
from ostinato.kernels.moe.ref import hand_down_ref
from ostinato.kernels.registry import load
from ostinato.kernels.rms_norm.ref import rms_norm_ref
from ostinato.kernels.tuning import Tiles
from ostinato.quant.blocks import KINDS, dequantize

from .block_weights import columns, grid_rows, operands, random_weight

MATVEC = {
    "resident": Tiles("resident", rows=4, groups=16, tokens=2, warps=1),
    "resident, several tiles": Tiles("resident", rows=2, groups=16, tokens=4, warps=1, repeats=3),
    "streamed": Tiles("streamed", rows=4, groups=8, tokens=2, warps=1),
    "streamed, masked": Tiles("streamed", rows=8, groups=4, tokens=4, warps=1),
    "mma": Tiles("mma", rows=16, groups=0, tokens=8, warps=2),
    "mma, several tiles": Tiles("mma", rows=32, groups=0, tokens=16, warps=4),
}
TILE = Tiles("tile", rows=16, groups=2, tokens=16, warps=1)


def launch(x, weight, tiles, norm=None, eps=0.0, bias=None, residual=None, gated=None, out_dtype=torch.float32):
    kernel = load("ostinato.kernels.block_linear.triton:block_linear")
    return kernel(x, *operands(weight), norm, eps, bias, residual, gated, out_dtype, tiles)


def activation_group(tiles: Tiles) -> int:
    """Columns of x that share a scale."""
    return 4 if tiles.path == "resident" else 32


def assert_sums_agree(found, expected, x, weight, gain=1.0):
    """Float32 sums of K products in different orders: K roundings of at most the sum of magnitudes, and a few more."""
    bound = (x.float().abs() @ dequantize(weight).abs().T).max() * gain
    tolerance = (x.shape[1] / 32 + 16) * 2.0**-24 * float(bound) * 4
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tiles", MATVEC.values(), ids=MATVEC)
@pytest.mark.parametrize("kind", KINDS)
def test_int8_product_is_exact_for_activations_on_the_grid(kind, tiles, device):
    k = columns(kind, 320)
    weight = random_weight(kind, 7, k, device)
    x = grid_rows(3, k, device)
    assert_sums_agree(launch(x, weight, tiles), block_linear_ref(x, weight), x, weight)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "I4_128"])
@pytest.mark.parametrize("tiles", MATVEC.values(), ids=MATVEC)
def test_int8_product_rounds_activations_as_its_model(kind, tiles, device):
    weight = random_weight(kind, 5, 512, device)
    x = torch.randn(3, 512, device=device) * 3
    found = launch(x, weight, tiles)
    group = activation_group(tiles)
    expected = block_linear_int8_ref(x, weight, group=group)
    # At most one of a row's 512 activations may lie so close to a tie that it rounds the other way: one step of int8.
    step = (x.abs().view(3, -1, group).amax(-1) / 127).max() * dequantize(weight).abs().max()
    assert (found - expected).abs().max() <= step
    assert (found - expected).abs().median() < 1e-5
    exact = block_linear_ref(x, weight)
    assert (expected - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("tiles", MATVEC.values(), ids=MATVEC)
def test_norm_bias_and_residual_are_fused(tiles, device):
    weight = random_weight("Q5_1", 6, 96, device)
    x = torch.randn(3, 96, device=device) * 5
    norm = torch.rand(96, device=device) + 0.5
    bias = torch.randn(6, device=device).bfloat16()
    residual = torch.randn(3, 6, device=device)
    before = residual.clone()
    found = launch(x, weight, tiles, norm=norm, eps=1e-5, bias=bias, residual=residual)
    group = activation_group(tiles)
    expected = block_linear_int8_ref(x, weight, norm=norm, eps=1e-5, bias=bias, residual=residual, group=group)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("gated", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tiles", [*MATVEC.values(), TILE], ids=[*MATVEC, "tile"])
def test_gate_and_up_are_multiplied(tiles, gated, device):
    weight = random_weight("Q4_K", 10, 256, device)
    x = torch.randn(3, 256, device=device) * 4
    bias = torch.randn(10, device=device)
    found = launch(x, weight, tiles, gated=gated, bias=bias)
    expected = block_linear_int8_ref(x, weight, gated=gated, bias=bias)
    assert found.shape == (3, 5)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_tile_kernel_multiplies_weights_rounded_to_bfloat16(kind, splits, device):
    k = columns(kind, 224)
    weight = random_weight(kind, 19, k, device)
    x = torch.randn(17, k, device=device).bfloat16()
    tiles = Tiles("tile", rows=16, groups=2, tokens=16, warps=1, splits=splits)
    expected = x.float() @ dequantize(weight, torch.bfloat16).float().T
    residual = torch.randn(17, 19, device=device)
    bias = torch.randn(19, device=device)
    found = launch(x, weight, tiles, bias=bias, residual=residual)
    if device.type == "cuda":
        assert_sums_agree(found, expected + bias + residual, x, weight, gain=2.0)
    else:  # the interpreter truncates to bfloat16 where a GPU rounds
        bound = float((x.float().abs() @ dequantize(weight).abs().T).max())
        torch.testing.assert_close(found, expected + bias + residual, rtol=0, atol=2**-7 * bound)


def test_tile_kernel_norms_as_it_multiplies(device):
    weight = random_weight("Q4_1", 36, 96, device)
    x = torch.randn(17, 96, device=device) * 5
    norm = torch.rand(96, device=device) + 0.5
    found = launch(x, weight, TILE, norm=norm, eps=1e-5, gated="silu")
    expected = block_linear_ref(x, weight, norm=norm, eps=1e-5, gated="silu")
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_x_may_be_strided_and_of_any_float(x_dtype, device):
    weight = random_weight("Q8_0", 5, 64, device)
    x = grid_rows(2, 128, device).to(x_dtype)[:, 32:96]
    found = launch(x, weight, MATVEC["resident"], out_dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, block_linear_ref(x, weight, out_dtype=torch.bfloat16), rtol=2**-7, atol=2**-10)


def test_tiles_of_the_rule_cover_every_shape(device):
    choose = load("ostinato.kernels.block_linear.triton:default_tiles")
    for n, k, m in ((7, 96, 1), (5, 2560, 3), (9, 4096, 8), (33, 64, 5), (20, 1024, 1), (6, 8192, 1)):
        weight = random_weight("Q4_0", n, k, device)
        x = grid_rows(m, k, device)
        tiles = choose(n, k, m, 4)
        assert_sums_agree(launch(x, weight, tiles), block_linear_ref(x, weight), x, weight)


def test_misfits_are_refused_in_one_line(device):
    weight = random_weight("Q4_0", 6, 64, device)
    x = torch.randn(2, 64, device=device)
    for arguments, said in (
        ({"x": x[:, :32]}, r"takes x \[M, 64\]"),
        ({"x": x.int()}, "of floats"),
        ({"x": x, "gated": "relu"}, "silu or gelu_tanh"),
        ({"x": x, "norm": torch.ones(32, device=device)}, r"float32 norm \[64\]"),
        ({"x": x, "bias": torch.ones(5, device=device)}, r"a bias \[6\]"),
        ({"x": x, "residual": torch.ones(2, 6, device=device).half()}, "float32 residual"),
        ({"x": x, "residual": torch.ones(2, 6, device=device), "gated": "silu"}, "not both"),
        ({"x": x, "bias": torch.ones(6, device="meta")}, "move them to one device"),
    ):
        with pytest.raises(KernelError, match=said) as caught:
            block_linear(weight=weight, **arguments)
        assert "\n" not in str(caught.value)


def test_public_op_on_the_cpu_is_the_reference():
    cpu = torch.device("cpu")
    weight = random_weight("Q3_K", 6, 256, cpu)
    x, norm = torch.randn(2, 256), torch.rand(256)
    assert torch.equal(
        block_linear(x, weight, norm=norm, eps=1e-6, gated="silu"),
        block_linear_ref(x, weight, norm=norm, eps=1e-6, gated="silu"),
    )


INT8 = {
    "one step": Tiles("streamed", rows=4, groups=16, tokens=1, warps=1),
    "several steps and rows": Tiles("streamed", rows=8, groups=4, tokens=2, warps=1),
}


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("tiles", INT8.values(), ids=INT8)
@pytest.mark.parametrize("kind", ["I4_128", "Q4_K", "Q6_K", "Q8_0"])
def test_int8_rows_are_multiplied_as_they_are(kind, tiles, heads, device):
    k = columns(kind, 384)
    weight = random_weight(kind, 10, k, device)
    x = torch.randint(-127, 128, (3, k), dtype=torch.int8, device=device)
    scale = torch.rand(3, k // 32, device=device) * 0.02
    squares = torch.rand(3, heads, 4, device=device) * 30 if heads and k % (32 * heads) == 0 else None
    residual = torch.randn(3, 10, device=device)
    kernel = load("ostinato.kernels.block_linear.triton:int8_linear")
    found = kernel(x, scale, *operands(weight), squares, 1e-5, residual, torch.float32, tiles)
    expected = int8_linear_ref(x, scale, weight, squares, 1e-5, residual, torch.float32)
    wide = (x.float() * scale.repeat_interleave(32, dim=1)) * (1 if squares is None else 30)
    assert_sums_agree(found, expected, wide, weight)
    torch.testing.assert_close(int8_linear(x, scale, weight, squares=squares, eps=1e-5, residual=residual), expected)


@pytest.mark.parametrize("parts", [0, 1, 7])
@pytest.mark.parametrize("tiles", INT8.values(), ids=INT8)
@pytest.mark.parametrize("kind", ["I4_128", "I6_64", "Q4_K", "Q5_1", "Q6_K", "Q8_0"])
def test_int8_rows_with_a_scale_for_16_columns(kind, tiles, parts, device):
    """Scales of a group's halves that differ by up to 100 times, sums of squares in any number of parts."""
    k = columns(kind, 384)
    weight = random_weight(kind, 10, k, device)
    x = torch.randint(-127, 128, (2, k), dtype=torch.int8, device=device)
    scale = 10.0 ** (-2 * torch.rand(2, k // 16, device=device))
    squares = torch.rand(2, 1, parts, device=device) * k if parts else None
    residual = torch.randn(2, 10, device=device) if parts else None
    kernel = load("ostinato.kernels.block_linear.triton:int8_linear")
    found = kernel(x, scale, *operands(weight), squares, 1e-5, residual, torch.float32, tiles)
    expected = int8_linear_ref(x, scale, weight, squares, 1e-5, residual, torch.float32)
    root = torch.ones(2, 1) if squares is None else torch.rsqrt(squares.sum(2) / k + 1e-5).cpu()
    wide = x.float() * scale.repeat_interleave(16, dim=1) * root.to(device)
    assert_sums_agree(found, expected, wide, weight)
    rounded = kernel(x, scale, *operands(weight), squares, 1e-5, None, torch.bfloat16, tiles)
    without = expected if residual is None else expected - residual
    assert rounded.dtype == torch.bfloat16
    # The interpreter cuts a float32 off where a GPU rounds it to bfloat16.
    torch.testing.assert_close(rounded.float(), without, rtol=2.0**-7, atol=1e-4 * float(without.abs().max()))
    public = int8_linear(x, scale, weight, squares=squares, eps=1e-5, out_dtype=torch.bfloat16)
    torch.testing.assert_close(public.float(), without, rtol=2.0**-8, atol=1e-4 * float(without.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "k", "rows"), [("I4_128", 384, 6), ("Q8_0", 96, 4), ("Q4_K", 256, 1)])
def test_rows_of_floats_beside_those_of_a_weight(kind, k, rows, dtype, device):
    weight = random_weight(kind, 10, k, device)
    h, norm = torch.randn(1, k, device=device) * 3, torch.randn(k, device=device)
    beside = (torch.randn(rows, k, device=device) * k**-0.5).to(dtype)
    x, scale, squares = hand_down_ref(h, norm)
    kernel = load("ostinato.kernels.block_linear.triton:int8_linear_beside")
    tiles = Tiles("streamed", rows=8, groups=4, tokens=1, warps=1)
    found, logits = kernel(x, scale, *operands(weight), squares, 1e-5, h, norm, beside, torch.float32, tiles)
    expected, right = int8_linear_beside_ref(x, scale, weight, squares, 1e-5, h, norm, beside, torch.float32)
    wide = x.float() * scale.repeat_interleave(16, dim=1) * torch.rsqrt(squares.sum(2) / k + 1e-5)
    assert_sums_agree(found, expected, wide, weight)
    normed = rms_norm_ref(h, norm, 1e-5, torch.float32)
    bound = k * 2.0**-24 * (normed.abs() @ beside.float().abs().T)  # of sums in another order
    assert bool(((logits - right).abs() <= bound).all())
    public = int8_linear_beside(
        x, scale, weight, squares=squares, eps=1e-5, h=h, norm=norm, beside=beside, out_dtype=torch.float32
    )
    assert_sums_agree(public[0], expected, wide, weight)
    assert bool(((public[1] - right).abs() <= bound).all())


def test_what_stands_beside_must_fit(device):
    weight = random_weight("Q8_0", 10, 64, device)
    h, norm, beside = torch.randn(1, 64, device=device), torch.ones(64, device=device), torch.ones(3, 64, device=device)
    x, scale, squares = hand_down_ref(h, norm)
    right = {"x": x, "scale": scale, "squares": squares, "h": h, "norm": norm, "beside": beside}
    for name, wrong in (
        ("x", x.float()), ("scale", scale[:, :2]), ("squares", squares[0]), ("h", h.double()), ("norm", norm[1:]),
        ("beside", beside[:, 1:]),
    ):  # fmt: skip
        given = right | {name: wrong}
        with pytest.raises(KernelError, match=f"contiguous {name} "):
            int8_linear_beside(given.pop("x"), given.pop("scale"), weight, eps=0.0, out_dtype=torch.float32, **given)


def test_rows_that_are_int8_already_have_tiles_for_every_shape():
    rule = load("ostinato.kernels.block_linear.triton:default_int8_tiles")
    for n in (12288, 9216):
        assert rule(n, 2048, 1) == Tiles("streamed", rows=8, groups=64, tokens=1, warps=1)
    side_by_side = load("ostinato.kernels.block_linear.triton:rows_side_by_side")
    for n in (1, 4097, 8192):
        for k in (32, 64, 512, 2048, 8192):
            for m in (1, 3, 9):
                assert side_by_side(rule(n, k, m)) >= 1


def test_int8_rows_that_do_not_fit_are_refused(device):
    weight = random_weight("Q8_0", 10, 64, device)
    x, scale = torch.ones(2, 64, dtype=torch.int8, device=device), torch.ones(2, 2, device=device)
    with pytest.raises(KernelError, match=r"x int8 \[M, 64\], got \(2, 64\) torch.float32"):
        int8_linear(x.float(), scale, weight)
    with pytest.raises(KernelError, match=r"scales float32 \[2, 2\] or \[2, 4\], got \(2, 3\)"):
        int8_linear(x, torch.ones(2, 3, device=device), weight)
    for wrong in (
        torch.ones(2, 0, 4, device=device),
        torch.ones(2, 4, device=device),
        torch.ones(2, 1, 3, device=device),
    ):
        with pytest.raises(KernelError, match=r"squares \[2, heads, 4\]"):
            int8_linear(x, scale, weight, squares=wrong)
    for wrong in (torch.ones(2, 2, 4, device=device), torch.ones(2, 1, 0, device=device)):
        with pytest.raises(KernelError, match=r"squares \[2, 1, parts\] with a scale for 16 columns"):
            int8_linear(x, torch.ones(2, 4, device=device), weight, squares=wrong)
    with pytest.raises(KernelError, match=r"out_dtype of floats, got torch.int32"):
        int8_linear(x, scale, weight, out_dtype=torch.int32)
    with pytest.raises(KernelError, match=r"residual \[2, 10\], got \(2, 9\)"):
        int8_linear(x, scale, weight, residual=torch.ones(2, 9, device=device))


DEFAULTS = [("Q8_0", 10, 64, 3), ("Q4_0", 40, 256, 1), ("I4_128", 10, 384, 5), ("Q4_K", 20, 4096, 1)]


@pytest.mark.parametrize(("kind", "n", "k", "m"), DEFAULTS)
def test_int8_rows_have_tiles_that_nobody_measured(kind, n, k, m, device):
    """Of every width, and for rows that are no power of two."""
    weight = random_weight(kind, n, k, device)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
    scale = torch.rand(m, k // 32, device=device) * 0.02
    kernel = load("ostinato.kernels.block_linear.triton:int8_linear")
    found = kernel(x, scale, *operands(weight), None, 0.0, None, torch.float32)
    wide = x.float() * scale.repeat_interleave(32, dim=1)
    assert_sums_agree(found, int8_linear_ref(x, scale, weight, None, 0.0, None, torch.float32), wide, weight)


def test_makers_round_where_the_product_would_do_it_apart_or_was_measured_with_it(monkeypatch, device):
    launcher = "ostinato.kernels.block_linear.triton"
    prefers, choose = load(f"{launcher}:prefers_int8"), load(f"{launcher}:choose")
    measured = {
        "I4_128 2048x4096 m1": Tiles("resident", 8, 128, 1, 8),
        "I4_128 2048x4096 m1 int8": Tiles("streamed", 8, 128, 1, 4),
        "Q4_0 2048x4096 m1": Tiles("streamed", 8, 128, 1, 1),
        "Q4_1 576x576 m1": Tiles("resident", 4, 32, 1, 4),
    }
    monkeypatch.setattr(f"{launcher}.table", lambda gpu: measured)
    choose.cache_clear()
    found = {key: prefers(key.split()[0], *map(int, key.split()[1].split("x")), 1, device) for key in measured}
    choose.cache_clear()
    assert [key.split()[0] for key, yes in found.items() if yes] == ["I4_128", "I4_128", "Q4_0"]
    assert not prefers_int8(random_weight("Q4_0", 8, 4096, torch.device("cpu")), 1)
