"""Qwen3.5 and its relatives: ``qwen3_5_moe``, ``qwen3_5``, ``qwen3_next`` and ``qwen3_moe``.

Pre-norm blocks of a token mixer and an MLP. The mixer is gated DeltaNet in three layers of four and full attention
with an output gate, norms on query and key heads and RoPE on a part of them in the fourth; the MLP is a mixture of
experts with a shared one, or dense (qwen3_5). Norms are zero-centred. qwen3_next has the projections of its delta rule
in another order; qwen3_moe has attention alone, without gates, plain norms and no shared expert. Of multimodal
checkpoints the text part runs. Reference: transformers' modeling files of those names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostinato.kernels.embed import embed, embed_rounded
from ostinato.kv.paged import KVSpec, LayerKV
from ostinato.kv.recurrent import RecurrentSpec, RecurrentState
from ostinato.layers.attention import Attention
from ostinato.layers.batch import Batch
from ostinato.layers.delta_net import DeltaNet
from ostinato.layers.embedding import place_embedding
from ostinato.layers.linear import Linear, Norm, RoundedEights, RoundedRow, RoutedRow, Routing, Target, weight_bytes
from ostinato.layers.mlp import GatedMLP
from ostinato.layers.moe import ExpertStack, MoE, SharedExpert
from ostinato.layers.rope import Rope, make_rope
from ostinato.models.interface import Checkpoint
from ostinato.models.qwen3_5_config import GGUF_ARCHITECTURES, HF_TYPES, Qwen35Sizes
from ostinato.models.qwen3_5_weights import (
    GGUFWeights,
    HFWeights,
    Weights,
    gate_rows,
    input_rows,
    query_and_gate,
)
from ostinato.quant.blocks import BlockWeight

__all__ = ["GGUF_ARCHITECTURES", "HF_TYPES", "Qwen35Config", "Qwen35ForCausalLM"]


class Qwen35Config(Qwen35Sizes):
    """Sizes and switches, and the way from a checkpoint to the model."""

    def build(self, checkpoint: Checkpoint, target: Target, context: int) -> Qwen35ForCausalLM:
        """Read, fuse and place the weights, one tensor at a time."""
        shapes = self.weight_shapes()
        weights: Weights
        if checkpoint.format == "gguf":
            post_norm = "post_attention_norm" if self.gated else "ffn_norm"
            weights = GGUFWeights(checkpoint.source, shapes, post_norm=post_norm, num_layers=self.num_layers)
        else:
            weights = HFWeights(checkpoint.source, shapes, zero_centred=self.gated)
        return _Builder(self, weights, target, make_rope(self.rope, context).to(target.device)).model()


@dataclass(frozen=True, eq=False)
class Qwen35DecoderLayer:
    """routing: with which the mixer's output product does the work of the experts' router, for one row on a GPU."""

    mixer: Attention | DeltaNet
    mlp: GatedMLP | MoE
    routing: Routing | None = None

    def output(
        self, mixed: torch.Tensor | RoundedRow | RoundedEights, h: torch.Tensor
    ) -> tuple[torch.Tensor, RoutedRow | None]:
        """The mixer's output product of ``mixed``, added to h, and what spares the experts their router."""
        if self.routing is not None and isinstance(mixed, RoundedRow) and h.shape[0] == 1:
            return self.mixer.out.of_routed(mixed, h, self.routing)
        if isinstance(self.mixer, Attention):
            assert not isinstance(mixed, RoundedEights)
            return self.mixer.output(mixed, h), None
        return self.mixer.output(mixed, h), None


def norm_and_product(layer: Qwen35DecoderLayer) -> tuple[Norm, Linear]:
    """The first that a layer does."""
    mixer = layer.mixer
    return mixer.norm, mixer.in_proj if isinstance(mixer, DeltaNet) else mixer.qkv


def rounded_norm(norm: Norm, product: Linear, batch: Batch) -> Norm | None:
    """``norm``, if whoever makes the row of ``product`` is to apply it and round the row.

    That saves a kernel: for one row of a decode step on a GPU, before a matrix of blocks.
    """
    one = batch.decode and batch.tokens.is_cuda and batch.tokens.shape[0] == 1
    return norm if one and product.block_weight is not None else None


def handed_norm(mlp: MoE, following: tuple[Norm, Linear], batch: Batch) -> Norm | None:
    """``rounded_norm`` of what follows the experts ``mlp``, where they make the row."""
    return rounded_norm(*following, batch) if mlp.hands_down(batch.tokens.shape[0]) else None


