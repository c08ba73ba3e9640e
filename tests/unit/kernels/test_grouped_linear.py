"""Products of many rows on packed weights: the references against plain loops, the kernels against the references."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear.ref import block_linear_ref
from ostinato.kernels.grouped_linear import (
    PickSchedule,
    grouped_down,
    grouped_gate_up,
    grouped_linear,
    packed_matmul,
    sort_picks,
)
from ostinato.kernels.grouped_linear.ref import grouped_down_ref, grouped_gate_up_ref, sort_picks_ref
from ostinato.kernels.registry import load
from ostinato.quant.blocks import KINDS, dequantize

from .block_weights import operands, random_weight

CPU = torch.device("cpu")


def random_ids(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """Different experts for the picks of a token, as a router chooses them."""
    return torch.rand(tokens, experts).argsort(1)[:, :top_k].int().contiguous()


@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_blocks_cover_every_pick_once_and_know_its_expert(tokens, block_rows):
    ids = random_ids(tokens, 3, 7)
    schedule = sort_picks(ids, 7, block_rows=block_rows)
    seen = torch.zeros(tokens * 3, dtype=torch.int32)
    assert schedule.blocks.shape == (tokens * 3 // block_rows + 7, 3)
    for expert, first, stop in schedule.blocks.tolist():
        assert stop - first <= block_rows
        picks = schedule.order[first:stop].long()
        assert (ids.flatten()[picks] == expert).all()
        assert (picks.diff() > 0).all()  # an expert's picks keep their order
        seen[picks] += 1
    assert (seen == 1).all()


def by_hand(x, gate_up, down, ids, weights, experts):
    """The mixture, token by token, in float64."""
    up_rows, down_rows = gate_up.shape[0] // experts, down.shape[0] // experts
    first = dequantize(gate_up).double().view(experts, up_rows, -1)
    second = dequantize(down).double().view(experts, down_rows, -1)
    out = torch.zeros(x.shape[0], down_rows, dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            expert = int(ids[t, j])
            gate, up = (first[expert] @ x[t].double()).chunk(2)
            out[t] += weights[t, j].double() * (second[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


def test_mixture_on_the_cpu_is_the_sum_over_picks():
    gate_up, down = random_weight("Q4_1", 5 * 64, 64, CPU), random_weight("Q4_0", 5 * 10, 32, CPU)
    x, ids, weights = torch.randn(9, 64), random_ids(9, 2, 5), torch.rand(9, 2)
    residual = torch.randn(9, 10)
    found = grouped_linear(x, gate_up, down, ids, weights, num_experts=5, residual=residual)
    expected = by_hand(x, gate_up, down, ids, weights, 5) + residual
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_packed_product_on_the_cpu_is_the_dense_one():
    weight = random_weight("Q4_K", 10, 256, CPU)
    x, residual = torch.randn(3, 256), torch.randn(3, 10)
    found = packed_matmul(x, weight, residual=residual)
    torch.testing.assert_close(found, x @ dequantize(weight).T + residual)


def test_results_without_data_look_like_the_references():
    weight, x = random_weight("Q4_0", 4 * 64, 32, CPU), torch.ones(3, 32)
    ids, weights = random_ids(3, 2, 4), torch.ones(3, 2)

    def run(device):
        schedule = sort_picks(ids.to(device), 4)
        act = grouped_gate_up(x.to(device), weight.to(device), schedule)
        out = grouped_down(act, weight.to(device), schedule, weights.to(device))
        dense = packed_matmul(x.to(device), weight.to(device), gated="silu")
        return [(t.shape, t.dtype) for t in (schedule.order, schedule.blocks, act, out, dense)]

    assert run("meta") == run("cpu")


def test_misfits_are_refused_in_one_line():
    stack = random_weight("Q4_0", 4 * 6, 32, CPU)
    ids = random_ids(3, 2, 4)
    schedule, x, weights = sort_picks(ids, 4), torch.ones(3, 32), torch.ones(3, 2)
    act = torch.ones(6, 32)
    five = PickSchedule(schedule.order, schedule.blocks, 3, 2, 5, schedule.block_rows)
    for call, said in (
        (lambda: sort_picks(ids.long(), 4), "int32 ids"),
        (lambda: sort_picks(ids + 1, 4), "ids of 4 experts"),
        (lambda: sort_picks(ids, 0), "at least one expert"),
        (lambda: sort_picks(ids, 4, block_rows=48), "got 48"),
        (lambda: grouped_gate_up(x[:2], stack, schedule), r"takes \[3, 32\]"),
        (lambda: grouped_gate_up(x, stack, schedule, gated="relu"), "silu or gelu_tanh"),
        (lambda: grouped_gate_up(x, stack, five), "5 equal matrices"),
        (lambda: grouped_gate_up(x.to("meta"), stack, schedule), "move them to one device"),
        (lambda: grouped_down(act, stack, schedule, weights.half()), "float32 weights"),
        (lambda: grouped_down(act, stack, schedule, weights, residual=torch.ones(3, 5)), r"residual \[3, 6\]"),
        (lambda: grouped_down(act, stack, schedule, weights.to("meta")), "weights on meta"),
        (lambda: packed_matmul(x, stack, residual=torch.ones(3, 24), gated="silu"), "not both"),
    ):
        with pytest.raises(KernelError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [0, 3])
def test_reference_of_the_schedule_serves_the_registered_op(tokens):
    ids = random_ids(tokens, 2, 4)
    order, blocks = torch.ops.ostinato.sort_picks(ids, 4, 16)
    again = sort_picks_ref(ids, 4, 16)
    assert torch.equal(order, again[0])
    assert torch.equal(blocks, again[1])


def kernel(name):
    return load(f"ostinato.kernels.grouped_linear.triton:{name}")


def tiles(tokens, rows=32, groups=2, **more):
    return kernel("ProductTiles")(tokens, rows, groups, warps=4, stages=2, **more)


def assert_close_to_bfloat16(found, expected, magnitude):
    """Sums of products whose factors were rounded to bfloat16 (the interpreter truncates): 2 * 2**-8 of magnitudes."""
    assert found.isfinite().all()
    assert (found.float() - expected).abs().max() <= 2**-7 * float(magnitude.max())


@pytest.mark.parametrize("tokens", [1, 6, 70])
def test_sorting_kernel_makes_the_schedule_of_the_reference(tokens, device):
    ids = random_ids(tokens, 4, 9).to(device)
    ids[ids == 3] = 4  # an expert without picks, and tokens that pick one twice
    order, blocks = kernel("sort_picks")(ids, 9, 16)
    again = sort_picks_ref(ids.cpu(), 9, 16)
    assert torch.equal(order.cpu(), again[0])
    used = blocks[:, 1] < blocks[:, 2]
    assert torch.equal(used.cpu(), again[1][:, 1] < again[1][:, 2])
    assert torch.equal(blocks[used].cpu(), again[1][used.cpu()])


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_product_kernel_multiplies_every_kind(kind, swap, device):
    k = 256 if KINDS[kind].has_sub else 384 if KINDS[kind].block == 128 else 192
    weight = random_weight(kind, 37, k, device)
    x = torch.randn(19, k, device=device).bfloat16()
    bias, residual = torch.randn(37, device=device), torch.randn(19, 37, device=device)
    found = kernel("packed_matmul")(
        x, *operands(weight), bias, residual, None, torch.float32, tiles(16, groups=4, swap=swap)
    )
    magnitude = x.float().abs() @ dequantize(weight).abs().T
    assert_close_to_bfloat16(found, block_linear_ref(x, weight, bias=bias, residual=residual), magnitude)


@pytest.mark.parametrize("gated", ["silu", "gelu_tanh"])
def test_product_kernel_gates(gated, device):
    weight = random_weight("Q4_K", 2 * 19, 256, device)
    x = torch.randn(17, 512, device=device).bfloat16()[:, 3:259]  # rows of any stride and start
    bias = torch.randn(38, device=device).bfloat16()
    found = kernel("packed_matmul")(x, *operands(weight), bias, None, gated, torch.bfloat16, tiles(16, 16))
    expected = block_linear_ref(x, weight, bias=bias, gated=gated)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected.float()).norm() < 0.01 * expected.float().norm()


@pytest.mark.parametrize("gated", [None, "silu"])
def test_steps_of_more_groups_than_a_row_has_read_no_scales_behind_the_last_row(gated, device):
    """What lies there may be NaN, which no masked weight takes out of a sum again."""
    weight, x = random_weight("Q4_1", 32, 32, device), torch.randn(5, 32, device=device)
    words, d, high, m, *rest = operands(weight)
    d, m = (torch.cat((plane, torch.full_like(plane[:1], torch.nan))) for plane in (d, m))
    more = (None, None, gated, torch.float32, tiles(16, rows=16))
    found = kernel("packed_matmul")(x, words, d, high, m, *rest, *more)
    expected = packed_matmul(x.cpu(), weight.to("cpu"), gated=gated)
    assert (found.cpu() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("tokens", [3, 41])
def test_mixture_kernels_gather_gate_and_add_up(tokens, swap, device):
    experts, top_k, hidden, width = 5, 3, 64, 32
    gate_up = random_weight("Q4_0", experts * 2 * width, hidden, device)
    down = random_weight("Q4_1", experts * hidden, width, device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    ids = random_ids(tokens, top_k, experts).to(device)
    weights, residual = torch.rand(tokens, top_k, device=device), torch.randn(tokens, hidden, device=device)
    order, blocks = (t.to(device) for t in sort_picks_ref(ids.cpu(), experts, 16))
    chosen = tiles(16, swap=swap)
    act = kernel("grouped_gate_up")(
        x, *operands(gate_up), order, blocks, experts, top_k, 16, "silu", torch.bfloat16, chosen
    )
    expected = grouped_gate_up_ref(x, gate_up, order, blocks, experts, top_k, "silu", torch.float32)
    assert (act.float() - expected).norm() < 0.01 * expected.norm()
    found = kernel("grouped_down")(
        act, *operands(down), order, blocks, experts, 16, weights, residual, torch.float32, chosen
    )
    expected = grouped_down_ref(act, down, order, blocks, experts, weights, residual, torch.float32)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.01 * (expected - residual).norm()


def test_no_tokens_are_no_work(device):
    weight = random_weight("Q4_0", 4 * 64, 32, device)
    ids, x = torch.zeros(0, 2, dtype=torch.int32, device=device), torch.zeros(0, 32, device=device)
    order, blocks = kernel("sort_picks")(ids, 4, 16)
    assert not (blocks[:, 1] < blocks[:, 2]).any()
    act = kernel("grouped_gate_up")(x, *operands(weight), order, blocks, 4, 2, 16, "silu", torch.float32)
    out = kernel("grouped_down")(act, *operands(weight), order, blocks, 4, 16, x.new_zeros(0, 2), None, torch.float32)
    assert act.shape == (0, 32)
    assert out.shape == (0, 64)
    assert kernel("packed_matmul")(x, *operands(weight), None, None, None, torch.float32).shape == (0, 256)
