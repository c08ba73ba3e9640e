"""Tiny random models of Qwen3.5's relatives, as transformers' modules and as GGUF files in llama.cpp's conventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.unit.models.tiny import CONTEXT, VOCAB

_KINDS = ["linear_attention", "full_attention", "linear_attention"]
_HYBRID: dict[str, Any] = {
    "layer_types": _KINDS,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}


@dataclass(frozen=True)
class Spec:
    """One tiny model: transformers' class, what differs from the common sizes, its GGUF architecture if it has one."""

    name: str
    family: str
    arch: str | None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


SPECS = (
    Spec("moe", "Qwen3_5Moe", "qwen35moe", {**_HYBRID, **_EXPERTS}),
    Spec(
        "moe-six-values-tied",
        "Qwen3_5Moe",
        "qwen35moe",
        {**_HYBRID, **_EXPERTS, **_PARTIAL, "linear_num_value_heads": 6, "tie_word_embeddings": True},
    ),
    Spec("moe-wide-shared", "Qwen3_5Moe", "qwen35moe", {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 64}),
    Spec(
        "dense",
        "Qwen3_5",
        "qwen35",
        {**_HYBRID, "intermediate_size": 96, "linear_num_key_heads": 3, "linear_num_value_heads": 3},
    ),
    Spec("dense-tied", "Qwen3_5", "qwen35", {**_HYBRID, "intermediate_size": 96, "tie_word_embeddings": True}),
    Spec(
        "next",
        "Qwen3Next",
        "qwen3next",
        {**_HYBRID, **_EXPERTS, "linear_num_value_heads": 6, "norm_topk_prob": True, "intermediate_size": 96},
    ),
    Spec(
        "next-some-dense",
        "Qwen3Next",
        None,
        {**_HYBRID, **_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1], "intermediate_size": 96},
    ),
    Spec("qwen3-moe", "Qwen3Moe", "qwen3moe", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    Spec(
        "qwen3-moe-unnormalized",
        "Qwen3Moe",
        None,
        {**_EXPERTS, "head_dim": 16, "norm_topk_prob": False, "decoder_sparse_step": 2, "intermediate_size": 96},
    ),
)