@dataclass(frozen=True, eq=False)
class Qwen35ForCausalLM:
    """embed: [vocab, hidden] rows for tokens. head: the same matrix when embeddings are tied."""

    config: Qwen35Config
    embed: BlockWeight | torch.Tensor
    layers: tuple[Qwen35DecoderLayer, ...]
    norm: Norm
    head: Linear
    activation: torch.dtype

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_context(self) -> int:
        return self.config.max_context

    @property
    def kv_specs(self) -> tuple[KVSpec | RecurrentSpec, ...]:
        return self.config.kv_specs

    def bytes_per_step(self, num_rows: int = 1) -> int:
        """Bytes of weights that a decode step of ``num_rows`` reads; of experts the number that is to be expected."""
        mixers = sum(layer.mixer.num_bytes for layer in self.layers)
        sparse = sum(layer.mlp.expected_bytes(num_rows) for layer in self.layers if isinstance(layer.mlp, MoE))
        dense = sum(layer.mlp.num_bytes for layer in self.layers if isinstance(layer.mlp, GatedMLP))
        embedding = num_rows * weight_bytes(self.embed) // self.vocab_size
        if num_rows == 1:  # the folded matrices; a router's own rows are counted with its experts
            sparse += sum(weight_bytes(layer.routing.folded) for layer in self.layers if layer.routing is not None)
        return mixers + sparse + dense + self.head.num_bytes + embedding

    def forward(
        self, batch: Batch, kv: Sequence[LayerKV | RecurrentState], rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits, float32 [M, vocab]; with ``rows`` (int64 [R]) of those rows alone, [R, vocab]."""
        row: RoundedRow | None = None
        first_norm = rounded_norm(*norm_and_product(self.layers[0]), batch)
        if first_norm is not None and isinstance(self.embed, BlockWeight):
            h, x, scale, squares = embed_rounded(batch.tokens, self.embed, first_norm.weight)
            row = RoundedRow(x, scale, squares, first_norm.eps)
        else:
            h = embed(batch.tokens, self.embed, out_dtype=torch.float32)
        behind = [*map(norm_and_product, self.layers[1:]), (self.norm, self.head)]
        for layer, following, kept in zip(self.layers, behind, kv, strict=True):
            mixed: torch.Tensor | RoundedRow | RoundedEights
            if isinstance(layer.mixer, DeltaNet):
                assert isinstance(kept, RecurrentState)
                mixed = layer.mixer.mix(h, batch, kept, self.activation, row)
            else:
                assert isinstance(kept, LayerKV)
                routes = layer.routing is not None and h.shape[0] == 1
                mixed = layer.mixer.mix(h, batch, kept, self.activation, row, routes)
            h, routed = layer.output(mixed, h)
            if isinstance(layer.mlp, MoE):
                next_norm = handed_norm(layer.mlp, following, batch)
                h, row = layer.mlp(h, self.activation, next_norm, routed)
            else:
                h, row = layer.mlp(h, self.activation), None
        if rows is not None:
            h = h.index_select(0, rows)
        elif row is not None:
            return self.head.of_rounded(row, out_dtype=torch.float32)
        return self.head(h, norm=self.norm, out_dtype=torch.float32)


@dataclass(frozen=True)
class _Builder:
    """Reads and places the weights of a model, layer by layer."""

    config: Qwen35Config
    weights: Weights
    target: Target
    rope: Rope

    def model(self) -> Qwen35ForCausalLM:
        c = self.config
        table = self.weights.read("model.embed_tokens.weight")
        layers = tuple(self._layer(i) for i in range(c.num_layers))
        head = Linear.join([table if c.tie_word_embeddings else self.weights.read("lm_head.weight")], self.target)
        return Qwen35ForCausalLM(
            config=c,
            embed=place_embedding(table, self.target, head if c.tie_word_embeddings else None),
            layers=layers,
            norm=self._norm("model.norm.weight"),
            head=head,
            activation=self.target.activation,
        )

    def _norm(self, name: str) -> Norm:
        return Norm(self.weights.norm(name).to(self.target.device), self.config.rms_norm_eps)

    def _float(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.target.device, torch.float32).contiguous()

    def _join(self, *names: str) -> Linear:
        return Linear.join([self.weights.read(name) for name in names], self.target)

    def _layer(self, index: int) -> Qwen35DecoderLayer:
        p = f"model.layers.{index}."
        mixer = self._attention(p) if self.config.full_attention[index] else self._delta_net(p)
        norm = self._norm(f"{p}post_attention_layernorm.weight")
        if self.config.sparse[index]:
            moe = self._moe(p, norm)
            return Qwen35DecoderLayer(mixer, moe, moe.routing(mixer.out))
        gate_up = self._join(f"{p}mlp.gate_proj.weight", f"{p}mlp.up_proj.weight")
        return Qwen35DecoderLayer(mixer, GatedMLP(norm, gate_up, self._join(f"{p}mlp.down_proj.weight")))

    def _attention(self, p: str) -> Attention:
        c = self.config
        q, k, v = (self.weights.read(f"{p}self_attn.{name}_proj.weight") for name in "qkv")
        rows = [q, k, v]
        if c.gated:
            query, gate = query_and_gate(q, c.num_heads, c.head_dim)
            rows = [query, k, v, gate]
        return Attention(
            norm=self._norm(f"{p}input_layernorm.weight"),
            qkv=Linear.join(rows, self.target),
            out=self._join(f"{p}self_attn.o_proj.weight"),
            rope=self.rope,
            q_norm=self._norm(f"{p}self_attn.q_norm.weight"),
            k_norm=self._norm(f"{p}self_attn.k_norm.weight"),
            num_heads=c.num_heads,
            spec=KVSpec(c.num_kv_heads, c.head_dim),
            scale=c.head_dim**-0.5,
            window=0,
            gated=c.gated,
        )

    def _delta_net(self, p: str) -> DeltaNet:
        c, w, p = self.config, self.weights, f"{p}linear_attn."
        assert c.delta is not None
        gates = self.target.place_plain(*gate_rows(w, p, c.delta))
        # The gated norm is the one norm that is not zero-centred.
        gate_norm = Norm(self._float(w.squeezed(f"{p}norm.weight")), c.rms_norm_eps)
        return DeltaNet(
            norm=self._norm(p.replace("linear_attn.", "input_layernorm.weight")),
            in_proj=Linear.join(input_rows(w, p, c.delta), self.target),
            beta_alpha=torch.cat(gates),
            conv_weight=self._float(w.squeezed(f"{p}conv1d.weight").T),
            a_log=self._float(w.a_log(f"{p}A_log")),
            dt_bias=self._float(w.squeezed(f"{p}dt_bias")),
            gate_norm=gate_norm,
            out=self._join(f"{p}out_proj.weight"),
            num_k_heads=c.delta.num_k_heads,
            num_v_heads=c.delta.num_v_heads,
            tiled=c.tiled,
        )

    def _moe(self, p: str, norm: Norm) -> MoE:
        """The shared expert joins the stacks of the others where types and widths are equal."""
        e, w, target, p = self.config.experts, self.weights, self.target, f"{p}mlp."
        assert e is not None
        gate_up = ExpertStack(f"{p}experts", e.num + 1, 2 * e.width, target)
        down = ExpertStack(f"{p}experts", e.num + 1, self.config.hidden_size, target)
        w.fill(gate_up, down, p.removesuffix("mlp."), e.num, e.width)
        routers, shared, joined = [w.read(f"{p}gate.weight")], None, False
        if e.shared_width:
            parts = [w.read(f"{p}shared_expert.{name}_proj.weight") for name in ("gate", "up", "down")]
            fits = gate_up.takes(parts[0]) and gate_up.takes(parts[1]) and down.takes(parts[2])
            joined = fits and e.shared_width == e.width
            scores = w.squeezed(f"{p}shared_expert_gate.weight").view(1, -1)
            if joined:
                gate_up.put(parts[0], expert=e.num)
                gate_up.put(parts[1], expert=e.num, row=e.width)
                down.put(parts[2], expert=e.num)
                routers.append(scores)
            else:
                (scores,) = target.place_plain(scores)
                shared = SharedExpert(scores, Linear.join(parts[:2], target), Linear.join(parts[2:], target))
        return MoE(
            norm=norm,
            router=torch.cat(target.place_plain(*routers)),
            gate_up=gate_up.finish(e.num + joined),
            down=down.finish(e.num + joined),
            num_experts=e.num,
            top_k=e.top_k,
            normalize=e.normalize,
            shared=shared,
        )
