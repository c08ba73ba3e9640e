"""The output product before a mixture of experts, which makes the router's logits and rounds the row as well."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.moe.ref import HANDED
from ostinato.kernels.registry import register
from ostinato.kernels.routed_linear.ref import Results, fold_router, routed_linear_ref
from ostinato.quant.blocks import BlockWeight

__all__ = ["fold_router", "routed_linear"]


def routed_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: BlockWeight,
    *,
    residual: torch.Tensor,
    norm: torch.Tensor,
    router: torch.Tensor,
    folded: torch.Tensor,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
) -> Results:
    """out = residual + x̂ Wᵀ of one row, with all that the experts behind it need of it, in one kernel.

    x: int8 [1, K] with scale float32 [1, K/32], and squares and eps as ``int8_linear`` takes them. weight: (N, K), N a
    multiple of 16. residual: float32 [1, N]. norm: float32 [N], the weight of the norm before the experts. router:
    float32 or bfloat16 [R, N], the router's rows and the shared gate's behind them. folded: float16 [R, K], of
    ``fold_router(router, norm, weight)``.

    Returns (out, next_x, next_scale, next_squares, logits): out float32 [1, N]; out * norm as int8 [1, N] with a scale
    float32 [1, N/16] for 16 columns, and the sums of out² over them, float32 [1, 1, N/16]; and logits float32 [1, R],
    router · (norm * out). Norm and logits lack 1 / rms(out), by which ``moe_block`` multiplies them.

    Logits come from router · (norm * residual) + folded · x̂, so that they need not wait for out: exact but for the
    rounding of ``folded``, 2^-11 of each of its elements. Raises KernelError.
    """
    n, k = weight.shape
    routes = router.shape[0] if router.dim() == 2 else 0
    floats = (torch.float32,)
    expected = {
        "x": (x, (1, k), (torch.int8,)),
        "scale": (scale, (1, k // 32), floats),
        "residual": (residual, (1, n), floats),
        "norm": (norm, (n,), floats),
        "router": (router, (routes, n), (torch.float32, torch.bfloat16)),
        "folded": (folded, (routes, k), (torch.float16,)),
    }
    if squares is not None:
        heads = squares.shape[1] if squares.dim() == 3 else 0
        if heads == 0 or k % (32 * heads):
            raise KernelError(
                f"routed_linear takes squares [1, heads, 4], heads of a multiple of 32 columns of {k}, got"
                f" {list(squares.shape)}"
            )
        expected["squares"] = (squares, (1, heads, 4), floats)
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise KernelError(
                f"routed_linear takes a contiguous {name} {list(shape)} of {' or '.join(str(d)[6:] for d in dtypes)},"
                f" got {list(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != weight.device:
            raise KernelError(
                f"routed_linear: the weight is on {weight.device}, {name} on {tensor.device}: move them to one device"
            )
    if n % HANDED:
        raise KernelError(f"routed_linear takes a weight of a multiple of {HANDED} rows, got {n}")
    if x.device.type == "cpu":
        return routed_linear_ref(x, scale, weight, squares, eps, residual, norm, router)
    result: Results = _routed_linear(x, scale, *weight.operands, squares, eps, residual, norm, router, folded)
    return result


def _routed_linear_cpu(
    x: torch.Tensor,
    scale: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    squares: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    norm: torch.Tensor,
    router: torch.Tensor,
    folded: torch.Tensor,
) -> Results:
    weight = BlockWeight.of(x.shape[1], words, d, high, m, sub_d, sub_m, kind)
    return routed_linear_ref(x, scale, weight, squares, eps, residual, norm, router)


def _routed_linear_fake(x: torch.Tensor, scale: torch.Tensor, words: torch.Tensor, *rest: object) -> Results:
    residual, router = rest[8], rest[10]
    assert isinstance(residual, torch.Tensor)
    assert isinstance(router, torch.Tensor)
    n = words.shape[0]
    groups = residual.new_empty((1, n // HANDED))
    return (
        torch.empty_like(residual), x.new_empty((1, n)), groups, groups.new_empty((1, 1, n // HANDED)),
        residual.new_empty((1, router.shape[0])),
    )  # fmt: skip


_routed_linear = register(
    "routed_linear(Tensor x, Tensor scale, Tensor words, Tensor d, Tensor? high, Tensor? m, Tensor? sub_d,"
    " Tensor? sub_m, str kind, Tensor? squares, float eps, Tensor residual, Tensor norm, Tensor router, Tensor folded)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_routed_linear_cpu,
    kernel="ostinato.kernels.routed_linear.triton:routed_linear",
    fake=_routed_linear_fake,
)
