"""Block-quantized products on a GPU, at the shapes of real models, through the public op and inside a graph."""

import pytest
import torch

from ostinato.kernels.block_linear import block_linear, int8_linear, int8_linear_beside
from ostinato.kernels.block_linear.ref import (
    block_linear_int8_ref,
    block_linear_ref,
    int8_linear_beside_ref,
    int8_linear_ref,
)
from ostinato.kernels.block_linear.triton import takes_wide
from ostinato.kernels.embed import embed
from ostinato.kernels.moe.ref import hand_down_ref
from ostinato.kernels.registry import load
from ostinato.kernels.tuning import Tiles
from ostinato.quant.blocks import KINDS, dequantize

from ...unit.kernels.block_weights import columns, grid_rows, operands, random_weight

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("m", [1, 2, 5, 8, 16])
@pytest.mark.parametrize(("n", "k"), [(1000, 2048), (333, 20480)])
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_on_the_grid_lose_nothing(kind, n, k, m):
    weight = random_weight(kind, n, k, CUDA)
    x = grid_rows(m, k, CUDA, max(32, KINDS[kind].group))
    # float32 sums of K products: a few times 2**-24 of their size each, in random directions
    assert relative(block_linear(x, weight), block_linear_ref(x, weight)) < 2e-6


@pytest.mark.parametrize("m", [1, 3, 12, 40, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_long_narrow_matrices_lose_nothing(kind, m):
    k = columns(kind, 576)
    weight = random_weight(kind, 20001, k, CUDA)
    x = grid_rows(m, k, CUDA, max(32, KINDS[kind].group))
    assert relative(block_linear(x, weight), block_linear_ref(x, weight)) < 2e-6


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("m", [1, 3, 16, 40])
def test_smollm_rows_with_norm_gate_and_residual(kind, m):
    x = torch.randn(m, 576, device=CUDA) * 3
    norm = torch.rand(576, device=CUDA) + 0.5
    gate_up = random_weight(kind, 3072, 576, CUDA)
    down = random_weight(kind, 576, 1536, CUDA)
    gated = block_linear(x, gate_up, norm=norm, eps=1e-5, gated="silu")
    found = block_linear(gated, down, residual=x)
    if m == 1:  # resident whatever the table says: one step in one of 576 activations is 1/40 of its size, 1e-3 of all
        model = block_linear_int8_ref(x, gate_up, norm=norm, eps=1e-5, gated="silu", group=4)
        assert relative(gated, model) < 2e-3
        assert relative(found, block_linear_int8_ref(gated, down, residual=x, group=4)) < 2e-3
    # int8 in groups of 32 is off by about 1/127/sqrt(12) of the largest: 1e-2 of a random sum, twice in a gated one
    assert relative(gated, block_linear_ref(x, gate_up, norm=norm, eps=1e-5, gated="silu")) < 2e-2
    assert relative(found, block_linear_ref(gated, down, residual=x)) < 2e-2


INT8_SHAPES = [(kind, 1001, 2048, 1) for kind in KINDS]
INT8_SHAPES += [("I4_128", 12288, 2048, 1), ("I4_128", 9216, 2048, 1), ("Q4_K", 333, 768, 3), ("Q6_K", 1001, 8192, 2)]


@pytest.mark.parametrize(("kind", "n", "k", "m"), INT8_SHAPES)
def test_rows_that_are_int8_already(kind, n, k, m):
    """Scales for 32 and for 16 columns, with the norm of heads or of the whole row left to the product, or none."""
    weight = random_weight(kind, n, k, CUDA)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=CUDA)
    residual = torch.randn(m, n, device=CUDA)
    for group, shape, added, dtype, bound in (
        # float32: sums of K products, and a root that the GPU approximates to 2**-22
        (32, (m, k // 128, 4), residual, torch.float32, 1e-5),
        (16, (m, 1, k // 16), residual, torch.float32, 1e-5),
        (16, None, None, torch.float32, 1e-5),
        (16, (m, 1, k // 16), None, torch.bfloat16, 4e-3),
    ):
        scale = 10.0 ** (-2 * torch.rand(m, k // group, device=CUDA))
        squares = torch.rand(shape, device=CUDA) * k if shape is not None else None
        found = int8_linear(x, scale, weight, squares=squares, eps=1e-5, residual=added, out_dtype=dtype)
        assert found.dtype == dtype
        expected = int8_linear_ref(x, scale, weight, squares, 1e-5, added, torch.float32)
        assert relative(found, expected) < bound


@pytest.mark.parametrize(("kind", "n", "k", "rows"), [("I4_128", 12288, 2048, 64), ("Q4_K", 1001, 4096, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_floats_beside_those_of_a_weight(kind, n, k, rows, dtype):
    """Every element, a hundred times over, whatever the memory held before."""
    weight = random_weight(kind, n, k, CUDA)
    h, norm = torch.randn(1, k, device=CUDA) * 3, torch.rand(k, device=CUDA) + 0.5
    beside = (torch.randn(rows, k, device=CUDA) * k**-0.5).to(dtype)
    x, scale, squares = hand_down_ref(h, norm)
    given = {"squares": squares, "eps": 1e-6, "h": h, "norm": norm, "beside": beside, "out_dtype": torch.float32}
    found = int8_linear_beside(x, scale, weight, **given)
    expected = int8_linear_beside_ref(x, scale, weight, *given.values())
    # float32: sums of K products, and a root that the GPU approximates to 2**-22
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(found[1], expected[1]) < 1e-5
    for _ in range(100):
        torch.full((n + rows,), torch.nan, device=CUDA)
        again = int8_linear_beside(x, scale, weight, **given)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    half, logits = int8_linear_beside(x, scale, weight, **given | {"out_dtype": torch.bfloat16})
    assert half.dtype == torch.bfloat16
    assert relative(half, expected[0]) < 4e-3
    assert relative(logits, expected[1]) < 1e-5


OURS = [kind for kind in KINDS if takes_wide(KINDS[kind])]  # up to 64 rows of them multiply in int8


@pytest.mark.parametrize(
    ("kind", "m"),
    [(kind, m) for kind in KINDS for m in (17, 33, 64, 130, 200, 512) if m > 64 or kind not in OURS],
)
def test_many_rows_multiply_in_bfloat16(kind, m):
    weight = random_weight(kind, 1500, 2048, CUDA)
    x = torch.randn(m, 2048, device=CUDA).bfloat16()
    expected = x.float() @ dequantize(weight, torch.bfloat16).float().T
    found = block_linear(x, weight, out_dtype=torch.float32)
    # exact products, summed in float32 in another order
    assert relative(found, expected) < 2e-5
    residual = torch.randn(m, 1500, device=CUDA)
    assert relative(block_linear(x, weight, residual=residual), expected + residual) < 2e-5
    bias = torch.randn(1500, device=CUDA)
    gated = block_linear(x, weight, bias=bias, gated="gelu_tanh", out_dtype=torch.float32)
    exact = block_linear_ref(x, weight, bias=bias, gated="gelu_tanh", out_dtype=torch.float32)
    assert relative(gated, exact) < 2e-2
    both = block_linear(x, weight, bias=bias, residual=residual)
    assert relative(both, expected + bias + residual) < 2e-5
    half = block_linear(x, weight, bias=bias)
    assert half.dtype == torch.bfloat16
    assert relative(half, expected + bias) < 2**-7  # rounded to bfloat16, in a large product in two steps


@pytest.mark.parametrize("m", [3, 12, 17, 40, 64])
@pytest.mark.parametrize("kind", OURS)
def test_our_kinds_multiply_in_int8(kind, m):
    weight = random_weight(kind, 1500, 2048, CUDA)
    x = torch.randn(m, 2048, device=CUDA).bfloat16()
    bias, residual = torch.randn(1500, device=CUDA), torch.randn(m, 1500, device=CUDA)
    group = KINDS[kind].group
    # a few of a row's activations round to the other side of a tie
    found = block_linear(x, weight, bias=bias, residual=residual)
    assert relative(found, block_linear_int8_ref(x, weight, bias=bias, residual=residual, group=group)) < 1e-3
    gated = block_linear(x, weight, bias=bias, gated="gelu_tanh", out_dtype=torch.float32)
    model = block_linear_int8_ref(x, weight, bias=bias, gated="gelu_tanh", out_dtype=torch.float32, group=group)
    assert relative(gated, model) < 2e-3
    half = block_linear(x, weight)
    assert half.dtype == torch.bfloat16
    assert relative(half, block_linear_int8_ref(x, weight, group=group)) < 2**-8


@pytest.mark.parametrize("m", [1, 16, 256])
def test_every_output_is_written_in_a_graph(m):
    weight = random_weight("Q4_1", 960, 576, CUDA)
    x = torch.randn(m, 576, device=CUDA)
    norm = torch.rand(576, device=CUDA)
    block_linear(x, weight, norm=norm, eps=1e-5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = block_linear(x, weight, norm=norm, eps=1e-5)
    for _ in range(3):
        x.normal_()
        found.fill_(torch.nan)
        graph.replay()
        assert relative(found, block_linear_ref(x, weight, norm=norm, eps=1e-5)) < 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_rows(kind):
    table = random_weight(kind, 5000, 2048, CUDA)
    tokens = torch.randint(0, 5000, (17,), device=CUDA)
    torch.testing.assert_close(embed(tokens, table), dequantize(table)[tokens], rtol=2**-22, atol=1e-8)


WIDE = [
    Tiles("wide", rows=16, groups=4, tokens=8, warps=4),
    Tiles("wide", rows=32, groups=2, tokens=16, warps=4),
    Tiles("wide", rows=64, groups=1, tokens=32, warps=2),
]


@pytest.mark.parametrize("tiles", WIDE, ids=str)
@pytest.mark.parametrize("m", [2, 8, 13, 32, 64])
@pytest.mark.parametrize(("kind", "n", "k"), [("I4_128", 12288, 2048), ("I4_128", 2048, 4096), ("I6_64", 24831, 2048)])
def test_wide_products_round_with_one_scale_a_span(kind, n, k, m, tiles):
    weight = random_weight(kind, n, k, CUDA)
    x = torch.randn(m, k, device=CUDA) * 3
    norm = torch.rand(k, device=CUDA) + 0.5
    residual = torch.randn(m, n, device=CUDA)
    launch = load("ostinato.kernels.block_linear.triton:block_linear")
    found = launch(x, *operands(weight), norm, 1e-5, None, residual, None, torch.float32, tiles)
    expected = block_linear_int8_ref(x, weight, norm=norm, eps=1e-5, residual=residual, group=KINDS[kind].group)
    assert relative(found, expected) < 1e-3  # a few of a row's activations round to the other side of a tie
    gated = launch(x, *operands(weight.slice_rows(0, 2000)), norm, 1e-5, None, None, "silu", x.dtype, tiles)
    model = block_linear_int8_ref(
        x, weight.slice_rows(0, 2000), norm=norm, eps=1e-5, gated="silu", group=KINDS[kind].group
    )
    assert relative(gated, model) < 2e-3
