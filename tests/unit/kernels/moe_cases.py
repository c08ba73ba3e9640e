"""Random mixtures of experts of any kind of weights, tiny by default."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ostinato.quant.blocks import BlockWeight

from .block_weights import random_weight


@dataclass(frozen=True)
class MoeCase:
    """The arguments of moe_block."""

    h: torch.Tensor
    norm: torch.Tensor
    eps: float
    router: torch.Tensor
    gate_up: BlockWeight | torch.Tensor
    down: BlockWeight | torch.Tensor
    num_experts: int
    top_k: int
    normalize: bool
    shared_gate: torch.Tensor | None
    has_shared: bool

    def arguments(self) -> dict[str, Any]:
        """All but h, by name."""
        names = [name for name in self.__dataclass_fields__ if name != "h"]
        return {name: getattr(self, name) for name in names}

    def to(self, device: str) -> "MoeCase":
        moved = {n: v.to(device) for n, v in self.arguments().items() if isinstance(v, torch.Tensor | BlockWeight)}
        return replace(self, h=self.h.to(device), **moved)


def random_case(
    m: int,
    device: torch.device,
    *,
    hidden: int = 64,
    width: int = 32,
    num_experts: int = 8,
    top_k: int = 3,
    gate_up_kind: str | None = "Q4_1",
    down_kind: str | None = "Q4_1",
    router_dtype: torch.dtype = torch.bfloat16,
    normalize: bool = True,
    has_shared: bool = True,
    gated_shared: bool = True,
) -> MoeCase:
    """M tokens of a residual stream; a kind of None makes a dense stack. Logits spread by about 2."""
    total = num_experts + has_shared

    def stack(kind: str | None, rows: int, columns: int) -> BlockWeight | torch.Tensor:
        if kind is None:
            return torch.randn(total, rows, columns, device=device) * columns**-0.5
        weight = random_weight(kind, total * rows, columns, device)
        if weight.m is not None and weight.kind.min_sign > 0:  # weights with a mean of about 0, so that sums are random
            weight.m.copy_(weight.d * -(2.0 ** (weight.kind.bits - 1)))
        return weight

    return MoeCase(
        h=torch.randn(m, hidden, device=device) * 3,
        norm=torch.rand(hidden, device=device) + 0.5,
        eps=1e-6,
        router=(torch.randn(num_experts, hidden, device=device) * 2 * hidden**-0.5).to(router_dtype),
        gate_up=stack(gate_up_kind, 2 * width, hidden),
        down=stack(down_kind, hidden, width),
        num_experts=num_experts,
        top_k=top_k,
        normalize=normalize,
        shared_gate=(
            (torch.randn(hidden, device=device) * hidden**-0.5).to(router_dtype)
            if has_shared and gated_shared
            else None
        ),
        has_shared=has_shared,
    )
