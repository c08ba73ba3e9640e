"""Rotary position embedding: the inverse frequencies and the attention factor of every scaling kind.

Sources: RoFormer (arXiv:2104.09864); position interpolation (arXiv:2306.15595); YaRN (arXiv:2309.00071, equations
17-22); Llama 3.1's piecewise scaling; LongRoPE (arXiv:2402.13753).
``transformers.modeling_rope_utils`` is the reference in tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ostinato.errors import UnsupportedModelError

_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeConfig:
    """What a model's config says about RoPE.

    theta: base of the frequencies. dim: rotated coordinates of a head (even, ≤ head_dim). kind: one of ``default``,
    ``linear``, ``dynamic``, ``yarn``, ``llama3``, ``longrope``. max_position: positions that the model was made for.
    parameters: the numbers that the kind needs, under Hugging Face's names.
    """

    theta: float
    dim: int
    kind: str
    max_position: int
    parameters: Mapping[str, Any]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int) -> RopeConfig:
        """Read ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (before it)."""
        merged = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = merged.get("rope_type", merged.get("type", "default"))
        theta = merged.get("rope_theta", config.get("rope_theta", 10000.0))
        partial = merged.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        max_position = int(config.get("max_position_embeddings", 2048))
        if "original_max_position_embeddings" in config:
            merged.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
        return cls(float(theta), int(head_dim * partial), str(kind), max_position, merged)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], arch: str, head_dim: int, max_position: int) -> RopeConfig:
        """Read the keys ``ARCH.rope.…`` of a GGUF file."""

        def get(key: str, default: Any = None) -> Any:
            return metadata.get(f"{arch}.rope.{key}", default)

        kind = get("scaling.type", "none")
        parameters = {
            "factor": get("scaling.factor", 1.0),
            "original_max_position_embeddings": get("scaling.original_context_length", max_position),
            "attention_factor": get("scaling.attn_factor"),
            "beta_fast": get("scaling.yarn_beta_fast"),
            "beta_slow": get("scaling.yarn_beta_slow"),
        }
        name = {"none": "default", "linear": "linear", "yarn": "yarn"}.get(kind, kind)
        dim = int(get("dimension_count", head_dim))
        return cls(float(get("freq_base", 10000.0)), dim, name, max_position, parameters)


@dataclass(frozen=True, eq=False)
class Rope:
    """inv_freq: float32 [dim / 2], radians per position. factor: multiplies cos and sin (YaRN's attention factor)."""

    inv_freq: torch.Tensor
    factor: float

    def to(self, device: torch.device | str) -> Rope:
        return Rope(self.inv_freq.to(device), self.factor)


def make_rope(config: RopeConfig, context: int, divisors: torch.Tensor | None = None) -> Rope:
    """Frequencies for positions 0 … context - 1.

    divisors: float32 [dim / 2] that a GGUF file carries as ``rope_freqs.weight`` (Llama 3.1's scaling, worked out by
    the converter). Raises UnsupportedModelError for an unknown kind, and for ``dynamic`` beyond the trained length,
    where Hugging Face changes the frequencies in the middle of a text.
    """
    p = config.parameters
    missing = [name for name in _NEEDED.get(config.kind, ()) if p.get(name) is None]
    if missing and divisors is None:
        raise UnsupportedModelError(f"RoPE scaling '{config.kind}' lacks '{missing[0]}' in the model's configuration")
    exponents = torch.arange(0, config.dim, 2, dtype=torch.int64).float() / config.dim
    inv_freq = 1.0 / (config.theta**exponents)
    if divisors is not None:
        return Rope(inv_freq / divisors.float(), 1.0)
    match config.kind:
        case "default":
            return Rope(inv_freq, 1.0)
        case "linear":
            return Rope(inv_freq / float(p["factor"]), 1.0)
        case "dynamic":
            if context > config.max_position:
                raise UnsupportedModelError(
                    f"dynamic RoPE scaling changes with the length of the text beyond {config.max_position} tokens; "
                    f"use --context {config.max_position} or less"
                )
            return Rope(inv_freq, 1.0)
        case "llama3":
            return Rope(_llama3(inv_freq, p), 1.0)
        case "yarn":
            return _yarn(config)
        case "longrope":
            return _longrope(config, exponents, context)
    raise UnsupportedModelError(
        f"RoPE scaling '{config.kind}' is not known; known are default, linear, dynamic, yarn, llama3 and longrope"
    )


def _llama3(inv_freq: torch.Tensor, p: Mapping[str, Any]) -> torch.Tensor:
    factor, low, high = float(p["factor"]), float(p["low_freq_factor"]), float(p["high_freq_factor"])
    original = float(p["original_max_position_embeddings"])
    turns = original * inv_freq / (2 * math.pi)  # full turns within the original context
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn(config: RopeConfig) -> Rope:
    p, dim, base = config.parameters, config.dim, config.theta
    original = float(p.get("original_max_position_embeddings") or config.max_position)
    factor = float(p["factor"])
    attention = p.get("attention_factor")
    if attention is None:
        mscale, mscale_all = float(p.get("mscale") or 0), float(p.get("mscale_all_dim") or 0)
        both = mscale and mscale_all
        attention = _mscale(factor, mscale) / _mscale(factor, mscale_all) if both else _mscale(factor)

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(float(p.get("beta_fast") or 32)), dim_of(float(p.get("beta_slow") or 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    pos_freqs = base ** (torch.arange(0, dim, 2).float() / dim)
    return Rope((1.0 / (factor * pos_freqs)) * ramp + (1.0 / pos_freqs) * (1 - ramp), float(attention))


def _longrope(config: RopeConfig, exponents: torch.Tensor, context: int) -> Rope:
    p = config.parameters
    original = int(p.get("original_max_position_embeddings") or config.max_position)
    factor = float(p.get("factor") or config.max_position / original)
    attention = p.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    # Chosen once for the configured context, as llama.cpp and vLLM do: keys already in the cache cannot be re-rotated.
    factors = torch.tensor(p["long_factor"] if context > original else p["short_factor"], dtype=torch.float32)
    return Rope(1.0 / (factors * config.theta**exponents), float(attention))
