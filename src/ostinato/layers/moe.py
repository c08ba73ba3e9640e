"""A mixture of experts with a router and, where a model has one, a gated shared expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.errors import UnsupportedModelError
from ostinato.kernels.moe import hands_down, moe_block
from ostinato.kernels.routed_linear import fold_router
from ostinato.layers.linear import Linear, Norm, RoundedRow, RoutedRow, Routing, Target, linear, weight_bytes
from ostinato.quant.blocks import BlockKind, BlockWeight, dequantize

ExpertWeights = BlockWeight | torch.Tensor


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """A shared expert whose weights could not join the routed ones'. gate: [1, H], its sigmoid weighs the result."""

    gate: torch.Tensor
    gate_up: Linear
    down: Linear

    def __call__(self, h: torch.Tensor, total: torch.Tensor, norm: Norm, activation: torch.dtype) -> torch.Tensor:
        """h, total: float32 [M, H] → ``total`` with this expert's answer to norm(h) added, float32 [M, H]."""
        weight = torch.sigmoid(linear(h, self.gate, norm=norm, out_dtype=torch.float32))
        inner = self.gate_up(h, norm=norm, gated="silu", out_dtype=activation)
        return self.down(inner * weight, residual=total)

    @property
    def num_bytes(self) -> int:
        return weight_bytes(self.gate) + self.gate_up.num_bytes + self.down.num_bytes


@dataclass(frozen=True, eq=False)
class MoE:
    """``h + Σ weight_k · expert_k(norm(h)) + sigmoid(shared_gate · norm(h)) · shared(norm(h))`` over the top-k experts.

    router: [E, H], or [E + 1, H] with the shared gate's row behind the experts', float32 or bfloat16. gate_up, down:
    stacks of E experts, the shared one behind them where there is such a gate. normalize: weights are a softmax over
    the top-k, else over all. shared: a shared expert apart, instead of that gate.
    """

    norm: Norm
    router: torch.Tensor
    gate_up: ExpertWeights
    down: ExpertWeights
    num_experts: int
    top_k: int
    normalize: bool
    shared: SharedExpert | None

    def __call__(
        self,
        h: torch.Tensor,
        activation: torch.dtype,
        next_norm: Norm | None = None,
        routed: RoutedRow | None = None,
    ) -> tuple[torch.Tensor, RoundedRow | None]:
        """h: float32 [M, H] → float32 [M, H]; ``activation`` is the dtype between products.

        With the norm that follows, where ``hands_down``, also what ``Linear.of_rounded`` takes in place of its result.
        routed: what ``Linear.of_routed`` made of h for this block's ``routing``.
        """
        out, x, scale, squares = moe_block(
            h,
            norm=self.norm.weight,
            eps=self.norm.eps,
            router=self.router[: self.num_experts],
            gate_up=self.gate_up,
            down=self.down,
            num_experts=self.num_experts,
            top_k=self.top_k,
            normalize=self.normalize,
            shared_gate=self.router[self.num_experts] if self._has_shared else None,
            has_shared=self._has_shared,
            next_norm=None if next_norm is None else next_norm.weight,
            routed=None if routed is None else (routed.x, routed.scale, routed.squares, routed.logits),
        )
        if next_norm is not None:
            assert self.shared is None, "the row would lack the shared expert's part"
            return out, RoundedRow(x, scale, squares, next_norm.eps)
        return (out if self.shared is None else self.shared(h, out, self.norm, activation)), None

    def hands_down(self, rows: int) -> bool:
        """Whether a call for so many rows takes a ``next_norm``."""
        return self.shared is None and hands_down(rows, self.gate_up, self.down)

    def routing(self, out: Linear) -> Routing | None:
        """What the product ``out`` before this block needs to do the router's work for one row on a GPU.

        None where it cannot: unless both are block weights there, and float16 holds the folded matrix.
        """
        weight = out.block_weight
        if weight is None or weight.device.type != "cuda" or not self.hands_down(1):
            return None
        folded = fold_router(self.router, self.norm.weight, weight)
        return Routing(self.norm.weight, self.router, folded) if bool(folded.isfinite().all()) else None

    def expected_bytes(self, num_rows: int) -> int:
        """Bytes of weights that ``num_rows`` tokens read when every expert is as likely as another."""
        expert = (weight_bytes(self.gate_up) + weight_bytes(self.down)) // (self.num_experts + self._has_shared)
        chosen = self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** num_rows)
        apart = 0 if self.shared is None else self.shared.num_bytes
        return weight_bytes(self.router) + int(expert * (chosen + self._has_shared)) + apart

    @property
    def _has_shared(self) -> bool:
        return self.router.shape[0] > self.num_experts


class ExpertStack:
    """The matrices of ``num_experts`` experts, [rows, K] each, put together piece by piece on a target.

    Only the stack and one piece are in memory at a time. All pieces of a stack must be of one type; in the exact mode
    all are float32.
    """

    def __init__(self, what: str, num_experts: int, rows: int, target: Target) -> None:
        self._what = what
        self._num_experts = num_experts
        self._rows = rows
        self._target = target
        self._kind: BlockKind | torch.dtype | None = None
        self._columns = 0
        self._planes: dict[str, torch.Tensor] = {}

    def put(self, weight: BlockWeight | torch.Tensor, *, expert: int, count: int = 1, row: int = 0) -> None:
        """Rows ``row`` … of the experts ``expert`` … expert + count - 1.

        weight: [count · n, K] or [count, n, K]. Raises UnsupportedModelError where its type is not that of the others.
        """
        if not self.takes(weight):
            raise UnsupportedModelError(
                f"{self._what}: experts of {_named(weight)} beside experts of another type are multiplied by in "
                "--dtype float32 alone"
            )
        for name, plane in self._placed(weight).items():
            pieces = plane.reshape(count, -1, plane.shape[-1])
            if name not in self._planes:
                shape = (self._num_experts, self._rows, plane.shape[-1])
                self._planes[name] = torch.empty(shape, dtype=plane.dtype, device=plane.device)
            self._planes[name][expert : expert + count, row : row + pieces.shape[1]] = pieces
        self._kind = _kind(weight)
        self._columns = weight.shape[-1]

    def takes(self, weight: BlockWeight | torch.Tensor) -> bool:
        """Whether ``weight`` is of the type of what was put before."""
        return self._target.exact or self._kind is None or self._kind == _kind(weight)

    def finish(self, num_experts: int) -> ExpertWeights:
        """The stack of the first ``num_experts``: a BlockWeight (num_experts · rows, K) or a tensor of 3 dimensions."""
        planes = {name: plane[:num_experts] for name, plane in self._planes.items()}
        if isinstance(self._kind, BlockKind) and not self._target.exact:
            flat = {name: plane.reshape(num_experts * self._rows, -1) for name, plane in planes.items()}
            return BlockWeight(self._kind, (num_experts * self._rows, self._columns), **flat)
        return planes["dense"]

    def _placed(self, weight: BlockWeight | torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(weight, torch.Tensor):
            return {"dense": weight.to(self._target.device, self._target.activation)}
        placed = weight.to(self._target.device)
        return {"dense": dequantize(placed)} if self._target.exact else placed.planes()


def _kind(weight: BlockWeight | torch.Tensor) -> BlockKind | torch.dtype:
    # Dense weights are brought to one dtype as they are placed.
    return weight.kind if isinstance(weight, BlockWeight) else torch.float32


def _named(weight: BlockWeight | torch.Tensor) -> str:
    return weight.kind.name if isinstance(weight, BlockWeight) else str(weight.dtype).removeprefix("torch.")
