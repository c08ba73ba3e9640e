"""y = x Wᵀ for a block-quantized W, with the norm before it and bias, gate or residual after it in the same kernel."""

from __future__ import annotations

from typing import Any

import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear.eights import SPAN
from ostinato.kernels.block_linear.ref import (
    block_linear_ref,
    default_dtype,
    eights_linear_ref,
    int8_linear_beside_ref,
    int8_linear_ref,
)
from ostinato.kernels.gated import GATES
from ostinato.kernels.registry import load, register
from ostinato.quant.blocks import BlockWeight

__all__ = [
    "block_linear",
    "check_linear",
    "eights_linear",
    "int8_linear",
    "int8_linear_beside",
    "prefers_eights",
    "prefers_int8",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def block_linear(
    x: torch.Tensor,
    weight: BlockWeight,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """residual + act(x̂ Wᵀ + bias), where x̂ is x or rms_norm(x, norm, eps).

    x: [M, K] float32, bfloat16 or float16, rows of adjacent elements. weight: N rows of K columns.
    norm: float32 [K]. bias: [N] of floats. residual: float32 [M, N], contiguous; it is not written.
    gated: ``silu`` or ``gelu_tanh``: W holds F gate rows, then F up rows, and the result is act(gate) * up, [M, F].
    Returns [M, N] (or [M, F]) of ``out_dtype``; default: the residual's dtype, else x's.

    On a GPU up to 16 rows (up to 64 where that was measured to be faster) are rounded to int8 in groups of 32 columns
    (the path ``wide``: of the 64 or 128 of a group of W), and more are multiplied in bfloat16; sums are float32. On the
    CPU everything is float32. Raises KernelError.
    """
    check_linear("block_linear", x, weight.shape, weight.device, norm, bias, residual, gated)
    dtype = out_dtype or default_dtype(x, residual)
    if x.device.type == "cpu":
        return block_linear_ref(
            x, weight, norm=norm, eps=eps, bias=bias, residual=residual, gated=gated, out_dtype=dtype
        )
    result: torch.Tensor = _block_linear(x, *weight.operands, norm, eps, bias, residual, gated, dtype)
    return result


def int8_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: BlockWeight,
    *,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """residual + x̂ Wᵀ for x that its maker has rounded to int8 already: [M, N] of ``out_dtype``.

    x: int8 [M, K]; x̂ is x times its scales, float32 [M, K/32] or [M, K/16]. residual: float32 [M, N].
    squares: float32 [M, heads, parts] where x lacks the norm of its heads: a sum of squares for each, in parts; x̂ is
    then divided by sqrt(that sum / (K / heads) + eps), which its maker leaves to its consumer. ``delta_decode`` does
    with four parts and a scale for 32 columns, ``moe_block`` with one head, any number of parts, a scale for 16.
    Raises KernelError.
    """
    n, k = weight.shape
    rows = x.shape[0] if x.dim() == 2 else 0
    if x.shape != (rows, k) or x.dtype != torch.int8 or not x.is_contiguous():
        raise KernelError(f"int8_linear takes contiguous x int8 [M, {k}], got {tuple(x.shape)} {x.dtype}")
    fits = scale.shape in ((rows, k // 32), (rows, k // 16))
    if not fits or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise KernelError(
            f"int8_linear takes contiguous scales float32 [{rows}, {k // 32}] or [{rows}, {k // 16}], got"
            f" {tuple(scale.shape)} {scale.dtype}"
        )
    if residual is not None and (
        residual.shape != (rows, n) or residual.dtype != torch.float32 or not residual.is_contiguous()
    ):
        raise KernelError(
            f"int8_linear takes a contiguous float32 residual [{rows}, {n}], got"
            f" {tuple(residual.shape)} {residual.dtype}"
        )
    if squares is not None:
        if scale.shape[1] == k // 16:
            wanted = f"[{rows}, 1, parts] with a scale for 16 columns"
            fits = squares.dim() == 3 and squares.shape[:2] == (rows, 1) and squares.shape[2] > 0
        else:
            wanted = f"[{rows}, heads, 4], heads of a multiple of 32 columns of {k}, with a scale for 32"
            heads = squares.shape[1] if squares.dim() == 3 else 0
            fits = heads > 0 and squares.shape == (rows, heads, 4) and k % (32 * heads) == 0
        if not fits or squares.dtype != torch.float32 or not squares.is_contiguous():
            raise KernelError(
                f"int8_linear takes contiguous float32 squares {wanted}, got {tuple(squares.shape)} {squares.dtype}"
            )
    if out_dtype not in FLOATS:
        raise KernelError(f"int8_linear takes an out_dtype of floats, got {out_dtype}")
    for name, tensor in (("scale", scale), ("weight", weight), ("squares", squares), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise KernelError(f"int8_linear: x is on {x.device} and {name} on {tensor.device}: move them to one device")
    if x.device.type == "cpu":
        return int8_linear_ref(x, scale, weight, squares, eps, residual, out_dtype)
    result: torch.Tensor = _int8_linear(x, scale, *weight.operands, squares, eps, residual, out_dtype)
    return result


def int8_linear_beside(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: BlockWeight,
    *,
    squares: torch.Tensor,
    eps: float,
    h: torch.Tensor,
    norm: torch.Tensor,
    beside: torch.Tensor,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``int8_linear`` of one row and, in the same kernel, products with a matrix that is not quantized.

    x: int8 [1, K], scale: float32 [1, K/16] and squares: float32 [1, 1, parts], as the maker of the row ``h``, float32
    [1, K], rounded h * norm. norm: float32 [K]. beside: float32 or bfloat16 [R, K].

    Returns (out [1, N] of ``out_dtype``, float32 [1, R] rms_norm(h, norm, eps) · beside). Raises KernelError.
    """
    k, rows = weight.shape[1], beside.shape[0] if beside.dim() == 2 else 0
    floats = (torch.float32,)
    for name, tensor, shape, dtypes in (
        ("x", x, (1, k), (torch.int8,)),
        ("scale", scale, (1, k // 16), floats),
        ("squares", squares, (1, 1, squares.shape[-1] if squares.dim() else 0), floats),
        ("h", h, (1, k), floats),
        ("norm", norm, (k,), floats),
        ("beside", beside, (rows, k), (torch.float32, torch.bfloat16)),
    ):
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or not tensor.numel():
            raise KernelError(
                f"int8_linear_beside takes a contiguous {name} {list(shape)} of"
                f" {' or '.join(str(d)[6:] for d in dtypes)}, got {list(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != weight.device:
            raise KernelError(
                f"int8_linear_beside: the weight is on {weight.device}, {name} on {tensor.device}: move them to one"
                " device"
            )
    if out_dtype not in FLOATS:
        raise KernelError(f"int8_linear_beside takes an out_dtype of floats, got {out_dtype}")
    if x.device.type == "cpu":
        return int8_linear_beside_ref(x, scale, weight, squares, eps, h, norm, beside, out_dtype)
    result: tuple[torch.Tensor, torch.Tensor] = _int8_linear_beside(
        x, scale, *weight.operands, squares, eps, h, norm, beside, out_dtype
    )
    return result


def eights_linear(
    x: torch.Tensor, factors: torch.Tensor, weight: BlockWeight, *, rows: int, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + x̂ Wᵀ for ``rows`` rows that their maker has rounded to int8 by eight: float32 [rows, N].

    x: int8 [⌈rows / 8⌉, K / 128, 1024]. factors: float32 [⌈rows / 8⌉, K / 128, 8, 2]; see
    ``ostinato.kernels.block_linear.eights``. weight: of a kind with a scale for 128 columns and nothing below it.
    residual: float32 [rows, N]. Raises KernelError.
    """
    n, k = weight.shape
    if weight.kind.group != SPAN or weight.kind.bits != 4:
        raise KernelError(f"eights_linear takes four-bit weights in groups of {SPAN}, got {weight.kind.name}")
    shape = ((rows + 7) // 8, k // SPAN)
    for name, tensor, wanted, dtype in (
        ("x", x, (*shape, 8 * SPAN), torch.int8),
        ("factors", factors, (*shape, 8, 2), torch.float32),
        ("residual", residual, (rows, n), torch.float32),
    ):
        if tensor is None:
            continue
        if tensor.shape != wanted or tensor.dtype != dtype or not tensor.is_contiguous():
            raise KernelError(
                f"eights_linear takes contiguous {name} {list(wanted)} of {dtype}, got {list(tensor.shape)}"
                f" {tensor.dtype}"
            )
        if tensor.device != weight.device:
            raise KernelError(
                f"eights_linear: {name} is on {tensor.device} and weight on {weight.device}: move them to one device"
            )
    if x.device.type == "cpu":
        return eights_linear_ref(x, factors, weight, rows, residual)
    result: torch.Tensor = _eights_linear(
        x, factors, weight.words, weight.d, weight.m, weight.kind.name, rows, residual
    )
    return result


def prefers_eights(weight: BlockWeight, rows: int) -> bool:
    """Whether a maker of x [rows, K] that can round it by eight should, and leave the product to ``eights_linear``.

    So where ``block_linear`` would round it so by a kernel of its own.
    """
    if weight.device.type != "cuda" or weight.kind.group != SPAN or weight.kind.bits != 4:
        return False
    n, k = weight.shape
    choose = load("ostinato.kernels.block_linear.triton:choose")
    return bool(choose(weight.kind.name, n, k, rows, False, weight.device).path == "wide")


def prefers_int8(weight: BlockWeight, rows: int) -> bool:
    """Whether a maker of x [rows, K] that can round it to int8 should, and leave the product to ``int8_linear``.

    So where ``block_linear`` would round x by a kernel of its own before the same product, or where the table has tiles
    that were measured for rounded x. Elsewhere each program of the product rounds x as it reads it, which costs little
    for a short x; on a CPU x is not rounded at all.
    """
    if weight.device.type != "cuda":
        return False
    n, k = weight.shape
    found: bool = load("ostinato.kernels.block_linear.triton:prefers_int8")(weight.kind.name, n, k, rows, weight.device)
    return found


def check_linear(
    op: str,
    x: torch.Tensor,
    shape: tuple[int, int],
    device: torch.device,
    norm: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
) -> None:
    """Raise KernelError unless the arguments fit a weight of ``shape`` [N, K] on ``device``."""
    n, k = shape
    if x.dim() != 2 or x.shape[1] != k or x.dtype not in FLOATS or (x.stride(1) != 1 and k > 1):
        raise KernelError(
            f"{op} takes x [M, {k}] of floats with adjacent columns for a weight {shape}, got {tuple(x.shape)}"
            f" {x.dtype} with strides {x.stride()}"
        )
    if gated is not None and (gated not in GATES or n % 2):
        raise KernelError(f"{op} takes gated = {' or '.join(GATES)} and an even number of rows, got {gated!r} and {n}")
    if gated is not None and residual is not None:
        raise KernelError(f"{op} takes either gated or residual, not both")
    if norm is not None and (norm.shape != (k,) or norm.dtype != torch.float32 or not norm.is_contiguous()):
        raise KernelError(f"{op} takes a float32 norm [{k}], got {tuple(norm.shape)} {norm.dtype}")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOATS or not bias.is_contiguous()):
        raise KernelError(f"{op} takes a bias [{n}] of floats, got {tuple(bias.shape)} {bias.dtype}")
    if residual is not None and (
        residual.shape != (x.shape[0], n) or residual.dtype != torch.float32 or not residual.is_contiguous()
    ):
        raise KernelError(
            f"{op} takes a contiguous float32 residual [{x.shape[0]}, {n}], got"
            f" {tuple(residual.shape)} {residual.dtype}"
        )
    for name, tensor in (("weight", device), ("norm", norm), ("bias", bias), ("residual", residual)):
        found = tensor.device if isinstance(tensor, torch.Tensor) else tensor
        if found is not None and found != x.device:
            raise KernelError(f"{op}: x is on {x.device} and {name} on {found}: move them to one device")


def _block_linear_cpu(
    x: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = BlockWeight.of(x.shape[1], words, d, high, m, sub_d, sub_m, kind)
    return block_linear_ref(
        x,
        weight,
        norm=norm,
        eps=eps,
        bias=bias,
        residual=residual,
        gated=gated,
        out_dtype=out_dtype,
    )


def _block_linear_fake(
    x: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    rows = words.shape[0] if gated is None else words.shape[0] // 2
    return x.new_empty((x.shape[0], rows), dtype=out_dtype)


_block_linear = register(
    "block_linear(Tensor x, Tensor words, Tensor d, Tensor? high, Tensor? m, Tensor? sub_d, Tensor? sub_m, str kind,"
    " Tensor? norm, float eps, Tensor? bias, Tensor? residual, str? gated, ScalarType out_dtype) -> Tensor",
    reference=_block_linear_cpu,
    kernel="ostinato.kernels.block_linear.triton:block_linear",
    fake=_block_linear_fake,
)


def _int8_linear_cpu(
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
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = BlockWeight.of(x.shape[1], words, d, high, m, sub_d, sub_m, kind)
    return int8_linear_ref(x, scale, weight, squares, eps, residual, out_dtype)


_int8_linear = register(
    "int8_linear(Tensor x, Tensor scale, Tensor words, Tensor d, Tensor? high, Tensor? m, Tensor? sub_d, Tensor? sub_m,"
    " str kind, Tensor? squares, float eps, Tensor? residual, ScalarType out_dtype) -> Tensor",
    reference=_int8_linear_cpu,
    kernel="ostinato.kernels.block_linear.triton:int8_linear",
    fake=lambda x, scale, words, *rest: x.new_empty((x.shape[0], words.shape[0]), dtype=rest[-1]),
)


def _int8_linear_beside_cpu(
    x: torch.Tensor,
    scale: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    squares: torch.Tensor,
    eps: float,
    h: torch.Tensor,
    norm: torch.Tensor,
    beside: torch.Tensor,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = BlockWeight.of(x.shape[1], words, d, high, m, sub_d, sub_m, kind)
    return int8_linear_beside_ref(x, scale, weight, squares, eps, h, norm, beside, out_dtype)


def _int8_linear_beside_fake(
    x: torch.Tensor, scale: torch.Tensor, words: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((1, words.shape[0]), dtype=rest[-1]), scale.new_empty((1, rest[-2].shape[0]))


_int8_linear_beside = register(
    "int8_linear_beside(Tensor x, Tensor scale, Tensor words, Tensor d, Tensor? high, Tensor? m, Tensor? sub_d,"
    " Tensor? sub_m, str kind, Tensor squares, float eps, Tensor h, Tensor norm, Tensor beside, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
    reference=_int8_linear_beside_cpu,
    kernel="ostinato.kernels.block_linear.triton:int8_linear_beside",
    fake=_int8_linear_beside_fake,
)


def _eights_linear_cpu(
    x: torch.Tensor,
    factors: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    m: torch.Tensor | None,
    kind: str,
    rows: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    weight = BlockWeight.of(x.shape[1] * SPAN, words, d, None, m, None, None, kind)
    return eights_linear_ref(x, factors, weight, rows, residual)


_eights_linear = register(
    "eights_linear(Tensor x, Tensor factors, Tensor words, Tensor d, Tensor? m, str kind, int rows, Tensor? residual)"
    " -> Tensor",
    reference=_eights_linear_cpu,
    kernel="ostinato.kernels.block_linear.triton:eights_linear",
    fake=lambda x, factors, words, d, m, kind, rows, residual: factors.new_empty((rows, words.shape[0])),
)