def reference(spec: Spec, seed: int = 0) -> PreTrainedModel:
    """transformers' model in float32 with random weights, large enough that every part of it matters."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    name = f"{spec.family}TextConfig" if spec.family.startswith("Qwen3_5") else f"{spec.family}Config"
    config = getattr(transformers, name)(**{**sizes, **spec.changes})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model: PreTrainedModel = getattr(transformers, f"{spec.family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    plain_norms = spec.family == "Qwen3Moe"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                around = 1.0 if plain_norms or "linear_attn" in name else 0.0
                parameter.copy_(0.3 * noise + around)
            elif parameter.dim() == 1:  # A_log, dt_bias: decays from hardly any to nearly all
                parameter.copy_(0.7 * noise - 1.0)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model


def tolerance(model: PreTrainedModel, expected: torch.Tensor) -> float:
    """How far two float32 evaluations may be apart, absolutely; see ``tiny.tolerance``.

    A layer is a chain of up to nine products here: input projection, convolution, the state's read and its write,
    the output projection, the router, and three of an expert. None sums over more than 96 terms.
    """
    chain = 9 * model.config.num_hidden_layers + 1
    return 2 * chain * 96 / 2 * 2.0**-23 * float(expected.abs().max())


def gguf_metadata(model: PreTrainedModel, arch: str) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for these families."""
    c = model.config
    head_dim = c.head_dim
    values: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
    }
    if arch in ("qwen35", "qwen3next", "qwen3moe"):
        values["feed_forward_length"] = c.intermediate_size
    if arch != "qwen35":
        values |= {
            "expert_count": c.num_experts,
            "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": c.moe_intermediate_size,
        }
    if arch in ("qwen35moe", "qwen3next"):
        values["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
    if arch != "qwen3moe":
        values |= {
            "ssm.conv_kernel": c.linear_conv_kernel_dim,
            "ssm.state_size": c.linear_key_head_dim,
            "ssm.group_count": c.linear_num_key_heads,
            "ssm.time_step_rank": c.linear_num_value_heads,
            "ssm.inner_size": c.linear_value_head_dim * c.linear_num_value_heads,
            "full_attention_interval": 4,
            "rope.dimension_count": int(head_dim * c.rope_parameters["partial_rotary_factor"]),
        }
    if arch in ("qwen35", "qwen35moe"):
        values["rope.dimension_sections"] = [11, 11, 10, 0]
    tokens = [f"<{i}>" for i in range(c.vocab_size)]
    return {"general.architecture": arch, "tokenizer.ggml.tokens": tokens} | {
        f"{arch}.{key}": value for key, value in values.items()
    }


_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_TOP = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def gguf_tensors(model: PreTrainedModel, arch: str, *, fused_experts: bool = False) -> dict[str, torch.Tensor]:
    """Weights under GGUF's names and in the order of llama.cpp's converter, float32.

    fused_experts: gate and up of the experts in one tensor, as the converter can also write them.
    """
    c, tensors = model.config, {}
    for name, value in model.state_dict().items():
        tensor = value
        if arch in ("qwen35", "qwen35moe") and "linear_attn." in name:
            tensor = _tiled(c, name, tensor)
        if arch != "qwen3moe" and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            tensor = tensor + 1
        if name in _TOP:
            if name != "lm_head.weight" or not c.tie_word_embeddings:
                tensors[f"{_TOP[name]}.weight"] = tensor
            continue
        _, _, index, rest = name.split(".", 3)
        block = f"blk.{index}."
        if rest == "linear_attn.A_log":
            tensors[f"{block}ssm_a"] = -tensor.exp()
        elif rest == "linear_attn.dt_bias":
            tensors[f"{block}ssm_dt.bias"] = tensor
        elif rest == "linear_attn.conv1d.weight":
            tensors[f"{block}ssm_conv1d.weight"] = tensor.squeeze(1)
        elif rest == "linear_attn.in_proj_qkvz.weight":
            qkv, z = _split_qkvz(c, tensor)
            tensors |= {f"{block}attn_qkv.weight": qkv, f"{block}attn_gate.weight": z}
        elif rest == "mlp.experts.gate_up_proj" and not fused_experts:
            gate, up = tensor.chunk(2, dim=1)
            tensors |= {f"{block}ffn_gate_exps.weight": gate, f"{block}ffn_up_exps.weight": up}
        elif rest.startswith("mlp.experts."):
            tensors[f"{block}ffn_{rest.split('.')[-1].removesuffix('_proj')}_exps.weight"] = tensor
        elif rest == "post_attention_layernorm.weight":
            tensors[f"{block}{'ffn_norm' if arch == 'qwen3moe' else 'post_attention_norm'}.weight"] = tensor
        elif rest == "mlp.shared_expert_gate.weight":
            tensors[f"{block}ffn_gate_inp_shexp.weight"] = tensor.reshape(-1)
        else:
            stem, leaf = rest.rsplit(".", 1)
            tensors[f"{block}{_NAMES[stem]}.{leaf}"] = tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _tiled(c: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Value heads in tiled order wherever ``tensor`` has them."""
    k_heads, v_heads = c.linear_num_key_heads, c.linear_num_value_heads
    heads = torch.arange(v_heads).view(k_heads, -1).T.reshape(-1)
    elements = (heads[:, None] * c.linear_value_head_dim + torch.arange(c.linear_value_head_dim)).reshape(-1)
    queries = 2 * k_heads * c.linear_key_head_dim
    match name.split("linear_attn.")[1]:
        case "in_proj_qkv.weight" | "conv1d.weight":
            return torch.cat([tensor[:queries], tensor[queries:][elements]])
        case "in_proj_z.weight":
            return tensor[elements]
        case "in_proj_a.weight" | "in_proj_b.weight" | "A_log" | "dt_bias":
            return tensor[heads]
        case "out_proj.weight":
            return tensor[:, elements]
    return tensor


def _split_qkvz(c: Any, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """qwen3_next's fused projection, query, key, values and gates of each key head, as q | k | v and z."""
    ratio = c.linear_num_value_heads // c.linear_num_key_heads * c.linear_value_head_dim
    widths = [c.linear_key_head_dim, c.linear_key_head_dim, ratio, ratio]
    parts = tensor.view(c.linear_num_key_heads, sum(widths), -1).split(widths, dim=1)
    q, k, v, z = (part.reshape(-1, tensor.shape[1]) for part in parts)
    return torch.cat([q, k, v]), z
