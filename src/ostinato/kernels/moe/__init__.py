"""A mixture-of-experts block: norm, router, top-k, gated experts, shared expert and residual in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ostinato.errors import KernelError
from ostinato.kernels.moe.ref import (
    DENSE,
    HANDED,
    MAX_HANDED_WIDTH,
    PLANES,
    Stack,
    hand_down_ref,
    moe_block_ref,
    stack_of,
)
from ostinato.kernels.registry import register
from ostinato.quant.blocks import BlockWeight

__all__ = ["hands_down", "moe_block"]

ROUTED = ("x", "scale", "squares", "logits")

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def hands_down(rows: int, gate_up: Stack, down: Stack) -> bool:
    """Whether ``moe_block`` takes a ``next_norm`` for so many rows and these stacks."""
    blocks = isinstance(gate_up, BlockWeight) and isinstance(down, BlockWeight)
    return rows == 1 and blocks and gate_up.shape[1] % HANDED == 0 and down.shape[1] <= MAX_HANDED_WIDTH


def moe_block(
    h: torch.Tensor,
    *,
    norm: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    num_experts: int,
    top_k: int,
    normalize: bool = True,
    shared_gate: torch.Tensor | None = None,
    has_shared: bool = False,
    next_norm: torch.Tensor | None = None,
    routed: Routed | None = None,
) -> Results:
    """h + Σ_k w_k · down_k(silu(gate_k x̂) · up_k x̂) + w_shared · shared(x̂) with x̂ = rms_norm(h, norm, eps).

    h: float32 [M, H], contiguous; it is not written. norm: float32 [H]. router: float32 or bfloat16 [E, H].
    gate_up, down: stacks of E experts, or of E + 1 with ``has_shared``, whose last is the shared one: block weights of
    (E · 2F, H) and (E · H, F), or float tensors [E, 2F, H] and [E, H, F]. An expert has F gate rows, then F up rows.
    w_k: softmax of the chosen ``top_k`` logits or, without ``normalize``, of all. w_shared: sigmoid(shared_gate · x̂)
    for a shared_gate [H] or [1, H] of the router's dtype, else 1. Raises KernelError.

    Returns (out, x, scale, squares). out: float32 [M, H]. The others are empty, or with ``next_norm`` float32 [H], the
    weight of the norm that follows, what ``int8_linear`` takes in place of rms_norm(out, next_norm, eps): x is
    out * next_norm as int8 [1, H] with a scale float32 [1, H/16] for 16 columns, and squares float32 [1, 1, H/16] are
    the sums of out² over them. Only where ``hands_down``.

    routed: what ``routed_linear`` made of h beside it: h * norm as int8 [1, H], its scale [1, H/16], the squares
    [1, 1, H/16] and the logits [1, E], or [1, E + 1] with a shared_gate, both without 1 / rms(h). The router then does
    not run. Only where ``hands_down``.

    On a GPU up to 64 rows are rounded to int8, 4 to 128 columns to a scale, before products with block weights, and
    more are rounded to bfloat16; logits and sums are float32. Logits that agree in their upper 32 - log2(E) bits may
    count as equal when experts are chosen; of equal ones the lower number wins. Dense stacks are multiplied in float32.
    """
    gate = None if shared_gate is None else shared_gate.reshape(-1)
    _check(h, norm, router, gate_up, down, num_experts, top_k, gate, has_shared, next_norm, routed)
    if h.device.type == "cpu":
        out = moe_block_ref(
            h, norm=norm, eps=eps, router=router, gate_up=gate_up, down=down, num_experts=num_experts, top_k=top_k,
            normalize=normalize, shared_gate=gate, has_shared=has_shared,
        )  # fmt: skip
        return out, *_handed_cpu(out, next_norm)
    result: Results = _moe_block(
        h, norm, eps, router, gate, *_operands(gate_up), *_operands(down), num_experts, top_k, normalize, has_shared,
        next_norm, *(routed or (None, None, None, None)),
    )  # fmt: skip
    return result


def _check(
    h: torch.Tensor,
    norm: torch.Tensor,
    router: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    num_experts: int,
    top_k: int,
    gate: torch.Tensor | None,
    has_shared: bool,
    next_norm: torch.Tensor | None,
    routed: Routed | None,
) -> None:
    if h.dim() != 2 or h.dtype != torch.float32 or not h.is_contiguous():
        raise KernelError(f"moe_block takes a contiguous float32 h [M, H], got {tuple(h.shape)} {h.dtype}")
    hidden = h.shape[1]
    if norm.shape != (hidden,) or norm.dtype != torch.float32 or not norm.is_contiguous():
        raise KernelError(f"moe_block takes a float32 norm [{hidden}], got {tuple(norm.shape)} {norm.dtype}")
    floats = (torch.float32, torch.bfloat16)
    if router.shape != (num_experts, hidden) or router.dtype not in floats or not router.is_contiguous():
        raise KernelError(
            f"moe_block takes a contiguous router [{num_experts}, {hidden}] of float32 or bfloat16, got"
            f" {tuple(router.shape)} {router.dtype}"
        )
    if not 1 <= top_k <= num_experts:
        raise KernelError(f"moe_block takes 1 … {num_experts} experts a token, got top_k = {top_k}")
    if gate is not None and (gate.shape != (hidden,) or gate.dtype != router.dtype or not gate.is_contiguous()):
        raise KernelError(
            f"moe_block takes a shared_gate [{hidden}] of the router's {router.dtype}, got {tuple(gate.shape)}"
            f" {gate.dtype}"
        )
    if gate is not None and not has_shared:
        raise KernelError("moe_block takes a shared_gate only with has_shared, where the stacks hold a shared expert")
    if isinstance(gate_up, BlockWeight) != isinstance(down, BlockWeight):
        raise KernelError("moe_block takes gate_up and down both as block weights or both as dense tensors")
    total = num_experts + has_shared
    width = down.shape[-1]
    if isinstance(gate_up, BlockWeight):
        expected: tuple[tuple[int, ...], tuple[int, ...]] = ((total * 2 * width, hidden), (total * hidden, width))
    else:
        expected = ((total, 2 * width, hidden), (total, hidden, width))
    for name, stack, shape in (("gate_up", gate_up, expected[0]), ("down", down, expected[1])):
        if tuple(stack.shape) != shape:
            raise KernelError(f"moe_block takes {name} {shape} for {total} experts, got {tuple(stack.shape)}")
        if isinstance(stack, torch.Tensor) and not stack.is_floating_point():
            raise KernelError(f"moe_block takes {name} of floats or a block weight, got {stack.dtype}")
    if next_norm is not None:
        if not hands_down(h.shape[0], gate_up, down):
            raise KernelError(
                f"moe_block takes next_norm for one row, block weights, H of a multiple of {HANDED} and experts of up"
                f" to {MAX_HANDED_WIDTH}, got {tuple(h.shape)}, {type(down).__name__} and experts of {width}"
            )
        if next_norm.shape != (hidden,) or next_norm.dtype != torch.float32 or not next_norm.is_contiguous():
            raise KernelError(
                f"moe_block takes a float32 next_norm [{hidden}], got {tuple(next_norm.shape)} {next_norm.dtype}"
            )
    if routed is not None:
        if not hands_down(h.shape[0], gate_up, down):
            raise KernelError(
                f"moe_block takes routed for one row, block weights, H of a multiple of {HANDED} and experts of up to"
                f" {MAX_HANDED_WIDTH}, got {tuple(h.shape)}, {type(down).__name__} and experts of {width}"
            )
        groups = hidden // HANDED
        shapes = ((1, hidden), (1, groups), (1, 1, groups), (1, num_experts + (gate is not None)))
        dtypes = (torch.int8, torch.float32, torch.float32, torch.float32)
        for name, part, shape, dtype in zip(ROUTED, routed, shapes, dtypes, strict=True):
            if part.shape != shape or part.dtype != dtype or not part.is_contiguous():
                raise KernelError(
                    f"moe_block takes a contiguous routed {name} {list(shape)} of {str(dtype)[6:]}, got"
                    f" {list(part.shape)} {part.dtype}"
                )
            if part.device != h.device:
                raise KernelError(f"moe_block: h is on {h.device} and routed {name} on {part.device}")
    places = {
        "norm": norm, "router": router, "gate_up": gate_up, "down": down, "shared_gate": gate, "next_norm": next_norm
    }  # fmt: skip
    for name, tensor in places.items():
        if tensor is not None and tensor.device != h.device:
            raise KernelError(f"moe_block: h is on {h.device} and {name} on {tensor.device}: move them to one device")


def _operands(stack: Stack) -> tuple[list[torch.Tensor | None], str]:
    """A stack as the registered op takes it: its planes and the name of its kind, or a tensor and ``dense``."""
    if isinstance(stack, torch.Tensor):
        return [stack], DENSE
    return [getattr(stack, name) for name in PLANES], stack.kind.name


def _moe_block_cpu(
    h: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    shared_gate: torch.Tensor | None,
    gate_up: Sequence[torch.Tensor | None],
    gate_up_kind: str,
    down: Sequence[torch.Tensor | None],
    down_kind: str,
    num_experts: int,
    top_k: int,
    normalize: bool,
    has_shared: bool,
    next_norm: torch.Tensor | None,
    *routed: torch.Tensor | None,
) -> Results:
    first = gate_up[0]
    assert first is not None, "a stack has at least its words"
    width = first.shape[-2] // (2 if gate_up_kind == DENSE else 2 * (num_experts + has_shared))
    out = moe_block_ref(
        h, norm=norm, eps=eps, router=router, gate_up=stack_of(gate_up, gate_up_kind, h.shape[1]),
        down=stack_of(down, down_kind, width), num_experts=num_experts, top_k=top_k, normalize=normalize,
        shared_gate=shared_gate, has_shared=has_shared,
    )  # fmt: skip
    return out, *_handed_cpu(out, next_norm)


def _handed_cpu(out: torch.Tensor, next_norm: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if next_norm is not None:
        return hand_down_ref(out, next_norm)
    return out.new_empty((0,), dtype=torch.int8), out.new_empty((0,)), out.new_empty((0,))


def _moe_block_fake(
    h: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    shared_gate: torch.Tensor | None,
    gate_up: Sequence[torch.Tensor | None],
    gate_up_kind: str,
    down: Sequence[torch.Tensor | None],
    down_kind: str,
    num_experts: int,
    top_k: int,
    normalize: bool,
    has_shared: bool,
    next_norm: torch.Tensor | None,
    *routed: torch.Tensor | None,
) -> Results:
    rows, columns = h.shape if next_norm is not None else (0, 0)
    x = h.new_empty((rows, columns) if rows else (0,), dtype=torch.int8)
    scale = h.new_empty((rows, columns // HANDED) if rows else (0,))
    return torch.empty_like(h), x, scale, h.new_empty((rows, 1, columns // HANDED) if rows else (0,))


_moe_block = register(
    "moe_block(Tensor h, Tensor norm, float eps, Tensor router, Tensor? shared_gate, Tensor?[] gate_up,"
    " str gate_up_kind, Tensor?[] down, str down_kind, int num_experts, int top_k, bool normalize, bool has_shared,"
    " Tensor? next_norm, Tensor? x, Tensor? scale, Tensor? squares, Tensor? logits)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_moe_block_cpu,
    kernel="ostinato.kernels.moe.triton:moe_block",
    fake=_moe_block_fake,
)
