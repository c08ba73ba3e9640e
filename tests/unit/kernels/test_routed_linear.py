"""The output product that routes: its kernel against plain PyTorch, at tiny and odd shapes."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear import int8_linear
from ostinato.kernels.registry import load
from ostinato.kernels.routed_linear import fold_router, routed_linear

from .block_weights import columns, operands
from .routed_cases import assert_routed, random_routed


def tiles(rows: int = 16, groups: int = 8, warps: int = 1, routes: int = 4):
    return load("ostinato.kernels.routed_linear.triton:RoutedTiles")(rows, groups, warps, routes)


def launch(given: dict, chosen) -> tuple[torch.Tensor, ...]:
    g = given
    folded = fold_router(g["router"], g["norm"], g["weight"])
    return load("ostinato.kernels.routed_linear.triton:routed_linear")(
        g["x"], g["scale"], *operands(g["weight"]), g["squares"], g["eps"], g["residual"], g["norm"], g["router"],
        folded, chosen,
    )  # fmt: skip


SIZES = {
    "plain": ({}, {}),
    "rows and groups beyond the last": ({"n": 80, "k": 96}, {"rows": 32, "groups": 4}),
    "several steps over the columns": ({"k": 512}, {"groups": 4, "warps": 1}),
    "several warps, rows side by side": ({"k": 256}, {"rows": 32, "groups": 4, "warps": 2}),
    "more of h than of x": ({"n": 320, "k": 64}, {"groups": 2}),
    "a route a program": ({"routes": 3}, {"routes": 1}),
    "more routes a program than there are": ({"routes": 1}, {"routes": 4}),
    "a norm of heads, left to this product": ({"heads": 2}, {}),
    "a float32 router": ({"dtype": torch.float32}, {}),
}


@pytest.mark.parametrize(("sizes", "fields"), SIZES.values(), ids=SIZES)
def test_sizes_and_ways_of_cutting(sizes, fields, device):
    shape = {"n": 48, "k": 128, "routes": 7, "heads": 0, "dtype": torch.bfloat16, **sizes}
    given = random_routed("Q8_0", **shape, device=device)
    assert_routed(launch(given, tiles(**fields)), given)


@pytest.mark.parametrize("kind", ["I4_128", "I4_64", "Q4_1", "Q4_K", "Q6_K"])
def test_kinds_of_blocks(kind, device):
    given = random_routed(kind, 32, columns(kind, 256), 5, 2, torch.bfloat16, device)
    assert_routed(launch(given, tiles()), given)


def test_the_rule_and_the_public_op(device):
    given = random_routed("I4_128", 64, 256, 9, 2, torch.bfloat16, device)
    assert_routed(launch(given, None), given)
    folded = fold_router(given["router"], given["norm"], given["weight"])
    found = routed_linear(**given, folded=folded)
    assert_routed(found, given)
    plain = int8_linear(
        given["x"], given["scale"], given["weight"], squares=given["squares"], eps=1e-5, residual=given["residual"]
    )
    torch.testing.assert_close(found[0], plain, rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_is_named(device):
    given = random_routed("Q8_0", 48, 128, 7, 0, torch.bfloat16, device)
    folded = fold_router(given["router"], given["norm"], given["weight"])
    for name, wrong in (
        ("x", given["x"].float()),
        ("scale", given["scale"][:, 1:]),
        ("residual", given["residual"].bfloat16()),
        ("norm", given["norm"][1:]),
        ("router", given["router"].half()),
    ):
        with pytest.raises(KernelError, match=f"contiguous {name} "):
            routed_linear(**{**given, name: wrong}, folded=folded)
    with pytest.raises(KernelError, match="contiguous folded "):
        routed_linear(**given, folded=folded.float())
    with pytest.raises(KernelError, match=r"squares \[1, heads, 4\]"):
        routed_linear(**{**given, "squares": torch.ones(1, 3, 4, device=device)}, folded=folded)
    odd = random_routed("Q8_0", 40, 128, 7, 0, torch.bfloat16, device)
    with pytest.raises(KernelError, match="a multiple of 16 rows"):
        routed_linear(**odd, folded=fold_router(odd["router"], odd["norm"], odd["weight"]))
