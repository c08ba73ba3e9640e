"""Llama-like decoders: ``llama``, ``mistral``, ``qwen2`` and ``qwen3``.

Pre-norm blocks of grouped-query attention with RoPE and a SiLU-gated MLP. The families differ in QKV bias (qwen2),
norms on query and key heads (qwen3) and sliding windows (mistral, some qwen2). Reference: transformers' modeling files
of those names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ostinato.errors import UnsupportedModelError
from ostinato.kernels.embed import embed
from ostinato.kv.paged import KVSpec, LayerKV
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.attention import Attention
from ostinato.layers.batch import Batch
from ostinato.layers.embedding import place_embedding
from ostinato.layers.linear import Linear, Norm, Target, as_tensor, weight_bytes
from ostinato.layers.mlp import GatedMLP
from ostinato.layers.rope import Rope, RopeConfig, make_rope
from ostinato.models.interface import Checkpoint, WeightSource
from ostinato.quant.blocks import BlockWeight

HF_TYPES = ("llama", "mistral", "qwen2", "qwen3")
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")

# What transformers assumes where config.json does not say it, and what differs from one family to the next.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}

_Read = Callable[[str], BlockWeight | torch.Tensor]


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches. windows: per layer, tokens that a query sees, 0 for all."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_context: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]

    @classmethod
    def from_hf(cls, c: Mapping[str, Any]) -> LlamaConfig:
        """From config.json; raises UnsupportedModelError for what this file does not implement."""
        model_type = c["model_type"]
        if model_type not in HF_TYPES:
            raise UnsupportedModelError(f"model_type '{model_type}' is not one of {', '.join(HF_TYPES)}")
        if c.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(
                f"hidden_act '{c['hidden_act']}' is not implemented for {model_type}; only silu is"
            )
        if "quantization_config" in c:
            method = c["quantization_config"].get("quant_method", "unknown")
            raise UnsupportedModelError(
                f"the checkpoint is quantized with '{method}': use --quant int4 if that is fp8, else the original or a "
                "GGUF file"
            )
        c = {**_HF_DEFAULTS[model_type], **c}
        heads, layers = int(c["num_attention_heads"]), int(c["num_hidden_layers"])
        head_dim = int(c.get("head_dim") or c["hidden_size"] // heads)
        bias = bool(c.get("attention_bias", False))
        return cls(
            model_type=model_type,
            vocab_size=int(c["vocab_size"]),
            hidden_size=int(c["hidden_size"]),
            intermediate_size=int(c["intermediate_size"]),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(c.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            rms_norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(c, head_dim),
            max_context=int(c["max_position_embeddings"]),
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2" or bias,
            out_bias=bias and model_type != "qwen2",
            mlp_bias=bool(c.get("mlp_bias", False)),
            qk_norm=model_type == "qwen3",
            windows=_hf_windows(c, model_type, layers),
        )

    @classmethod
    def from_gguf(cls, c: Mapping[str, Any], source_names: Callable[[str], bool]) -> LlamaConfig:
        """From GGUF metadata. source_names: whether the file has a tensor of that name (biases, the output matrix)."""
        arch = c["general.architecture"]
        if int(c.get(f"{arch}.expert_count", 0)):
            raise UnsupportedModelError(f"a '{arch}' GGUF with experts (Mixtral) is not implemented")

        def get(key: str) -> Any:
            full = f"{arch}.{key}"
            if full not in c:
                raise UnsupportedModelError(f"the GGUF file lacks '{full}', which a {arch} model needs")
            return c[full]

        heads, layers, hidden = int(get("attention.head_count")), int(get("block_count")), int(get("embedding_length"))
        head_dim = int(c.get(f"{arch}.attention.key_length", hidden // heads))
        context = int(get("context_length"))
        window = int(c.get(f"{arch}.attention.sliding_window", 0))
        return cls(
            model_type=arch,
            vocab_size=len(c["tokenizer.ggml.tokens"]),
            hidden_size=hidden,
            intermediate_size=int(get("feed_forward_length")),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(c.get(f"{arch}.attention.head_count_kv", heads)),
            head_dim=head_dim,
            rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
            rope=RopeConfig.from_gguf(c, arch, head_dim, context),
            max_context=context,
            tie_word_embeddings=not source_names("output.weight"),
            qkv_bias=source_names("blk.0.attn_q.bias"),
            out_bias=source_names("blk.0.attn_output.bias"),
            mlp_bias=source_names("blk.0.ffn_gate.bias"),
            qk_norm=source_names("blk.0.attn_q_norm.weight"),
            windows=(window,) * layers,
        )

    @cached_property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        return (KVSpec(self.num_kv_heads, self.head_dim),) * self.num_layers

    @property
    def made_bytes(self) -> int:
        """Nothing is made of weights."""
        return 0

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor under its Hugging Face name; matrices are (rows, columns)."""
        d, f, q, kv = (
            self.hidden_size,
            self.intermediate_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.num_layers):
            p = f"model.layers.{i}."
            rows = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
            shapes |= {f"{p}{name}.weight": shape for name, shape in rows.items()}
            if self.qkv_bias:
                shapes |= {f"{p}{name}.bias": shape[:1] for name, shape in rows.items()}
            shapes[f"{p}self_attn.o_proj.weight"] = (d, q)
            if self.out_bias:
                shapes[f"{p}self_attn.o_proj.bias"] = (d,)
            if self.qk_norm:
                shapes[f"{p}self_attn.q_norm.weight"] = shapes[f"{p}self_attn.k_norm.weight"] = (self.head_dim,)
            mlp = {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
            shapes |= {f"{p}{name}.weight": shape for name, shape in mlp.items()}
            if self.mlp_bias:
                shapes |= {f"{p}{name}.bias": shape[:1] for name, shape in mlp.items()}
            shapes[f"{p}input_layernorm.weight"] = shapes[f"{p}post_attention_layernorm.weight"] = (d,)
        shapes["model.norm.weight"] = (d,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes

    def build(self, checkpoint: Checkpoint, target: Target, context: int) -> LlamaForCausalLM:
        """Read, fuse and place the weights, one tensor at a time."""
        source, shapes = checkpoint.source, self.weight_shapes()
        divisors = None
        if checkpoint.format == "gguf":
            source.require(map(gguf_name, shapes))
            read = _gguf_reader(self, source, shapes)
            if "rope_freqs.weight" in source:
                divisors = as_tensor(source.read("rope_freqs.weight"))
        else:
            source.require(shapes)
            source.ignore(r".*rotary_emb\.inv_freq", *(["lm_head.weight"] if self.tie_word_embeddings else []))

            def read(name: str) -> BlockWeight | torch.Tensor:
                return source.read(name, shapes[name])

        rope = make_rope(self.rope, context, divisors).to(target.device)
        return LlamaForCausalLM.build(self, read, target, rope)


@dataclass(frozen=True, eq=False)
class LlamaDecoderLayer:
    self_attn: Attention
    mlp: GatedMLP


@dataclass(frozen=True, eq=False)
class LlamaForCausalLM:
    """embed: [vocab, hidden] rows for tokens. head: the same matrix when embeddings are tied."""

    config: LlamaConfig
    embed: BlockWeight | torch.Tensor
    layers: tuple[LlamaDecoderLayer, ...]
    norm: Norm
    head: Linear
    activation: torch.dtype

    @classmethod
    def build(cls, c: LlamaConfig, read: _Read, target: Target, rope: Rope) -> LlamaForCausalLM:
        def norm(name: str) -> Norm:
            return Norm(as_tensor(read(name)).to(target.device, torch.float32), c.rms_norm_eps)

        def join(prefix: str, names: Sequence[str], has_bias: bool) -> Linear:
            weights = [read(f"{prefix}{n}.weight") for n in names]
            bias = torch.cat([as_tensor(read(f"{prefix}{n}.bias")) for n in names]) if has_bias else None
            return Linear.join(weights, target, bias)

        table = read("model.embed_tokens.weight")
        layers = []
        for i in range(c.num_layers):
            p = f"model.layers.{i}."
            attention = Attention(
                norm=norm(f"{p}input_layernorm.weight"),
                qkv=join(f"{p}self_attn.", ("q_proj", "k_proj", "v_proj"), c.qkv_bias),
                out=join(f"{p}self_attn.", ("o_proj",), c.out_bias),
                rope=rope,
                q_norm=norm(f"{p}self_attn.q_norm.weight") if c.qk_norm else None,
                k_norm=norm(f"{p}self_attn.k_norm.weight") if c.qk_norm else None,
                num_heads=c.num_heads,
                spec=c.kv_specs[i],
                scale=c.head_dim**-0.5,
                window=c.windows[i],
            )
            mlp = GatedMLP(
                norm=norm(f"{p}post_attention_layernorm.weight"),
                gate_up=join(f"{p}mlp.", ("gate_proj", "up_proj"), c.mlp_bias),
                down=join(f"{p}mlp.", ("down_proj",), c.mlp_bias),
            )
            layers.append(LlamaDecoderLayer(attention, mlp))
        if c.tie_word_embeddings:
            head = Linear.join([table], target)
        else:
            head = join("", ("lm_head",), False)
        return cls(
            config=c,
            embed=place_embedding(table, target, head if c.tie_word_embeddings else None),
            layers=tuple(layers),
            norm=norm("model.norm.weight"),
            head=head,
            activation=target.activation,
        )

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_context(self) -> int:
        return self.config.max_context

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        return self.config.kv_specs

    def bytes_per_step(self, num_rows: int = 1) -> int:
        """Bytes of weights that a decode step of ``num_rows`` reads."""
        layers = sum(layer.self_attn.num_bytes + layer.mlp.num_bytes for layer in self.layers)
        return layers + self.head.num_bytes + num_rows * weight_bytes(self.embed) // self.vocab_size

    def forward(
        self, batch: Batch, kv: Sequence[LayerKV | RecurrentState], rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits, float32 [M, vocab]; with ``rows`` (int64 [R]) of those rows alone, [R, vocab]."""
        h = embed(batch.tokens, self.embed, out_dtype=torch.float32)
        for layer, cache in zip(self.layers, kv, strict=True):
            assert isinstance(cache, LayerKV)
            h = layer.self_attn(h, batch, cache, self.activation)
            h = layer.mlp(h, self.activation)
        if rows is not None:
            h = h.index_select(0, rows)
        return self.head(h, norm=self.norm, out_dtype=torch.float32)


def _hf_windows(c: Mapping[str, Any], model_type: str, layers: int) -> tuple[int, ...]:
    window = int(c.get("sliding_window") or 0)
    if model_type == "llama" or not window:
        return (0,) * layers
    if model_type == "mistral":
        return (window,) * layers
    if not c.get("use_sliding_window", False):
        return (0,) * layers
    kinds = c.get("layer_types")
    if kinds is None:
        full = int(c.get("max_window_layers", layers))
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


_GGUF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor name of this family."""
    stem, leaf = name.rsplit(".", 1)
    if stem in _GGUF_TOP:
        return f"{_GGUF_TOP[stem]}.{leaf}"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{_GGUF_LAYER[rest]}.{leaf}"


def _gguf_reader(config: LlamaConfig, source: WeightSource, shapes: Mapping[str, tuple[int, ...]]) -> _Read:
    """Reads by Hugging Face's names and in Hugging Face's row order.

    In ``llama`` GGUF files the rows of a query or key head alternate between the halves that RoPE pairs (row 2i + s is
    row s * head_dim / 2 + i of the checkpoint); the other architectures keep the checkpoint's order.
    """
    half = config.head_dim // 2
    within = torch.arange(config.head_dim).view(half, 2).T.reshape(-1)

    def read_hf(name: str) -> BlockWeight | torch.Tensor:
        weight = source.read(gguf_name(name), shapes[name])
        if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = weight.shape[0] // config.head_dim
            rows = (torch.arange(heads)[:, None] * config.head_dim + within).reshape(-1).to(weight.device)
            return weight.select_rows(rows) if isinstance(weight, BlockWeight) else weight[rows]
        return weight

    return read_hf
