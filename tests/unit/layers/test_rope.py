"""Inverse frequencies and attention factors against transformers, for every kind of scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ostinato.errors import UnsupportedModelError
from ostinato.layers.rope import RopeConfig, make_rope
from tests.unit.models.tiny import ROPE

THETAS = (10000.0, 500000.0, 1e6)


def hf_config(parameters: dict[str, Any], head_dim: int, max_position: int) -> HFConfig:
    return HFConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rope_parameters=dict(parameters),
    )


def sized(kind: str, theta: float, head_dim: int) -> dict[str, Any]:
    parameters = {**ROPE[kind], "rope_theta": theta}
    if "original_max_position_embeddings" in parameters:
        parameters["original_max_position_embeddings"] *= 64
    for name in ("short_factor", "long_factor"):
        if name in parameters:
            parameters[name] = torch.linspace(1, 3 if name == "short_factor" else 30, head_dim // 2).tolist()
    return parameters


@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("kind", [kind for kind in ROPE if kind != "default"])
def test_every_kind(kind: str, theta: float, head_dim: int) -> None:
    parameters = sized(kind, theta, head_dim)
    theirs = hf_config(parameters, head_dim, 8192)
    config = RopeConfig.from_hf(theirs.to_dict(), head_dim)
    for context, length in ((2048, 2048), (8192, 8192)):
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu", seq_len=length)
        if kind == "dynamic":  # within the trained length transformers uses plain frequencies
            expected = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        ours = make_rope(config, context)
        assert ours.inv_freq.dtype == torch.float32
        # A power, a division and a ramp in float32: a few units in the last place.
        torch.testing.assert_close(ours.inv_freq.double(), expected.double(), rtol=2e-6, atol=0)
        assert ours.factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("theta", THETAS)
def test_no_scaling(theta: float) -> None:
    config = RopeConfig.from_hf({"rope_theta": theta, "max_position_embeddings": 64}, 64)
    expected = theta ** -(torch.arange(0, 64, 2).double() / 64)
    ours = make_rope(config, 64)
    torch.testing.assert_close(ours.inv_freq.double(), expected, rtol=2e-6, atol=0)
    assert ours.factor == 1.0


def test_old_and_new_spellings_mean_the_same() -> None:
    new = {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    old = {"max_position_embeddings": 512, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    ours = [make_rope(RopeConfig.from_hf(c, 32), 64).inv_freq for c in (new, old)]
    assert torch.equal(*ours)


def test_partial_rotation_turns_the_first_coordinates() -> None:
    config = RopeConfig.from_hf({"rope_theta": 1e4, "partial_rotary_factor": 0.25}, 64)
    assert config.dim == 16
    assert make_rope(config, 16).inv_freq.shape == (8,)


def test_divisors_of_a_gguf_file() -> None:
    config = RopeConfig(1e4, 16, "default", 64, {})
    divisors = torch.tensor([1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0])
    plain = make_rope(config, 64).inv_freq
    assert torch.equal(make_rope(config, 64, divisors).inv_freq, plain / divisors)


def test_dynamic_beyond_the_trained_length_is_refused() -> None:
    config = RopeConfig(1e4, 16, "dynamic", 64, {"factor": 2.0})
    assert make_rope(config, 64).factor == 1.0
    with pytest.raises(UnsupportedModelError, match="--context 64 or less"):
        make_rope(config, 65)
