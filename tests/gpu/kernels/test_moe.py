"""The mixture-of-experts block on a GPU at the sizes of a real model, through the public op and inside a graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ostinato.kernels.block_linear import int8_linear
from ostinato.kernels.moe import moe_block
from ostinato.kernels.moe.ref import hand_down_ref, moe_block_ref
from ostinato.kernels.registry import load
from ostinato.kernels.rms_norm.ref import rms_norm_ref
from ostinato.quant.blocks import KINDS, dequantize

from ...unit.kernels.block_weights import random_weight
from ...unit.kernels.moe_cases import MoeCase, random_case

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def assert_close(found: torch.Tensor, case: MoeCase) -> None:
    """Int8 with a scale for 16 columns is off by about 0.5 % of a random sum, in each of three factors."""
    exact = moe_block_ref(case.h, **case.arguments()) - case.h
    change = found - case.h
    assert torch.isfinite(found).all()
    assert (change - exact).norm() < 0.03 * exact.norm()
    rows = found.shape[0]
    if rows <= 64 and not isinstance(case.gate_up, torch.Tensor):  # the model of the kernel, but for ties of rounding
        kinds = case.gate_up.kind.name, case.down.kind.name
        sizes = case.h.shape[1], case.down.shape[-1]
        density = rows * case.top_k / case.num_experts
        tiles = load("ostinato.kernels.moe.triton:default_tiles")(rows, *sizes, kinds, density)
        one_token = load("ostinato.kernels.moe.triton:one_token")
        of_shared = one_token(tiles, *sizes, case.top_k, case.has_shared).shared if tiles.apart else None
        model = moe_block_ref(case.h, **case.arguments(), int8_groups=tiles.int8_groups(of_shared)) - case.h
        assert (change - model).norm() < 3e-3 * model.norm()


MODEL = {
    "hidden": 2048, "width": 512, "num_experts": 40, "top_k": 8, "gate_up_kind": "I4_128", "down_kind": "I4_128",
}  # fmt: skip


def model_case(m: int, **options: Any) -> MoeCase:
    """``m`` tokens of the model's block, but for ``options``."""
    return random_case(m, CUDA, **MODEL | options)


def check(m: int, **options: Any) -> None:
    case = model_case(m, **options)
    assert_close(moe_block(case.h, **case.arguments())[0], case)


@pytest.mark.parametrize("m", [1, 2, 7, 8, 33, 64, 65, 300])
@pytest.mark.parametrize("kind", ["I4_128", "Q4_K", "Q6_K"])
def test_real_sizes(kind, m):
    check(m, gate_up_kind=kind, down_kind=kind)


@pytest.mark.parametrize("m", [2, 5, 12])
@pytest.mark.parametrize("kind", ["I4_128", "Q4_K"])
def test_tokens_apart(kind, m):
    """So many experts that few are common; those that are give each token its own result."""
    check(m, gate_up_kind=kind, down_kind=kind, num_experts=256)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stack", "sizes"),
    [("gate_up_kind", {"hidden": 1024, "width": 768}), ("down_kind", {"hidden": 512, "width": 256})],
    ids=["gate_up", "down"],
)
def test_every_kind(stack, sizes, kind, m):
    kinds = {"gate_up_kind": "Q8_0", "down_kind": "Q8_0", stack: kind}
    check(m, num_experts=9, top_k=2, **sizes, **kinds)


@pytest.mark.parametrize("m", [1, 5, 80])
@pytest.mark.parametrize(
    "options",
    [{"has_shared": False}, {"normalize": False}, {"gated_shared": False}, {"router_dtype": torch.float32},
     {"num_experts": 256}, {"gate_up_kind": None, "down_kind": None}],
    ids=str,
)  # fmt: skip
def test_options(options, m):
    check(m, **{"gate_up_kind": "I4_64", "down_kind": "I4_32", **options})


