"""The mixture-of-experts block's reference, its checks, and its node for tracing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ostinato.errors import KernelError
from ostinato.kernels.moe import hands_down, moe_block
from ostinato.kernels.moe.ref import moe_block_dense, moe_block_ref
from ostinato.kernels.rms_norm.ref import rms_norm_ref
from ostinato.quant.blocks import dequantize

from .moe_cases import MoeCase, random_case


def one_by_one(case: MoeCase) -> torch.Tensor:
    """The block in float64, a token and an expert at a time."""
    h = case.h.double()
    total = case.num_experts + case.has_shared
    rows = []
    for row in h:
        x = row / torch.sqrt(row.square().mean() + case.eps) * case.norm.double()
        logits = case.router.double() @ x
        chosen = sorted(range(case.num_experts), key=lambda e: -float(logits[e]))[: case.top_k]
        scores = logits[chosen] if case.normalize else logits
        weights = {e: float((logits[e] - scores.logsumexp(0)).exp()) for e in chosen}
        if case.has_shared:
            weights[case.num_experts] = (
                1.0 if case.shared_gate is None else float((case.shared_gate.double() @ x).sigmoid())
            )
        out = row.clone()
        for expert, weight in weights.items():
            gate_up, down = (
                (dequantize(s).view(total, -1, s.shape[1]) if not isinstance(s, torch.Tensor) else s)[expert].double()
                for s in (case.gate_up, case.down)
            )
            gate, up = (gate_up @ x).chunk(2)
            out += weight * (down @ (F.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows).float()


CASES = {
    "shared, normalized": {},
    "no shared": {"has_shared": False},
    "softmax over all": {"normalize": False},
    "shared without a gate": {"gated_shared": False},
    "dense": {"gate_up_kind": None, "down_kind": None},
    "dense, no shared": {"gate_up_kind": None, "down_kind": None, "has_shared": False},
    "float32 router, kinds differ": {"router_dtype": torch.float32, "down_kind": "Q8_0"},
}


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_public_op_on_the_cpu_is_what_the_formula_says(options, m):
    case = random_case(m, torch.device("cpu"), **options)
    before = case.h.clone()
    torch.testing.assert_close(moe_block(case.h, **case.arguments())[0], one_by_one(case), rtol=1e-5, atol=1e-5)
    assert torch.equal(case.h, before)


@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("has_shared", [False, True])
def test_the_form_for_captures_is_the_reference(m, has_shared):
    case = random_case(m, torch.device("cpu"), gate_up_kind=None, down_kind=None, has_shared=has_shared)
    arguments = case.arguments()
    del arguments["num_experts"]
    torch.testing.assert_close(
        moe_block_dense(case.h, **arguments), moe_block_ref(case.h, **case.arguments()), rtol=1e-5, atol=1e-5
    )


def test_rounding_to_int8_costs_little():
    case = random_case(3, torch.device("cpu"))
    exact = moe_block_ref(case.h, **case.arguments()) - case.h
    rounded = moe_block_ref(case.h, **case.arguments(), int8_groups=(16, 8, 4)) - case.h
    # A step of int8 is 1/127 of the largest of 16, which is about twice the rest: 0.5 % of a random sum by uniform
    # rounding, in three factors; sums of 32 columns are not all random.
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


def test_one_node_for_tracing():
    case = random_case(3, torch.device("cpu"))
    meta = case.to("meta")
    found, *handed = moe_block(meta.h, **meta.arguments())
    assert (found.shape, found.dtype, found.device.type) == (case.h.shape, torch.float32, "meta")
    assert [t.shape for t in handed] == [(0,), (0,), (0,)]


def test_the_row_for_the_next_product():
    """Int8 times scale times the root is the norm, and tracing sees its shapes."""
    case = random_case(1, torch.device("cpu"), hidden=96)
    next_norm = torch.randn(96)
    plain, *nothing = moe_block(case.h, **case.arguments())
    assert [t.numel() for t in nothing] == [0, 0, 0]
    out, x, scale, squares = moe_block(case.h, **case.arguments(), next_norm=next_norm)
    assert torch.equal(out, plain)
    root = torch.rsqrt(squares.sum(-1) / 96 + case.eps)
    found = x.float() * scale.repeat_interleave(16, dim=1) * root
    step = scale.repeat_interleave(16, dim=1) * root
    assert bool(((found - rms_norm_ref(out, next_norm, case.eps, torch.float32)).abs() <= 0.501 * step).all())
    meta = case.to("meta")
    traced = moe_block(meta.h, **meta.arguments(), next_norm=next_norm.to("meta"))
    assert [(t.shape, t.dtype) for t in traced] == [(t.shape, t.dtype) for t in (out, x, scale, squares)]


def test_where_the_row_is_rounded_for_the_next_product():
    cpu = torch.device("cpu")
    case = random_case(1, cpu)
    assert hands_down(1, case.gate_up, case.down)
    assert not hands_down(2, case.gate_up, case.down)
    dense = random_case(1, cpu, gate_up_kind=None, down_kind=None)
    assert not hands_down(1, dense.gate_up, dense.down)
    wide = random_case(1, cpu, width=1056, num_experts=2, top_k=1)
    assert not hands_down(1, wide.gate_up, wide.down)
    for bad in (replace(case, h=case.h.repeat(2, 1)), dense, wide):
        with pytest.raises(KernelError, match="next_norm for one row, block weights"):
            moe_block(bad.h, **bad.arguments(), next_norm=case.norm)
    for wrong in (case.norm[:-1].clone(), case.norm.bfloat16()):
        with pytest.raises(KernelError, match=r"float32 next_norm \[64\]"):
            moe_block(case.h, **case.arguments(), next_norm=wrong)
    with pytest.raises(KernelError, match="next_norm on meta"):
        moe_block(case.h, **case.arguments(), next_norm=case.norm.to("meta"))


def test_misfits_are_refused_in_one_line():
    case = random_case(2, torch.device("cpu"))
    assert not isinstance(case.gate_up, torch.Tensor)
    for changed, said in (
        ({"h": case.h.bfloat16()}, "float32 h"),
        ({"norm": case.norm[:-1].clone()}, "float32 norm"),
        ({"router": case.router.half()}, "float32 or bfloat16"),
        ({"router": case.router[:-1].contiguous()}, "router"),
        ({"top_k": 0}, "top_k = 0"),
        ({"shared_gate": case.router[0].float()}, "router's torch.bfloat16"),
        ({"has_shared": False}, "only with has_shared"),
        ({"down": torch.zeros(9, 64, 32)}, "both as block weights"),
        ({"gate_up": case.gate_up.slice_rows(0, 64)}, r"gate_up \(576, 64\) for 9 experts"),
        ({"norm": case.norm.to("meta")}, "move them to one device"),
    ):
        bad = replace(case, **changed)
        with pytest.raises(KernelError, match=said) as caught:
            moe_block(bad.h, **bad.arguments())
        assert "\n" not in str(caught.value)
