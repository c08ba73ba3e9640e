"""Quantization on a GPU: what the CPU gives, to the rounding of sums, within the memory that it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ostinato.load.convert import convert
from ostinato.load.safetensors import HFCheckpoint
from ostinato.quant.blocks import KINDS, BlockWeight, dequantize
from ostinato.quant.int4 import QUANTIZABLE, quantize
from ostinato.quant.plan import Scheme

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_as_on_the_cpu(name: str) -> None:
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    ours, theirs = quantize(weight.to(CUDA), KINDS[name]), quantize(weight, KINDS[name])
    assert ours.device.type == "cuda"
    # A sum in another order may tip a tie between two quants, or between two iterates of one group: seldom.
    same = (ours.words.cpu() == theirs.words).float().mean()
    assert same > 0.99
    exact = weight.norm()
    error, expected = ((dequantize(w).cpu() - weight).norm() / exact for w in (ours, theirs))
    assert float(error) == pytest.approx(float(expected), rel=1e-3)


def test_a_stack_of_experts_converts_in_little_memory_and_loads_on_the_device(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({name: torch.randn(64, 1024, 2048).bfloat16()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "any"}))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    convert(HFCheckpoint(source), tmp_path / "packed", Scheme(group=128), device=CUDA)
    assert torch.cuda.max_memory_allocated() - before < 4 << 30
    weight = HFCheckpoint(tmp_path / "packed").read(name, CUDA)
    assert isinstance(weight, BlockWeight)
    assert weight.shape == (64 * 1024, 2048)
    assert weight.device.type == "cuda"
