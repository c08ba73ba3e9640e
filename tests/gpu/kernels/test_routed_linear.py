"""The output product that routes at the sizes of a real model, and with the experts behind it in a graph."""

import pytest
import torch

from ostinato.kernels.moe import moe_block
from ostinato.kernels.registry import load
from ostinato.kernels.routed_linear import fold_router, routed_linear

from ...unit.kernels.block_weights import operands
from ...unit.kernels.moe_cases import random_case
from ...unit.kernels.routed_cases import assert_routed, random_routed

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def folded(given: dict) -> torch.Tensor:
    return fold_router(given["router"], given["norm"], given["weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k", "heads"), [(2048, 4096, 32), (2048, 4096, 0), (5120, 1536, 12), (1008, 8192, 64)])
@pytest.mark.parametrize("kind", ["I4_128", "I4_64", "Q4_K", "Q6_K", "Q8_0"])
def test_real_sizes(kind: str, n: int, k: int, heads: int, dtype: torch.dtype) -> None:
    """Every element, a hundred times over, whatever the memory held before."""
    given = random_routed(kind, n, k, 257, heads, dtype, CUDA)
    found = routed_linear(**given, folded=folded(given))
    assert_routed(found, given)
    for _ in range(100):
        torch.full((8 * n,), torch.nan, device=CUDA)
        again = routed_linear(**given, folded=folded(given))
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


TILES = [(16, 128, 4, 4), (16, 128, 8, 4), (16, 64, 8, 2), (32, 32, 4, 8), (16, 32, 8, 4), (64, 16, 2, 1)]


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_ways_of_cutting(tiles: tuple[int, int, int, int]) -> None:
    given = random_routed("I4_128", 2048, 4096, 257, 32, torch.bfloat16, CUDA)
    launch = load("ostinato.kernels.routed_linear.triton:routed_linear")
    found = launch(
        given["x"], given["scale"], *operands(given["weight"]), given["squares"], given["eps"], given["residual"],
        given["norm"], given["router"], folded(given),
        load("ostinato.kernels.routed_linear.triton:RoutedTiles")(*tiles),
    )  # fmt: skip
    assert_routed(found, given)


def test_with_the_experts_in_a_graph() -> None:
    """Six blocks, each on the row of the one before: bit for bit what the calls find, and what the router would do."""
    blocks = []
    for _ in range(6):
        case = random_case(
            1, CUDA, hidden=2048, width=512, num_experts=40, top_k=8, gate_up_kind="I4_128", down_kind="I4_128"
        )
        assert case.shared_gate is not None
        given = random_routed("I4_128", 2048, 4096, 41, 32, torch.bfloat16, CUDA)
        given["router"] = torch.cat((case.router, case.shared_gate.view(1, -1)))
        given["norm"] = case.norm
        blocks.append((case, given, folded(given)))
    start = torch.randn(1, 2048, device=CUDA)

    def chain(routed: bool = True) -> torch.Tensor:
        h = start
        for case, given, matrix in blocks:
            h, *row = routed_linear(**{**given, "residual": h}, folded=matrix)
            h = moe_block(h, **case.arguments(), routed=tuple(row) if routed else None)[0]
        return h

    expected = chain(routed=False)
    assert float((chain() - expected).norm() / expected.norm()) < 1e-2  # an expert on the edge may be another
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        start.copy_(torch.randn_like(start))
        graph.replay()
        assert torch.equal(found, chain())
