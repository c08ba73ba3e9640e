"""The kernels of moe_block against plain PyTorch, at tiny and odd shapes, for every kind of block."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.moe import _operands, moe_block
from ostinato.kernels.moe.ref import hand_down_ref, moe_block_ref
from ostinato.kernels.registry import load
from ostinato.quant.blocks import KINDS

from .moe_cases import MoeCase, random_case


def tiles(**fields):
    found = load("ostinato.kernels.moe.triton:MoeTiles")
    return found(**{"router_rows": 2, "router_warps": 1, "gate_rows": 16, "gate_warps": 1, "down_rows": 16,
                    "down_warps": 1, "router_tokens": 2, "tokens": 2, **fields})  # fmt: skip


def launch_all(
    case: MoeCase, chosen=None, next_norm: torch.Tensor | None = None, routed=(None,) * 4
) -> tuple[torch.Tensor, ...]:
    kernel = load("ostinato.kernels.moe.triton:moe_block")
    return kernel(
        case.h, case.norm, case.eps, case.router, case.shared_gate, *_operands(case.gate_up), *_operands(case.down),
        case.num_experts, case.top_k, case.normalize, case.has_shared, next_norm, *routed, chosen,
    )  # fmt: skip


def launch(case: MoeCase, chosen=None) -> torch.Tensor:
    out, *handed = launch_all(case, chosen)
    assert [t.numel() for t in handed] == [0, 0, 0]
    return out


def assert_close(found: torch.Tensor, case: MoeCase, chosen=None) -> None:
    """The kernels differ from their model by ties of rounding: a step of int8 in a few of the many activations."""
    chosen = chosen or tiles()
    of_shared = None
    if case.h.shape[0] == 1 or chosen.apart:
        one_token = load("ostinato.kernels.moe.triton:one_token")
        sizes = case.h.shape[1], case.down.shape[-1], case.top_k, case.has_shared
        of_shared = one_token(chosen, *sizes).shared
    assert_modelled(found, case, chosen.int8_groups(of_shared))


def assert_modelled(found: torch.Tensor, case: MoeCase, int8_groups: tuple[int, int, int]) -> None:
    model = moe_block_ref(case.h, **case.arguments(), int8_groups=int8_groups) - case.h
    assert (found - case.h - model).norm() < 2e-3 * model.norm()


SMALL = {"num_experts": 5, "top_k": 2, "hidden": 32}


# The kernels for one token and for several share all code that knows a kind; the GPU tests have every pair.
PAIRS = [(kind, 1, True) for kind in KINDS if kind not in ("Q4_1", "Q5_1", "I4_32")]
PAIRS += [(kind, 2, apart) for kind in ("I4_64", "Q6_K") for apart in (False, True)]


@pytest.mark.parametrize(("kind", "m", "apart"), PAIRS)
def test_every_kind_of_block(kind, m, apart, device):
    size = KINDS[kind].block
    case = random_case(m, device, hidden=size, width=size, gate_up_kind=kind, down_kind=kind, num_experts=2, top_k=1)
    chosen = tiles(gate_rows=16, gate_warps=2, down_rows=64, apart=apart)
    assert_close(launch(case, chosen), case, chosen)


OPTIONS = {
    "no shared": {"has_shared": False},
    "softmax over all": {"normalize": False},
    "shared without a gate": {"gated_shared": False},
    "float32 router": {"router_dtype": torch.float32},
    "kinds differ, odd sizes": {"gate_up_kind": "Q8_0", "down_kind": "I4_32", "hidden": 96, "width": 32},
    "one expert": {"num_experts": 1, "top_k": 1},
    "more experts than threads": {"num_experts": 37, "top_k": 3},
}


@pytest.mark.parametrize(("m", "apart"), [(1, True), (2, False), (3, True)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_and_odd_sizes(options, m, apart, device):
    case = random_case(m, device, **{**SMALL, **options})
    before = case.h.clone()
    assert_close(launch(case, tiles(apart=apart)), case, tiles(apart=apart))
    assert torch.equal(case.h, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"early": False},
        {"down_warps": 2},
        {"down_warps": 1, "together": 2},
        {"gate_warps": 2, "gate_rows": 8},
        {"down_rows": 8, "gate_rows": 4},
    ],
    ids=lambda fields: ", ".join(f"{name} {value}" for name, value in fields.items()),
)
def test_ways_of_cutting(fields, device):
    for m in (1, 2):
        case = random_case(m, device, hidden=96, width=32, num_experts=3, top_k=1)
        assert_close(launch(case, tiles(**fields)), case, tiles(**fields))


def test_tokens_that_all_take_one_expert(device):
    case = random_case(5, device, num_experts=6, top_k=1)
    case.h.copy_(case.h[0] + 0.01 * case.h)
    for tokens in (2, 4):
        assert_close(launch(case, tiles(tokens=tokens)), case)


@pytest.mark.parametrize(("top_k", "experts", "width"), [(8, 40, 128), (6, 9, 96), (2, 33, 32), (3, 5, 64)])
def test_two_picks_a_program(top_k, experts, width, device):
    """Rows of two picks beside those of the shared expert, of which the last programs have none."""
    chosen = tiles(gate_warps=8, down_warps=1, apart=True)
    for m, shared in ((1, True), (1, False), (2, True)):
        case = random_case(m, device, hidden=192, width=width, num_experts=experts, top_k=top_k, has_shared=shared)
        assert_close(launch(case, chosen), case, chosen)


@pytest.mark.parametrize(
    ("m", "fields", "options"),
    [
        (2, {"down_depth": 1}, {"hidden": 512, "width": 256, "num_experts": 2}),
        (11, {"gate_tiles": 2, "down_tiles": 2}, {"num_experts": 2}),
        (3, {"down_tiles": 2, "down_warps": 8}, {"hidden": 384, "has_shared": False}),
    ],
)
def test_lists_on_tensor_cores(m, fields, options, device):
    """Eight and more picks of an expert, even and odd numbers of groups, rows beyond the last tile."""
    sizes = {"hidden": 256, "width": 128, "num_experts": 3, "top_k": 1, **options}
    case = random_case(m, device, gate_up_kind="I4_128", down_kind="I4_128", **sizes)
    found = launch(case, tiles(**{"integer": True, "tokens": 8, "down_warps": 4, **fields}))
    assert_modelled(found, case, (128, 128, 128))


def test_tensor_cores_take_lists_of_one_kind():
    rule = load("ostinato.kernels.moe.triton:default_tiles")
    ours = ("I4_128", "I4_128")
    assert [rule(m, 2048, 512, ours, m / 4).integer for m in (1, 4, 8, 64)] == [False, False, True, True]
    assert not rule(8, 2048, 512, ("I4_128", "Q4_K"), 2.0).integer
    assert rule(8, 2048, 512, ours, 2.0).int8_groups() == (128, 128, 128)
    assert rule(4, 2048, 512, ours, 2.0).int8_groups() == (16, 16, 16)


def test_tokens_stay_apart_where_they_share_few_experts():
    rule = load("ostinato.kernels.moe.triton:default_tiles")
    for kinds in (("I4_128", "I4_128"), ("Q4_K", "Q6_K")):
        assert [rule(m, 2048, 512, kinds, m * 8 / 256).apart for m in (1, 2, 12, 13, 64)] == [True] * 3 + [False] * 2
        assert [rule(m, 2048, 512, kinds, m * 2 / 8).apart for m in (1, 2)] == [True, False]
        assert not rule(17, 2048, 512, kinds, 0.01).apart


def test_the_choice_sorts_what_a_lane_holds():
    """A network that sorts all zeros and ones sorts everything."""
    network = load("ostinato.kernels.moe.choice.triton:_sorting_network")
    for n in (1, 2, 4, 8, 16):
        values = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1
        for low, upp in network(n):
            pair = values[:, [low, upp]]
            values[:, low], values[:, upp] = pair.amax(1), pair.amin(1)
        assert torch.equal(values, values.sort(1, descending=True).values)


def test_equal_logits_go_to_the_lower_expert(device):
    case = random_case(1, device, num_experts=6, top_k=2, has_shared=False)
    case.router.zero_()
    case.router[4] = 1.0
    case.h.abs_()
    change = launch(case, tiles()) - case.h
    case.router[0] = 1e-3  # the reference is told whom to take
    expected = moe_block_ref(case.h, **case.arguments(), int8_groups=(16, 16, 16)) - case.h
    assert (change - expected).norm() < 2e-2 * expected.norm()


def assert_handed(found: tuple[torch.Tensor, ...], next_norm: torch.Tensor) -> None:
    """What was handed on is the model's of the kernel's own result."""
    out, x, scale, squares = found
    expected_x, expected_scale, expected_squares = hand_down_ref(out, next_norm)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares, expected_squares, rtol=1e-5, atol=0)  # sums of 16
    off = (x.int() - expected_x.int()).abs()
    # The quotient 127 / largest is off by a few 2**-24, so only what lies that close to a tie goes another way.
    steps = out * next_norm / expected_scale.repeat_interleave(16, dim=1)
    assert int(off.max()) <= 1
    assert bool((off[0][((steps - steps.floor()) - 0.5).abs()[0] > 1e-4] == 0).all())


HANDED = {
    "several scales a program, rows beyond the last": ({}, {}),
    "a scale a program": ({"down_rows": 4}, {"width": 256, "hidden": 64, "top_k": 1}),
    "a scale over two warps": ({"down_rows": 2, "down_warps": 2}, {"width": 256, "hidden": 32, "top_k": 1}),
    "picks side by side": ({"down_rows": 8, "together": 2}, {"width": 256, "hidden": 32}),
    "loads after the wait, no shared": ({"early": False}, {"has_shared": False}),
    "kinds differ, odd sizes": ({}, {"gate_up_kind": "Q8_0", "down_kind": "I4_32", "hidden": 160}),
    "super-groups": ({"down_rows": 4}, {"down_kind": "Q4_K", "width": 256, "hidden": 32, "top_k": 1}),
}


@pytest.mark.parametrize(("fields", "sizes"), HANDED.values(), ids=HANDED)
def test_the_row_is_rounded_for_the_next_product(fields, sizes, device):
    case = random_case(1, device, **{"hidden": 96, "num_experts": 3, "top_k": 2, **sizes})
    next_norm = torch.randn(case.h.shape[1], device=device)
    found = launch_all(case, tiles(**fields), next_norm)
    assert_close(found[0], case)
    assert_handed(found, next_norm)


def routed_by_hand(case: MoeCase) -> tuple[torch.Tensor, ...]:
    """What ``routed_linear`` makes of h beside it."""
    rows = [case.router] if case.shared_gate is None else [case.router, case.shared_gate.view(1, -1)]
    return *hand_down_ref(case.h, case.norm), (case.h * case.norm) @ torch.cat(rows).float().T


ROUTED = {
    "plain": ({}, {}),
    "more experts than threads": ({}, {"num_experts": 37, "top_k": 3}),
    "softmax over all, no shared": ({}, {"normalize": False, "has_shared": False}),
    "shared without a gate": ({"early": False}, {"gated_shared": False}),
    "picks side by side": ({"down_rows": 8, "together": 2}, {"width": 256, "hidden": 32}),
}


@pytest.mark.parametrize("hands_down", [False, True])
@pytest.mark.parametrize(("fields", "sizes"), ROUTED.values(), ids=ROUTED)
def test_a_row_that_is_routed_already(fields, sizes, hands_down, device):
    """As if the router had run: the same experts and weights, from logits that lack the norm's root."""
    case = random_case(1, device, **{"hidden": 96, "num_experts": 5, "top_k": 2, **sizes})
    next_norm = torch.randn(case.h.shape[1], device=device) if hands_down else None
    found = launch_all(case, tiles(**fields), next_norm, routed_by_hand(case))
    assert_close(found[0], case)
    if next_norm is not None:
        assert_handed(found, next_norm)


