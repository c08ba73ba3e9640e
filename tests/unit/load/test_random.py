"""Random weights in a known model's shape."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ModelNotFoundError
from ostinato.load.random import RandomCheckpoint
from ostinato.models.presets import PRESETS
from ostinato.quant.blocks import BlockWeight, dequantize

TINY = "qwen3.5-35b-a3b-tiny"
LAYER = "model.layers.0."


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_has_a_type_that_can_be_made(name: str) -> None:
    checkpoint = RandomCheckpoint(name)
    assert checkpoint.label == f"random {name}"
    head = "lm_head.weight" if "lm_head.weight" in checkpoint.tensors else "model.embed_tokens.weight"
    assert checkpoint.tensors[head].type_name == PRESETS[name].head
    for info in checkpoint.tensors.values():
        if info.type_name == PRESETS[name].quant:
            assert len(info.shape) in (2, 3)
        assert info.type_name in (PRESETS[name].quant, PRESETS[name].head, "F32", "BF16")


def test_tensors_have_their_shapes_and_a_seed_gives_the_same() -> None:
    checkpoint, again, other = RandomCheckpoint(TINY), RandomCheckpoint(TINY), RandomCheckpoint(TINY, seed=1)
    for name, info in checkpoint.tensors.items():
        found, same, different = checkpoint.read(name), again.read(name), other.read(name)
        if isinstance(found, BlockWeight):
            assert isinstance(same, BlockWeight)
            assert isinstance(different, BlockWeight)
            assert found.kind.name == info.type_name
            assert found.shape == (info.num_elements // info.shape[-1], info.shape[-1])
            values = dequantize(found)
            assert torch.equal(values, dequantize(same))
            assert not torch.equal(values, dequantize(different))
            assert values.mean().abs() < 0.005
            assert 0.01 < values.std() < 0.04
        else:
            assert isinstance(same, torch.Tensor)
            assert found.shape == info.shape
            assert torch.isfinite(found).all()
            assert torch.equal(found, same)


def test_fewer_layers_leave_the_pattern_and_the_rest() -> None:
    whole, part = RandomCheckpoint("qwen3.5-35b-a3b").tensors, RandomCheckpoint("qwen3.5-35b-a3b", num_layers=4).tensors
    assert set(part) == {name for name in whole if not name.startswith("model.layers.") or int(name.split(".")[2]) < 4}
    assert all(part[name] == whole[name] for name in part)
    assert "model.layers.3.self_attn.q_proj.weight" in part


def test_zero_centred_norms_pass_what_they_get() -> None:
    checkpoint = RandomCheckpoint(TINY)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert not torch.as_tensor(checkpoint.read(LAYER + name)).any()
    assert torch.all(torch.as_tensor(checkpoint.read(f"{LAYER}linear_attn.norm.weight")) == 1)
    assert torch.all(torch.as_tensor(RandomCheckpoint("smollm2-135m").read("model.norm.weight")) == 1)


def test_decays_are_those_of_a_fresh_model() -> None:
    checkpoint = RandomCheckpoint("qwen3.5-35b-a3b")
    rate = torch.as_tensor(checkpoint.read(f"{LAYER}linear_attn.A_log")).exp()
    assert (rate >= 1).all()
    assert (rate <= 16).all()
    step = torch.nn.functional.softplus(torch.as_tensor(checkpoint.read(f"{LAYER}linear_attn.dt_bias")))
    assert (step >= 0.00099).all()
    assert (step <= 0.101).all()


def test_tokens_choose_different_experts() -> None:
    """Logits of a normed row have a deviation of 1.5: 64 tokens take most of 256 experts, none of them always."""
    router = torch.as_tensor(RandomCheckpoint("qwen3.5-35b-a3b").read(f"{LAYER}mlp.gate.weight")).float()
    x = torch.randn(64, router.shape[1], generator=torch.Generator().manual_seed(0))
    logits = x @ router.T
    assert 1.4 < float(logits.std()) < 1.6
    counts = torch.bincount(logits.topk(8).indices.flatten(), minlength=256)
    assert (counts > 0).sum() > 180
    assert counts.max() < 16


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ModelNotFoundError, match=r"--random gpt is not known; known are .*smollm2-135m"):
        RandomCheckpoint("gpt")
