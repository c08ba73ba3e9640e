"""What is known of a model of Qwen3.5's relatives before its weights are read: sizes, switches and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from ostinato.errors import UnsupportedModelError
from ostinato.kv.paged import KVSpec
from ostinato.kv.recurrent import RecurrentSpec
from ostinato.layers.rope import RopeConfig
from ostinato.models.qwen3_5_weights import DeltaSizes

HF_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_text", "qwen3_next", "qwen3_moe")
GGUF_ARCHITECTURES = ("qwen35moe", "qwen35", "qwen3next", "qwen3moe")

_Family = str  # qwen3_5_moe, qwen3_5, qwen3_next or qwen3_moe
_OF_GGUF = {"qwen35moe": "qwen3_5_moe", "qwen35": "qwen3_5", "qwen3next": "qwen3_next", "qwen3moe": "qwen3_moe"}

# What transformers assumes where config.json does not say it.
_HYBRID = {
    "partial_rotary_factor": 0.25,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "max_position_embeddings": 32768,
}
_EXPERTS = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
_HF_DEFAULTS: dict[_Family, dict[str, Any]] = {
    "qwen3_5_moe": {**_HYBRID, **_EXPERTS, "num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8},
    "qwen3_5": {**_HYBRID, "num_key_value_heads": 4},
    "qwen3_next": {**_HYBRID, **_EXPERTS, "num_key_value_heads": 2, "num_experts": 512, "num_experts_per_tok": 10},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
}


@dataclass(frozen=True)
class ExpertSizes:
    """num: routed experts. width: of one. shared_width: of the shared one, 0 for none. normalize: over the top-k."""

    num: int
    top_k: int
    width: int
    shared_width: int
    normalize: bool


@dataclass(frozen=True)
class Qwen35Sizes:
    """Sizes and switches. full_attention, sparse: per layer, whether it has attention and whether it has experts.

    delta: of the other layers. experts: of the sparse ones. fused_qkvz: the delta rule's inputs are one tensor, a key
    head after the other. tiled: the order of value heads in the checkpoint, see ``qwen3_5_weights``.
    """

    family: _Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    full_attention: tuple[bool, ...]
    sparse: tuple[bool, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    delta: DeltaSizes | None
    experts: ExpertSizes | None
    rms_norm_eps: float
    rope: RopeConfig
    max_context: int
    tie_word_embeddings: bool
    fused_qkvz: bool
    tiled: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From config.json; raises UnsupportedModelError for what this file does not implement."""
        c = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else dict(config)
        family = str(c["model_type"]).removesuffix("_text")
        if family not in _HF_DEFAULTS:
            raise UnsupportedModelError(f"model_type '{c['model_type']}' is not one of {', '.join(HF_TYPES)}")
        if "quantization_config" in config:
            method = config["quantization_config"].get("quant_method", "unknown")
            raise UnsupportedModelError(
                f"the checkpoint is quantized with '{method}': use --quant int4 if that is fp8, else the original or a "
                "GGUF file"
            )
        c = {**_HF_DEFAULTS[family], **c}
        wrong = {"attention_bias": (False, None), "use_sliding_window": (False, None), "hidden_act": ("silu", None)}
        for key, known in wrong.items():
            if c.get(key) not in known:
                raise UnsupportedModelError(f"{key} = {c[key]!r} is not implemented for {family}")
        heads, layers = int(c["num_attention_heads"]), int(c["num_hidden_layers"])
        head_dim = int(c.get("head_dim") or c["hidden_size"] // heads)
        full = _hf_full_attention(c, family, layers)
        sparse = _hf_sparse(c, family, layers)
        experts = None
        if any(sparse):
            experts = ExpertSizes(
                num=int(c.get("num_local_experts", c["num_experts"])),
                top_k=int(c["num_experts_per_tok"]),
                width=int(c["moe_intermediate_size"]),
                shared_width=0 if family == "qwen3_moe" else int(c["shared_expert_intermediate_size"]),
                normalize=bool(c.get("norm_topk_prob", True)) or family == "qwen3_5_moe",
            )
        delta = None
        if not all(full):
            delta = DeltaSizes(
                num_k_heads=int(c["linear_num_key_heads"]),
                num_v_heads=int(c["linear_num_value_heads"]),
                key_dim=int(c["linear_key_head_dim"]),
                value_dim=int(c["linear_value_head_dim"]),
                conv_width=int(c["linear_conv_kernel_dim"]),
            )
        return cls(
            family=family,
            vocab_size=int(c["vocab_size"]),
            hidden_size=int(c["hidden_size"]),
            intermediate_size=int(c.get("intermediate_size") or 0),
            full_attention=full,
            sparse=sparse,
            num_heads=heads,
            num_kv_heads=int(c["num_key_value_heads"]),
            head_dim=head_dim,
            delta=delta,
            experts=experts,
            rms_norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(c, head_dim),
            max_context=int(c["max_position_embeddings"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", c.get("tie_word_embeddings", False))),
            fused_qkvz=family == "qwen3_next",
            tiled=False,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], has: Callable[[str], bool]) -> Self:
        """From GGUF metadata. has: whether the file has a tensor of that name, which tells what a layer is."""
        arch = metadata["general.architecture"]
        family = _OF_GGUF[arch]

        def get(key: str, default: int | None = None) -> int:
            value = metadata.get(f"{arch}.{key}", default)
            if value is None:
                raise UnsupportedModelError(f"the GGUF file lacks '{arch}.{key}', which a {arch} model needs")
            return max(map(int, value)) if isinstance(value, list) else int(value)

        layers = get("block_count") - get("nextn_predict_layers", 0)
        heads, context = get("attention.head_count"), get("context_length")
        head_dim = get("attention.key_length", get("embedding_length") // heads)
        full = tuple(not has(f"blk.{i}.ssm_a") for i in range(layers))
        sparse = tuple(has(f"blk.{i}.ffn_gate_inp.weight") for i in range(layers))
        experts = delta = None
        if any(sparse):
            width = get("expert_feed_forward_length")
            experts = ExpertSizes(
                num=get("expert_count"),
                top_k=get("expert_used_count"),
                width=width,
                shared_width=0 if family == "qwen3_moe" else get("expert_shared_feed_forward_length", width),
                normalize=True,  # llama.cpp does for all of these, whatever the checkpoint said
            )
        if not all(full):
            delta = DeltaSizes(
                num_k_heads=get("ssm.group_count"),
                num_v_heads=get("ssm.time_step_rank"),
                key_dim=get("ssm.state_size"),
                value_dim=get("ssm.inner_size") // get("ssm.time_step_rank"),
                conv_width=get("ssm.conv_kernel"),
            )
        eps = metadata.get(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
        return cls(
            family=family,
            vocab_size=len(metadata["tokenizer.ggml.tokens"]),
            hidden_size=get("embedding_length"),
            intermediate_size=get("feed_forward_length", 0),
            full_attention=full,
            sparse=sparse,
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            delta=delta,
            experts=experts,
            rms_norm_eps=float(eps),
            rope=RopeConfig.from_gguf(metadata, arch, head_dim, context),
            max_context=context,
            tie_word_embeddings=not has("output.weight"),
            fused_qkvz=has("blk.0.ssm_in.weight"),  # only early files of qwen3next
            tiled=family in ("qwen3_5_moe", "qwen3_5"),
        )

    @property
    def num_layers(self) -> int:
        return len(self.full_attention)

    @property
    def gated(self) -> bool:
        """Whether attention has an output gate, and norms are zero-centred."""
        return self.family != "qwen3_moe"

    @cached_property
    def kv_specs(self) -> tuple[KVSpec | RecurrentSpec, ...]:
        attention = KVSpec(self.num_kv_heads, self.head_dim)
        if self.delta is None:
            return (attention,) * self.num_layers
        d = self.delta
        recurrent = RecurrentSpec(d.conv_channels, d.conv_width, d.num_v_heads, d.key_dim, d.value_dim)
        return tuple(attention if full else recurrent for full in self.full_attention)

    @property
    def made_bytes(self) -> int:
        """Routers folded into output products, in float16; see ``fold_router``."""
        if self.experts is None:
            return 0
        rows = self.experts.num + (1 if self.experts.shared_width else 0)
        attended = self.num_heads * self.head_dim
        mixed = attended if self.delta is None else self.delta.num_v_heads * self.delta.value_dim
        columns = (attended if full else mixed for full in self.full_attention)
        return sum(2 * rows * count for count, sparse in zip(columns, self.sparse, strict=True) if sparse)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor under its Hugging Face name; matrices are (rows, columns), experts (experts, rows, columns)."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_layers):
            p = f"model.layers.{i}."
            mixer = self._attention_shapes() if self.full_attention[i] else self._delta_shapes()
            mlp = self._expert_shapes() if self.sparse[i] else _gated_shapes("mlp.", self.intermediate_size, hidden)
            norms: dict[str, tuple[int, ...]] = {
                "input_layernorm.weight": (hidden,),
                "post_attention_layernorm.weight": (hidden,),
            }
            shapes |= {f"{p}{name}": shape for name, shape in (mixer | norms | mlp).items()}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        q, kv, hidden = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.hidden_size
        return {
            "self_attn.q_proj.weight": (2 * q if self.gated else q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "self_attn.q_norm.weight": (self.head_dim,),
            "self_attn.k_norm.weight": (self.head_dim,),
        }

    def _delta_shapes(self) -> dict[str, tuple[int, ...]]:
        d, hidden = self.delta, self.hidden_size
        assert d is not None
        values, channels = d.num_v_heads * d.value_dim, d.conv_channels
        inputs: dict[str, tuple[int, ...]] = {
            "in_proj_qkv.weight": (channels, hidden),
            "in_proj_z.weight": (values, hidden),
        }
        if self.fused_qkvz:
            inputs = {"in_proj_qkvz.weight": (channels + values, hidden)}
        if self.family == "qwen3_next":
            inputs["in_proj_ba.weight"] = (2 * d.num_v_heads, hidden)
        else:
            inputs |= {"in_proj_b.weight": (d.num_v_heads, hidden), "in_proj_a.weight": (d.num_v_heads, hidden)}
        inputs |= {
            "conv1d.weight": (channels, 1, d.conv_width),
            "A_log": (d.num_v_heads,),
            "dt_bias": (d.num_v_heads,),
            "norm.weight": (d.value_dim,),
            "out_proj.weight": (hidden, values),
        }
        return {f"linear_attn.{name}": shape for name, shape in inputs.items()}

    def _expert_shapes(self) -> dict[str, tuple[int, ...]]:
        e, hidden = self.experts, self.hidden_size
        assert e is not None
        shapes: dict[str, tuple[int, ...]] = {
            "mlp.gate.weight": (e.num, hidden),
            "mlp.experts.gate_up_proj": (e.num, 2 * e.width, hidden),
            "mlp.experts.down_proj": (e.num, hidden, e.width),
        }
        if e.shared_width:
            shapes |= _gated_shapes("mlp.shared_expert.", e.shared_width, hidden)
            shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
        return shapes


def _gated_shapes(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def _hf_full_attention(c: Mapping[str, Any], family: _Family, layers: int) -> tuple[bool, ...]:
    if family == "qwen3_moe":
        return (True,) * layers
    kinds = c.get("layer_types")
    if kinds is None:
        interval = int(c["full_attention_interval"])
        return tuple((i + 1) % interval == 0 for i in range(layers))
    unknown = sorted(set(kinds) - {"linear_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise UnsupportedModelError(f"layer_types of {family} has {len(kinds)} entries with {unknown or 'no'} unknown")
    return tuple(kind == "full_attention" for kind in kinds)


def _hf_sparse(c: Mapping[str, Any], family: _Family, layers: int) -> tuple[bool, ...]:
    if family == "qwen3_5":
        return (False,) * layers
    dense, step = c.get("mlp_only_layers") or (), int(c.get("decoder_sparse_step", 1))
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
