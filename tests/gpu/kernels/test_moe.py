"""The mixture-of-experts block on a GPU at the sizes of a real model, through the public op and inside a graph."""

import pytest
import torch

from ostinato.kernels.moe import moe_block
from ostinato.kernels.moe.ref import moe_block_ref
from ostinato.kernels.registry import load
from ostinato.quant.blocks import KINDS

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
        tiles = load("ostinato.kernels.moe.triton:default_tiles")(rows, case.h.shape[1], case.down.shape[-1], kinds)
        model = moe_block_ref(case.h, **case.arguments(), int8_groups=tiles.int8_groups()) - case.h
        assert (change - model).norm() < 3e-3 * model.norm()


SIZES = {"hidden": 2048, "width": 512, "num_experts": 40, "top_k": 8}


@pytest.mark.parametrize("m", [1, 2, 7, 8, 33, 64, 65, 300])
@pytest.mark.parametrize("kind", ["I4_128", "Q4_K", "Q6_K"])
def test_real_sizes(kind, m):
    case = random_case(m, CUDA, gate_up_kind=kind, down_kind=kind, **SIZES)
    assert_close(moe_block(case.h, **case.arguments()), case)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, m):
    case = random_case(m, CUDA, hidden=1024, width=768, num_experts=9, top_k=2, gate_up_kind=kind, down_kind="Q8_0")
    assert_close(moe_block(case.h, **case.arguments()), case)
    case = random_case(m, CUDA, hidden=512, width=256, num_experts=9, top_k=2, gate_up_kind="Q8_0", down_kind=kind)
    assert_close(moe_block(case.h, **case.arguments()), case)


@pytest.mark.parametrize("m", [1, 5, 80])
@pytest.mark.parametrize(
    "options",
    [{"has_shared": False}, {"normalize": False}, {"gated_shared": False}, {"router_dtype": torch.float32},
     {"num_experts": 256}, {"gate_up_kind": None, "down_kind": None}],
    ids=str,
)  # fmt: skip
def test_options(options, m):
    case = random_case(m, CUDA, **{**SIZES, "gate_up_kind": "I4_64", "down_kind": "I4_32", **options})
    assert_close(moe_block(case.h, **case.arguments()), case)


@pytest.mark.parametrize("m", [8, 40])
@pytest.mark.parametrize("options", [{"hidden": 1152, "width": 384}, {"num_experts": 3, "top_k": 2}], ids=str)
def test_lists_on_tensor_cores_at_odd_sizes(options, m):
    """Odd numbers of groups of 128 columns, rows beyond the last tile, experts that many tokens share."""
    case = random_case(m, CUDA, gate_up_kind="I4_128", down_kind="I4_128", **{**SIZES, **options})
    assert_close(moe_block(case.h, **case.arguments()), case)


@pytest.mark.parametrize("m", [1, 4, 9, 64])
def test_a_chain_in_a_graph_repeats_bit_for_bit(m):
    case = random_case(m, CUDA, gate_up_kind="I4_128", down_kind="I4_128", **SIZES)
    start = case.h

    def chain() -> torch.Tensor:
        h = start
        for _ in range(6):
            h = moe_block(h, **case.arguments())
        return h

    eager = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        start.normal_()
        expected = chain()
        found.fill_(torch.nan)
        graph.replay()
        assert torch.equal(found, expected)
    assert eager.shape == found.shape
