"""Full and windowed attention with grouped KV heads, RoPE and optional per-head norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.kernels.block_linear import prefers_int8
from ostinato.kernels.decode_attention import fused_decode_attention
from ostinato.kernels.prefill_attention import prefill_attention
from ostinato.kernels.rope import rope_append
from ostinato.kv.paged import KVSpec, LayerKV
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Linear, Norm, RoundedRow
from ostinato.layers.rope import Rope


@dataclass(frozen=True, eq=False)
class Attention:
    """``out(attention(rope(qkv(norm(h))))) + h``.

    qkv: query, key and value rows of all heads in this order, and a gate for each query head behind them if ``gated``,
    whose sigmoid multiplies what the head attended to. window: tokens that a query sees, itself included; 0 for all.
    scale: multiplies the dot products.
    """

    norm: Norm
    qkv: Linear
    out: Linear
    rope: Rope
    q_norm: Norm | None
    k_norm: Norm | None
    num_heads: int
    spec: KVSpec
    scale: float
    window: int
    gated: bool = False

    def __call__(
        self,
        h: torch.Tensor,
        batch: Batch,
        kv: LayerKV,
        activation: torch.dtype,
        row: RoundedRow | None = None,
    ) -> torch.Tensor:
        """h: float32 [M, hidden] → float32 [M, hidden]; appends the keys and values of the rows to ``kv``.

        row: norm(h) where the layer before has rounded it.
        """
        return self.output(self.mix(h, batch, kv, activation, row), h)

    def mix(
        self,
        h: torch.Tensor,
        batch: Batch,
        kv: LayerKV,
        activation: torch.dtype,
        row: RoundedRow | None = None,
        routed: bool = False,
    ) -> torch.Tensor | RoundedRow:
        """All before the output product; arguments as for a call. What ``output`` takes.

        routed: the output product will do the work of a router, for which it takes a rounded row.
        """
        if row is None:
            qkv = self.qkv(h, norm=self.norm, out_dtype=activation)
        else:
            qkv = self.qkv.of_rounded(row, out_dtype=activation)
        q_norm = self.q_norm.weight if self.q_norm is not None else None
        k_norm = self.k_norm.weight if self.k_norm is not None else None
        eps = self.q_norm.eps if self.q_norm is not None else 0.0
        place = (self.rope.inv_freq, self.rope.factor, batch.positions, batch.slots, kv.page_table, kv.k, kv.v)
        if batch.decode:
            rounded = self._rounds(h, routed)
            attended, scale = fused_decode_attention(
                qkv,
                *place,
                q_norm,
                k_norm,
                eps,
                num_heads=self.num_heads,
                num_kv_heads=self.spec.num_kv_heads,
                scale=self.scale,
                window=self.window,
                k_scale=kv.k_scale,
                v_scale=kv.v_scale,
                gated=self.gated,
                rounded=rounded,
                # The embedding starts a step with a full dependency, and positions advance at the step's end alone.
                prefetch=True,
            )
            return RoundedRow(attended, scale, None, 0.0) if rounded else attended
        q = rope_append(
            qkv,
            *place,
            q_norm,
            k_norm,
            eps,
            num_heads=self.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            gated=self.gated,
        )
        return prefill_attention(
            q,
            kv.k,
            kv.v,
            kv.page_table,
            batch.slots,
            batch.positions,
            scale=self.scale,
            window=self.window,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            gate=qkv[:, -self.num_heads * self.spec.head_dim :] if self.gated else None,
        )

    def output(self, result: torch.Tensor | RoundedRow, h: torch.Tensor) -> torch.Tensor:
        """The output product of what ``mix`` returned, added to h."""
        if isinstance(result, RoundedRow):
            return self.out.of_rounded(result, residual=h)
        return self.out(result, residual=h)

    def _rounds(self, h: torch.Tensor, routed: bool) -> bool:
        """Whether a decode step's attention should round its rows for the output product."""
        weight = self.out.block_weight
        if weight is None or not h.is_cuda or self.spec.head_dim % 32:
            return False
        return routed or prefers_int8(weight, h.shape[0])

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return self.qkv.num_bytes + self.out.num_bytes
