"""Products of many rows straight on packed block weights: of one matrix, and of a stack of experts over sorted picks.

A mixture of experts for many tokens is

    schedule = sort_picks(ids, num_experts)                       # pick (t, j) sent to expert ids[t, j]
    act = grouped_gate_up(x, gate_up, schedule)                   # act(gate) * up of each pick, in sorted order
    h = grouped_down(act, down, schedule, weights, residual=h)    # back in the order of tokens, weighted and summed

or ``grouped_linear``, which is the three of them. A shared expert is one more pick of every token: its number is
``num_experts - 1``, its weight the value of its gate. Nothing here waits for the device, nothing depends on the host
knowing how many picks an expert has, and sums have one order, so results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear import FLOATS, check_linear
from ostinato.kernels.block_linear.ref import block_linear_ref, default_dtype
from ostinato.kernels.gated import GATES
from ostinato.kernels.grouped_linear.ref import grouped_down_ref, grouped_gate_up_ref, sort_picks_ref
from ostinato.kernels.registry import register
from ostinato.quant.blocks import BlockWeight

__all__ = ["PickSchedule", "grouped_down", "grouped_gate_up", "grouped_linear", "packed_matmul", "sort_picks"]

BLOCK_ROWS = (16, 32, 64, 128)


@dataclass(frozen=True, eq=False)
class PickSchedule:
    """Picks of experts, sorted by expert and cut into blocks that one program multiplies.

    order: int32 [P], P = num_tokens * top_k: the pick t * top_k + j that stands at a sorted position; within an expert
    the picks keep their order. blocks: int32 [P // block_rows + num_experts, 3]: expert, first sorted position and one
    past the last one of a block of at most ``block_rows`` picks; first equals last in the blocks that are not in use.
    """

    order: torch.Tensor
    blocks: torch.Tensor
    num_tokens: int
    top_k: int
    num_experts: int
    block_rows: int


def packed_matmul(
    x: torch.Tensor,
    weight: BlockWeight,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """residual + act(x Wᵀ + bias) on the tensor cores, W unpacked tile by tile: no copy of it is written to memory.

    x: [M, K] float32, bfloat16 or float16, rows of adjacent elements. weight: N rows of K columns.
    bias: [N] of floats. residual: float32 [M, N], contiguous; it is not written.
    gated: ``silu`` or ``gelu_tanh``: W holds F gate rows, then F up rows, and the result is act(gate) * up, [M, F].
    Returns [M, N] (or [M, F]) of ``out_dtype``; default: the residual's dtype, else x's.

    On a GPU x and the weights are rounded to bfloat16 and sums are float32; on the CPU everything is float32.
    Raises KernelError.
    """
    check_linear("packed_matmul", x, weight.shape, weight.device, None, bias, residual, gated)
    dtype = out_dtype or default_dtype(x, residual)
    if x.device.type == "cpu":
        return block_linear_ref(x, weight, bias=bias, residual=residual, gated=gated, out_dtype=dtype)
    result: torch.Tensor = _packed_matmul(x, *weight.operands, bias, residual, gated, dtype)
    return result


def sort_picks(ids: torch.Tensor, num_experts: int, *, block_rows: int | None = None) -> PickSchedule:
    """Sort the picks of tokens by expert.

    ids: int32 [T, k], contiguous, each 0 … num_experts - 1 (on a GPU that is not checked). num_experts counts the
    shared expert where it is stacked. block_rows: 16, 32, 64 or 128 picks a block; default: by the picks per expert.
    Raises KernelError.
    """
    if ids.dim() != 2 or ids.dtype != torch.int32 or not ids.is_contiguous() or ids.shape[1] == 0:
        raise KernelError(f"sort_picks takes contiguous int32 ids [T, k], got {tuple(ids.shape)} {ids.dtype}")
    if num_experts < 1:
        raise KernelError(f"sort_picks takes at least one expert, got {num_experts}")
    rows = default_block_rows(ids.numel(), num_experts) if block_rows is None else block_rows
    if rows not in BLOCK_ROWS:
        raise KernelError(f"sort_picks takes blocks of {', '.join(map(str, BLOCK_ROWS))} rows, got {rows}")
    if ids.device.type == "cpu":
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_experts):
            raise KernelError(f"sort_picks takes ids of {num_experts} experts, got {int(ids.min())} … {int(ids.max())}")
        order, blocks = sort_picks_ref(ids, num_experts, rows)
    else:
        order, blocks = _sort_picks(ids, num_experts, rows)
    return PickSchedule(order, blocks, ids.shape[0], ids.shape[1], num_experts, rows)


def default_block_rows(picks: int, num_experts: int) -> int:
    """Rows of a block: the fewer picks an expert has, the smaller, since a block is multiplied whole."""
    per_expert = picks / num_experts
    return 16 if per_expert <= 8 else 32 if per_expert <= 24 else 64 if per_expert <= 64 else 128


def grouped_gate_up(
    x: torch.Tensor,
    gate_up: BlockWeight,
    schedule: PickSchedule,
    *,
    gated: str = "silu",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """act(gate_e x_t) * (up_e x_t) of every pick (t, e), in sorted order: [P, F] of ``out_dtype`` (default: x's).

    x: [T, K] floats, rows of adjacent elements; norms are applied by the caller. gate_up: a stack of num_experts
    matrices of 2F rows: F gate rows, then F up rows. gated: ``silu`` or ``gelu_tanh``.
    On a GPU x and weights are rounded to bfloat16, sums are float32. Raises KernelError.
    """
    rows = _expert_rows("grouped_gate_up", x, gate_up, schedule, schedule.num_tokens)
    if gated not in GATES or rows % 2:
        raise KernelError(
            f"grouped_gate_up takes gated = {' or '.join(GATES)} and an even number of rows, got {gated!r} and {rows}"
        )
    dtype = out_dtype or x.dtype
    s = schedule
    if x.device.type == "cpu":
        return grouped_gate_up_ref(x, gate_up, s.order, s.blocks, s.num_experts, s.top_k, gated, dtype)
    result: torch.Tensor = _grouped_gate_up(
        x, *gate_up.operands, s.order, s.blocks, s.num_experts, s.top_k, s.block_rows, gated, dtype
    )
    return result


def grouped_down(
    act: torch.Tensor,
    down: BlockWeight,
    schedule: PickSchedule,
    weights: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """residual_t + Σ_j weights[t, j] * (down_e act of pick (t, j)): [T, N] of ``out_dtype``.

    act: [P, F] floats in sorted order, as grouped_gate_up returns it. down: a stack of num_experts matrices [N, F].
    weights: float32 [T, k], contiguous. residual: float32 [T, N], contiguous; it is not written.
    On a GPU the product of each pick is rounded to bfloat16 before the weighted sum, which is float32 and in the order
    of j. Raises KernelError.
    """
    s = schedule
    rows = _expert_rows("grouped_down", act, down, s, s.order.shape[0])
    if weights.shape != (s.num_tokens, s.top_k) or weights.dtype != torch.float32 or not weights.is_contiguous():
        raise KernelError(
            f"grouped_down takes contiguous float32 weights [{s.num_tokens}, {s.top_k}], got {tuple(weights.shape)}"
            f" {weights.dtype}"
        )
    if residual is not None and (
        residual.shape != (s.num_tokens, rows) or residual.dtype != torch.float32 or not residual.is_contiguous()
    ):
        raise KernelError(
            f"grouped_down takes a contiguous float32 residual [{s.num_tokens}, {rows}], got {tuple(residual.shape)}"
            f" {residual.dtype}"
        )
    for name, tensor in (("weights", weights), ("residual", residual)):
        if tensor is not None and tensor.device != act.device:
            raise KernelError(f"grouped_down: act is on {act.device} and {name} on {tensor.device}")
    if act.device.type == "cpu":
        return grouped_down_ref(act, down, s.order, s.blocks, s.num_experts, weights, residual, out_dtype)
    result: torch.Tensor = _grouped_down(
        act, *down.operands, s.order, s.blocks, s.num_experts, s.block_rows, weights, residual, out_dtype
    )
    return result


def grouped_linear(
    x: torch.Tensor,
    gate_up: BlockWeight,
    down: BlockWeight,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    num_experts: int,
    residual: torch.Tensor | None = None,
    gated: str = "silu",
) -> torch.Tensor:
    """residual + Σ_j weights[:, j] * down_e(act(gate_e x) * up_e x) with e = ids[:, j]: float32 [T, N].

    x: [T, K]. ids: int32 [T, k]. weights: float32 [T, k]. The rest as in sort_picks, grouped_gate_up and grouped_down.
    """
    schedule = sort_picks(ids, num_experts)
    act = grouped_gate_up(x, gate_up, schedule, gated=gated)
    return grouped_down(act, down, schedule, weights, residual=residual)


def _expert_rows(op: str, x: torch.Tensor, stack: BlockWeight, schedule: PickSchedule, num_rows: int) -> int:
    """Rows of one expert's matrix; raises KernelError where x [num_rows, K], the stack and the schedule do not fit."""
    n, k = stack.shape
    if x.shape != (num_rows, k) or x.dtype not in FLOATS or (x.stride(1) != 1 and k > 1):
        raise KernelError(
            f"{op} takes [{num_rows}, {k}] of floats with adjacent columns for a stack {stack.shape}, got"
            f" {tuple(x.shape)} {x.dtype} with strides {x.stride()}"
        )
    if n % schedule.num_experts:
        raise KernelError(f"{op} takes a stack of {schedule.num_experts} equal matrices, got {n} rows")
    for name, device in (("the stack", stack.device), ("the schedule", schedule.order.device)):
        if device != x.device:
            raise KernelError(f"{op}: x is on {x.device} and {name} on {device}: move them to one device")
    return n // schedule.num_experts


_PLANES = "Tensor words, Tensor d, Tensor? high, Tensor? m, Tensor? sub_d, Tensor? sub_m, str kind"


def _packed_matmul_cpu(
    x: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = BlockWeight.of(x.shape[1], words, d, high, m, sub_d, sub_m, kind)
    return block_linear_ref(x, weight, bias=bias, residual=residual, gated=gated, out_dtype=out_dtype)


def _sort_picks_fake(ids: torch.Tensor, num_experts: int, block_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    picks = ids.numel()
    return ids.new_empty((picks,)), ids.new_empty((picks // block_rows + num_experts, 3))


def _grouped_gate_up_cpu(
    x: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    order: torch.Tensor,
    blocks: torch.Tensor,
    num_experts: int,
    top_k: int,
    block_rows: int,
    gated: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = BlockWeight.of(x.shape[1], words, d, high, m, sub_d, sub_m, kind)
    return grouped_gate_up_ref(x, weight, order, blocks, num_experts, top_k, gated, out_dtype)


def _grouped_down_cpu(
    act: torch.Tensor,
    words: torch.Tensor,
    d: torch.Tensor,
    high: torch.Tensor | None,
    m: torch.Tensor | None,
    sub_d: torch.Tensor | None,
    sub_m: torch.Tensor | None,
    kind: str,
    order: torch.Tensor,
    blocks: torch.Tensor,
    num_experts: int,
    block_rows: int,
    weights: torch.Tensor,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = BlockWeight.of(act.shape[1], words, d, high, m, sub_d, sub_m, kind)
    return grouped_down_ref(act, weight, order, blocks, num_experts, weights, residual, out_dtype)


_packed_matmul = register(
    f"packed_matmul(Tensor x, {_PLANES}, Tensor? bias, Tensor? residual, str? gated, ScalarType out_dtype) -> Tensor",
    reference=_packed_matmul_cpu,
    kernel="ostinato.kernels.grouped_linear.triton:packed_matmul",
    fake=lambda x, words, *rest: x.new_empty(
        (x.shape[0], words.shape[0] // (1 if rest[-2] is None else 2)), dtype=rest[-1]
    ),
)
_sort_picks = register(
    "sort_picks(Tensor ids, int num_experts, int block_rows) -> (Tensor, Tensor)",
    reference=sort_picks_ref,
    kernel="ostinato.kernels.grouped_linear.triton:sort_picks",
    fake=_sort_picks_fake,
)
_grouped_gate_up = register(
    f"grouped_gate_up(Tensor x, {_PLANES}, Tensor order, Tensor blocks, int num_experts, int top_k, int block_rows,"
    " str gated, ScalarType out_dtype) -> Tensor",
    reference=_grouped_gate_up_cpu,
    kernel="ostinato.kernels.grouped_linear.triton:grouped_gate_up",
    fake=lambda x, words, *rest: x.new_empty((rest[6].shape[0], words.shape[0] // rest[8] // 2), dtype=rest[-1]),
)
_grouped_down = register(
    f"grouped_down(Tensor act, {_PLANES}, Tensor order, Tensor blocks, int num_experts, int block_rows, Tensor weights,"
    " Tensor? residual, ScalarType out_dtype) -> Tensor",
    reference=_grouped_down_cpu,
    kernel="ostinato.kernels.grouped_linear.triton:grouped_down",
    fake=lambda act, words, *rest: act.new_empty((rest[10].shape[0], words.shape[0] // rest[8]), dtype=rest[-1]),
)
