"""Output products that route: random ones, and what their results must be."""

import torch

from ostinato.kernels.routed_linear import fold_router
from ostinato.kernels.routed_linear.ref import routed_linear_ref

from .block_weights import random_weight


def random_routed(kind: str, n: int, k: int, routes: int, heads: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Arguments of routed_linear by name, with a residual about as large as the product."""
    weight = random_weight(kind, n, k, device)
    return {
        "x": torch.randint(-127, 128, (1, k), dtype=torch.int8, device=device),
        "scale": (torch.rand(1, k // 32, device=device) + 0.1) * 0.02,
        "weight": weight,
        "squares": torch.rand(1, heads, 4, device=device) * k / heads if heads else None,
        "eps": 1e-5,
        "residual": torch.randn(1, n, device=device),
        "norm": torch.randn(n, device=device),
        "router": (torch.randn(routes, n, device=device) * n**-0.5).to(dtype),
    }


def assert_routed(found: tuple[torch.Tensor, ...], given: dict) -> None:
    out, x, scale, squares, logits = found
    expected = routed_linear_ref(**given)
    size = float(expected[0].abs().max())
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5 * size)
    # What is rounded is the kernel's own result, so a tie goes the same way in all but a few places.
    normed = out * given["norm"]
    steps = normed / expected[2].repeat_interleave(16, dim=1).clamp_min(1e-30)
    assert float((x.float() - steps).abs().max()) < 0.51
    torch.testing.assert_close(scale, expected[2], rtol=1e-4, atol=1e-7 * size)
    torch.testing.assert_close(squares, expected[3], rtol=1e-4, atol=1e-6 * size**2)
    # A folded element is off by 2^-11 of itself at most, those of a row at random: far below this share of their norm.
    folded = fold_router(given["router"], given["norm"], given["weight"]).float()
    wide = given["x"].float() * given["scale"].repeat_interleave(32, dim=1)
    if given["squares"] is not None:
        heads = given["squares"].shape[1]
        root = torch.rsqrt(given["squares"].sum(2) * heads / wide.shape[1] + given["eps"])
        wide = (wide.view(1, heads, -1) * root[:, :, None]).view(wide.shape)
    bound = 2**-11 * (folded.square() @ wide.square().T).sqrt().T * 4 + 1e-4 * size
    assert bool(((logits - expected[4]).abs() < bound).all())
