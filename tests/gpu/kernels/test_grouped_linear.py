"""The pipelined product of compute capability 9.0, which no interpreter runs, and the ops as a model calls them."""

import pytest
import torch

from ostinato.kernels.block_linear.ref import block_linear_ref
from ostinato.kernels.grouped_linear import grouped_down, grouped_gate_up, grouped_linear, packed_matmul, sort_picks
from ostinato.kernels.grouped_linear.ref import grouped_down_ref, grouped_gate_up_ref, sort_picks_ref
from ostinato.kernels.registry import load
from ostinato.quant.blocks import KINDS, dequantize

from ...unit.kernels.block_weights import operands, random_weight

CUDA = torch.device("cuda")
NIBBLES = [kind for kind in KINDS if KINDS[kind].bits == 4]


@pytest.fixture(autouse=True)
def hopper() -> None:
    torch.manual_seed(0)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the pipelined kernel is for compute capability 9.0")


def tiles(tokens, rows, warps=4, stages=4):
    kind = load("ostinato.kernels.grouped_linear.triton:ProductTiles")
    return kind(tokens, rows, 2, warps, stages, pipelined=True)


def assert_close_to_bfloat16(found, expected, magnitude, roundings=1):
    """Sums of products with a factor rounded to bfloat16 ``roundings`` times, each by 2**-9 of it at most."""
    assert found.isfinite().all()
    assert (found.float() - expected).abs().max() <= roundings * 2**-9 * float(magnitude.max())


@pytest.mark.parametrize("shape", [(64, 128, 4), (128, 128, 8), (128, 128, 4), (128, 256, 8), (256, 128, 8)])
@pytest.mark.parametrize("kind", NIBBLES)
def test_pipelined_product_of_every_four_bit_kind(kind, shape):
    n, k, m = 333, 768, 301
    weight = random_weight(kind, n, k, CUDA)
    x = torch.randn(m, k, device=CUDA).bfloat16()
    bias, residual = torch.randn(n, device=CUDA), torch.randn(m, n, device=CUDA)
    launch = load("ostinato.kernels.grouped_linear.triton:packed_matmul")
    t = tiles(shape[0], shape[1], shape[2], 3)
    found = launch(x, *operands(weight), bias, residual, None, torch.float32, t)
    magnitude = x.float().abs() @ dequantize(weight).abs().T
    assert_close_to_bfloat16(found, block_linear_ref(x, weight, bias=bias, residual=residual), magnitude)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("stages", [3, 4])
def test_pipelined_product_of_few_steps(steps, stages):
    kind = "Q4_0"
    weight = random_weight(kind, 128, 64 * steps, CUDA)
    x = torch.randn(130, 64 * steps, device=CUDA).bfloat16()
    launch = load("ostinato.kernels.grouped_linear.triton:packed_matmul")
    found = launch(x, *operands(weight), None, None, "silu", torch.float32, tiles(64, 64, 4, stages))
    expected = block_linear_ref(x, weight, gated="silu", out_dtype=torch.float32)
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_1", "I4_32", "I4_64", "I4_128"])
@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
def test_mixture_agrees_with_the_reference(kind, block_rows):
    tokens, experts, top_k, hidden, width = 500, 17, 4, 512, 256
    gate_up, down = (
        random_weight(kind, experts * 2 * width, hidden, CUDA), random_weight(kind, experts * hidden, width, CUDA)
    )  # fmt: skip
    x, residual = torch.randn(tokens, hidden, device=CUDA).bfloat16(), torch.randn(tokens, hidden, device=CUDA)
    ids = torch.rand(tokens, experts, device=CUDA).argsort(1)[:, :top_k].int().contiguous()
    ids[:, -1] = experts - 1
    weights = torch.rand(tokens, top_k, device=CUDA)
    schedule = sort_picks(ids, experts, block_rows=block_rows)
    order, blocks = sort_picks_ref(ids.cpu(), experts, block_rows)
    assert torch.equal(schedule.order.cpu(), order)
    act = grouped_gate_up(x, gate_up, schedule)
    expected = grouped_gate_up_ref(x, gate_up, order.to(CUDA), blocks, experts, top_k, "silu", torch.float32)
    assert (act.float() - expected).norm() < 0.01 * expected.norm()
    found = grouped_down(act, down, schedule, weights, residual=residual)
    expected = grouped_down_ref(act, down, order.to(CUDA), blocks, experts, weights, residual, torch.float32)
    assert (found - expected).norm() < 0.01 * (expected - residual).norm()


def test_mixture_is_captured_and_repeats_bit_for_bit():
    experts, hidden, width = 9, 256, 128
    gate_up, down = (
        random_weight("Q4_1", experts * 2 * width, hidden, CUDA), random_weight("Q4_1", experts * hidden, width, CUDA)
    )  # fmt: skip
    x, ids = torch.randn(700, hidden, device=CUDA).bfloat16(), torch.zeros(700, 2, dtype=torch.int32, device=CUDA)
    weights = torch.rand(700, 2, device=CUDA)
    ids.random_(0, experts)

    def run() -> torch.Tensor:
        return grouped_linear(x, gate_up, down, ids, weights, num_experts=experts)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):  # other experts: the same graph
        ids.random_(0, experts)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, run())


def test_product_of_the_rule_serves_odd_shapes():
    for kind, n, k, m in (("Q4_0", 70, 96, 200), ("Q6_K", 100, 512, 130), ("Q8_0", 130, 160, 70), ("Q4_K", 31, 256, 9)):
        weight = random_weight(kind, n, k, CUDA)
        x = torch.randn(m, k + 8, device=CUDA)[:, 4:-4]
        magnitude = x.abs() @ dequantize(weight).abs().T
        assert_close_to_bfloat16(packed_matmul(x, weight), block_linear_ref(x, weight), magnitude, roundings=2)
