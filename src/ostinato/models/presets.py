"""Shapes of well-known models, for benchmarks with random weights: no download, the same bytes per token.

Numbers are those of the config.json of the models named; ``quant`` is the type of the matrices, in a common GGUF file
of the model or by ``ostinato convert``, and ``head`` that of the embedding and the output matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """config: as in config.json. quant, head: names of block kinds. zero_centred: norms are stored without the one."""

    name: str
    config: Mapping[str, Any]
    quant: str
    head: str
    zero_centred: bool = False


def _dense(model_type: str, *sizes: int, rope_theta: float, tied: bool, context: int, **more: Any) -> dict[str, Any]:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    return {
        "model_type": model_type,
        **dict(zip(names, sizes, strict=True)),
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        **more,
    }


def _qwen35_moe(
    vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, delta_heads: tuple[int, int],
    experts: int, top_k: int, width: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "full_attention_interval": 4,
        "linear_num_key_heads": delta_heads[0],
        "linear_num_value_heads": delta_heads[1],
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                "smollm2-135m",
                _dense("llama", 49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, tied=True, context=8192),
                "Q4_1",
                "Q8_0",
            ),
            Preset(
                "llama-3.2-1b",
                _dense(
                    "llama",
                    *(128256, 2048, 8192, 16, 32, 8, 64),
                    rope_theta=5e5,
                    tied=True,
                    context=131072,
                    rope_scaling={**_LLAMA3_ROPE, "factor": 32.0},
                ),
                "Q4_K",
                "Q6_K",
            ),
            Preset(
                "llama-3.1-8b",
                _dense(
                    "llama",
                    *(128256, 4096, 14336, 32, 32, 8, 128),
                    rope_theta=5e5,
                    tied=False,
                    context=131072,
                    rope_scaling=_LLAMA3_ROPE,
                ),
                "Q4_K",
                "Q6_K",
            ),
            Preset(
                "llama-3.1-70b",
                _dense(
                    "llama",
                    *(128256, 8192, 28672, 80, 64, 8, 128),
                    rope_theta=5e5,
                    tied=False,
                    context=131072,
                    rope_scaling=_LLAMA3_ROPE,
                ),
                "Q4_K",
                "Q6_K",
            ),
            Preset(
                "mistral-7b",
                _dense("mistral", 32768, 4096, 14336, 32, 32, 8, 128, rope_theta=1e6, tied=False, context=32768),
                "Q4_K",
                "Q6_K",
            ),
            Preset(
                "qwen3-0.6b",
                _dense("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, rope_theta=1e6, tied=True, context=40960),
                "Q4_K",
                "Q6_K",
            ),
            Preset(
                "qwen3-8b",
                _dense("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, rope_theta=1e6, tied=False, context=40960),
                "Q4_K",
                "Q6_K",
            ),
            Preset(
                "qwen3-32b",
                _dense("qwen3", 151936, 5120, 25600, 64, 64, 8, 128, rope_theta=1e6, tied=False, context=40960),
                "Q4_K",
                "Q6_K",
            ),
            Preset(
                "qwen3.5-35b-a3b",
                _qwen35_moe(248320, 2048, 40, 16, 2, 256, (16, 32), experts=256, top_k=8, width=512),
                "I4_128",
                "I6_64",
                zero_centred=True,
            ),
            Preset(
                "qwen3.5-35b-a3b-tiny",
                _qwen35_moe(4096, 256, 4, 4, 2, 64, (2, 4), experts=16, top_k=4, width=128),
                "I4_128",
                "I6_64",
                zero_centred=True,
            ),
        )
    }
)