def test_what_is_routed_must_fit(device):
    case = random_case(1, device, hidden=96)
    x, scale, squares, logits = routed_by_hand(case)
    for name, wrong in (
        ("x", (x[:, 1:], scale, squares, logits)),
        ("scale", (x, scale.double(), squares, logits)),
        ("squares", (x, scale, squares[0], logits)),
        ("logits", (x, scale, squares, logits[:, 1:])),
    ):
        with pytest.raises(KernelError, match=f"contiguous routed {name} "):
            moe_block(case.h, **case.arguments(), routed=wrong)
    several = random_case(2, device, hidden=96)
    with pytest.raises(KernelError, match="takes routed for one row"):
        moe_block(several.h, **several.arguments(), routed=routed_by_hand(several))


def test_columns_of_zeros_are_handed_on_as_zeros(device):
    case = random_case(1, device, hidden=96)
    next_norm = torch.rand(96, device=device)
    next_norm[16:32] = 0.0
    _, x, scale, squares = launch_all(case, tiles(), next_norm)
    assert float(scale[0, 1]) == 0.0
    assert int(x[0, 16:32].abs().max()) == 0
    assert float(squares[0, 0, 1]) > 0.0


def test_the_rule_gives_each_program_whole_scales(device):
    rule = load("ostinato.kernels.moe.triton:default_tiles")
    for width in range(32, 1025, 32):
        t = rule(1, 2048, width, ("Q8_0", "Q8_0"), 0.1, True)
        threads = t.down_warps * 32 // (1 << (width // 32 - 1).bit_length())
        assert t.down_rows * (threads // t.together) % 16 == 0, width
    assert rule(1, 2048, 512, ("Q8_0", "Q8_0"), 0.1, True) == rule(1, 2048, 512, ("Q8_0", "Q8_0"), 0.1)
    case = random_case(1, device)
    with pytest.raises(KernelError, match="8 rows a program of down are no multiple of 16"):
        launch_all(case, tiles(down_rows=1, together=4), case.norm)


def test_lists_of_picks(device):
    sort = load("ostinato.kernels.moe.route.triton:_sort_kernel")
    m, k, experts, size = 9, 2, 5, 4
    chosen = torch.stack([torch.randperm(experts)[:k] for _ in range(m)]).int()
    ids = torch.cat((chosen, torch.full((m, 1), experts, dtype=torch.int32)), 1).to(device)
    number = min(experts, m * k) + m * k // size
    order = torch.full((m * k,), -1, dtype=torch.int32, device=device)
    blocks = torch.full((number, 4), -7, dtype=torch.int32, device=device)
    places = torch.empty(32, dtype=torch.int32, device=device)
    sort[(1,)](
        ids, order, places, blocks, m, experts, number, 32, k, k + 1, 32, size, -(-m // size), num_warps=1, PDL=False
    )
    seen = []
    for expert, first, stop, _ in blocks.tolist():
        assert 0 <= stop - first <= size
        for row in order[first:stop].tolist():
            assert int(ids.flatten()[row]) == expert
            seen.append(row)
    assert sorted(seen) == [t * (k + 1) + j for t in range(m) for j in range(k)]


def test_no_tokens(device):
    case = random_case(0, device)
    assert launch(case).shape == (0, 64)
