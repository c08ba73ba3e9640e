"""The mixture-of-experts block in plain PyTorch: the truth, a model of the int8 kernels, and a form for captures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ostinato.kernels.rms_norm.ref import quantize_rows_ref, rms_norm_ref
from ostinato.quant.blocks import KINDS, BlockWeight, dequantize

Stack = BlockWeight | torch.Tensor
DENSE = "dense"  # the kind that the registered op calls a stack which is a tensor
PLANES = ("words", "d", "high", "m", "sub_d", "sub_m")
HANDED = 16  # columns that share a scale in a row that is handed to the next product
MAX_HANDED_WIDTH = 1024  # the widest experts whose kernel for one row rounds it: 16 rows of down fit a program


def stack_of(planes: Sequence[torch.Tensor | None], kind: str, columns: int) -> Stack:
    """A stack from the registered op's operands; ``columns`` is K."""
    first = planes[0]
    assert first is not None, "a stack has at least its words"
    if kind == DENSE:
        return first
    found = {name: plane for name, plane in zip(PLANES, planes, strict=True) if plane is not None}
    return BlockWeight(KINDS[kind], (first.shape[0], columns), **found)


def route(
    logits: torch.Tensor, top_k: int, normalize: bool, shared_logit: torch.Tensor | None, has_shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts int64 [M, k] and their weights float32 [M, k] of logits float32 [M, E], the largest first.

    With has_shared, a last column holds the shared expert: number E, weight sigmoid(shared_logit [M]) or 1.
    """
    values, ids = torch.topk(logits, top_k, dim=-1)
    weights = torch.softmax(values, -1) if normalize else torch.softmax(logits, -1).gather(-1, ids)
    if has_shared:
        ones = torch.ones_like(weights[:, :1])
        shared = ones if shared_logit is None else torch.sigmoid(shared_logit)[:, None]
        ids = torch.cat((ids, torch.full_like(ids[:, :1], logits.shape[1])), dim=1)
        weights = torch.cat((weights, shared), dim=1)
    return ids, weights


def moe_block_ref(
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
    int8_groups: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """What ``moe_block`` means, in float32, one chosen expert after the other.

    int8_groups: round the inputs of gate and up, of down, and of the shared expert's down to int8 with a scale for so
    many columns, as kernels do.
    """
    x = rms_norm_ref(h, norm, eps, torch.float32)
    shared_logit = None if shared_gate is None else x @ shared_gate.reshape(-1).float()
    ids, weights = route(x @ router.float().T, top_k, normalize, shared_logit, has_shared)
    of_x, of_inner, of_shared = int8_groups or (None, None, None)
    inputs = _rounded(x, of_x)
    total = h.clone()
    for expert in sorted(set(ids.flatten().tolist())):
        tokens, picks = torch.where(ids == expert)
        gate, up = (inputs[tokens] @ _expert(gate_up, expert, num_experts + has_shared).T).chunk(2, dim=-1)
        inner = _rounded(F.silu(gate) * up, of_inner if expert < num_experts else of_shared)
        product = inner @ _expert(down, expert, num_experts + has_shared).T
        total.index_add_(0, tokens, product * weights[tokens, picks][:, None])
    return total


def moe_block_dense(
    h: torch.Tensor,
    *,
    norm: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
    shared_gate: torch.Tensor | None,
    has_shared: bool,
) -> torch.Tensor:
    """The same for dense stacks, in operations whose shapes do not depend on data, so that it can be captured.

    Few picks gather the matrices of each; many multiply every expert by every token, most of them with weight 0.
    """
    x = rms_norm_ref(h, norm, eps, torch.float32)
    shared_logit = None if shared_gate is None else x @ shared_gate.reshape(-1).float()
    ids, weights = route(x @ router.float().T, top_k, normalize, shared_logit, has_shared)
    if ids.numel() <= gate_up.shape[0]:
        chosen = ids.flatten()
        inputs = x.repeat_interleave(ids.shape[1], dim=0)[:, :, None]
        gate, up = (gate_up[chosen].float() @ inputs).chunk(2, dim=1)
        product = (down[chosen].float() @ (F.silu(gate) * up)).view(*ids.shape, -1)
        return h + (product * weights[:, :, None]).sum(1)
    spread = torch.zeros(h.shape[0], gate_up.shape[0], device=h.device).scatter_(1, ids, weights)
    total = h.clone()
    for expert in range(gate_up.shape[0]):
        gate, up = (x @ gate_up[expert].float().T).chunk(2, dim=-1)
        total += (F.silu(gate) * up) @ down[expert].float().T * spread[:, expert, None]
    return total


def hand_down_ref(h: torch.Tensor, next_norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h · next_norm as int8 [M, H], a scale [M, H/16] for 16 columns, and the sums of h² over each 16, [M, 1, H/16].

    Their root mean square only scales a row, so that rms_norm(h, next_norm, eps) is int8 times scale times
    rsqrt(squares.sum(-1) / H + eps).
    """
    x, scale = quantize_rows_ref(h * next_norm, HANDED)
    return x, scale, h.square().view(h.shape[0], 1, -1, HANDED).sum(3)


def _expert(stack: Stack, expert: int, total: int) -> torch.Tensor:
    if isinstance(stack, torch.Tensor):
        return stack[expert].float()
    rows = stack.shape[0] // total
    return dequantize(stack.slice_rows(expert * rows, (expert + 1) * rows))


def _rounded(x: torch.Tensor, group: int | None) -> torch.Tensor:
    if group is None:
        return x
    quantized, scale = quantize_rows_ref(x, group)
    return quantized.float() * scale.repeat_interleave(group, dim=1)