@pytest.mark.parametrize("m", [8, 40])
@pytest.mark.parametrize("options", [{"hidden": 1152, "width": 384}, {"num_experts": 3, "top_k": 2}], ids=str)
def test_lists_on_tensor_cores_at_odd_sizes(options, m):
    """Odd numbers of groups of 128 columns, rows beyond the last tile, experts that many tokens share."""
    check(m, **options)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"has_shared": False, "num_experts": 256},
        {"gate_up_kind": "Q4_K", "down_kind": "Q6_K"},
        {"gate_up_kind": "I4_64", "down_kind": "I4_32", "hidden": 1984, "width": 768},
        {"gate_up_kind": "Q8_0", "down_kind": "Q8_0", "hidden": 96, "width": 1024},
        {"gate_up_kind": "Q8_0", "down_kind": "Q5_1", "hidden": 160, "width": 32, "top_k": 3},
    ],
    ids=str,
)
def test_the_row_is_rounded_for_the_next_product(sizes):
    """What is handed on is the model's of the kernel's own result, every element of it, a hundred times over."""
    case = model_case(1, **sizes)
    hidden = case.h.shape[1]
    next_norm = torch.randn(hidden, device=CUDA)
    plain = moe_block(case.h, **case.arguments())[0]
    out, x, scale, squares = moe_block(case.h, **case.arguments(), next_norm=next_norm)
    assert_close(out, case)
    assert float((out - plain).abs().max()) <= 1e-5 * float(plain.abs().max())  # sums in another order at most
    expected_x, expected_scale, expected_squares = hand_down_ref(out, next_norm)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares, expected_squares, rtol=1e-5, atol=0)
    off = (x.int() - expected_x.int()).abs()
    steps = out * next_norm / expected_scale.repeat_interleave(16, dim=1)
    assert int(off.max()) <= 1
    assert int(off[((steps - steps.floor()) - 0.5).abs() > 1e-4].sum()) == 0  # another way only where it was a tie
    for _ in range(100):  # whatever the memory held before
        torch.full((4 * hidden,), torch.nan, device=CUDA)
        again = moe_block(case.h, **case.arguments(), next_norm=next_norm)
        assert all(torch.equal(a, b) for a, b in zip(again, (out, x, scale, squares), strict=True))


def replayed(chain: Callable[[], list[torch.Tensor]], start: torch.Tensor) -> list[torch.Tensor]:
    """What a graph of ``chain`` finds; for twenty random ``start`` it must be bit for bit what the calls find."""
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        start.normal_()
        expected = chain()
        for tensor in found:
            tensor.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return found


@pytest.mark.parametrize("rows", [9216, 12288])
def test_a_chain_of_blocks_and_products_with_their_rows_in_a_graph(rows):
    """As in a step: the product reads what the block before it stored, each started before the other is done."""
    case = model_case(1)
    weight = random_weight("I4_128", rows, 2048, CUDA)
    next_norm = torch.rand(2048, device=CUDA) + 0.5

    def chain() -> list[torch.Tensor]:
        h, found = case.h, []
        for _ in range(6):
            h, x, scale, squares = moe_block(h, **case.arguments(), next_norm=next_norm)
            found.append(int8_linear(x, scale, weight, squares=squares, eps=case.eps, out_dtype=torch.bfloat16))
        return [h, *found]

    found = replayed(chain, case.h)
    exact = rms_norm_ref(found[0], next_norm, case.eps, torch.float32) @ dequantize(weight).T
    # Int8 with a scale for 16 columns is off by about 0.5 % of a random sum, bfloat16 by 0.2 %.
    assert (found[-1].float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("m", [1, 4, 9, 64])
def test_a_chain_in_a_graph_repeats_bit_for_bit(m):
    case = model_case(m)

    def chain() -> list[torch.Tensor]:
        h = case.h
        for _ in range(6):
            h = moe_block(h, **case.arguments())[0]
        return [h]

    replayed(chain, case.h)
