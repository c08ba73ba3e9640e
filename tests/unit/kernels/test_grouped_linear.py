"""Products of many rows on packed weights: the references against plain loops, the kernels against the references."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.grouped_linear import (
    PickSchedule,
    grouped_down,
    grouped_gate_up,
    grouped_linear,
    packed_matmul,
    sort_picks,
)
from ostinato.kernels.grouped_linear.ref import sort_picks_ref
from ostinato.quant.blocks import dequantize

from .block_weights import random_weight

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
