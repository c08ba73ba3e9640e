"""Checkpoints read through a quantization scheme: bf16, f16, f32, fp8 with scales, experts in both layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ostinato.errors import CheckpointError, UsageError
from ostinato.load import quantizing as module
from ostinato.load.gguf import GGUFFile
from ostinato.load.quantizing import QuantizingCheckpoint, quantizing
from ostinato.load.safetensors import HFCheckpoint
from ostinato.quant.blocks import KINDS, BlockWeight, dequantize
from ostinato.quant.int4 import quantize
from ostinato.quant.plan import Scheme

from ..models import tiny, tiny_qwen3_5
from .files import write_tiny

SCHEME = Scheme(group=64)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def write(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> HFCheckpoint:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return HFCheckpoint(directory)


def same(a: BlockWeight | torch.Tensor, b: BlockWeight | torch.Tensor) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    ours, theirs = a.planes(), b.planes()
    return (
        a.kind == b.kind
        and a.shape == b.shape
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matrices_are_quantized_and_the_rest_stays(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 700)  # a few rows at a time
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, 64).to(dtype),
        Q_PROJ: torch.randn(33, 128).to(dtype),
        "model.layers.0.mlp.gate.weight": torch.randn(8, 64).to(dtype),
        "model.layers.0.input_layernorm.weight": torch.randn(64).to(dtype),
        "model.layers.0.linear_attn.conv1d.weight": torch.randn(12, 1, 4).to(dtype),
        "model.layers.0.odd.weight": torch.randn(5, 40).to(dtype),
        "scalar": torch.tensor(2.5).to(dtype),
        "ids": torch.arange(5),
        "model.visual.patch.weight": torch.randn(64, 64).to(dtype),
    }
    view = QuantizingCheckpoint(write(tmp_path, tensors), SCHEME)
    assert "model.visual.patch.weight" not in view.tensors
    for name, info in view.tensors.items():
        found = view.read(name)
        kind = {"model.embed_tokens.weight": "I6_64", Q_PROJ: "I4_64"}.get(name)
        expected = tensors[name] if kind is None else quantize(tensors[name], KINDS[kind])
        assert same(found, expected), name
        assert info.shape == tensors[name].shape
        if isinstance(found, BlockWeight):
            assert (info.type_name, info.num_bytes) == (found.kind.name, found.num_bytes)
        else:
            assert info.num_bytes == found.numel() * found.element_size()


@pytest.mark.parametrize("shape", [(200, 320), (3, 130, 192)])
def test_fp8_is_read_through_its_scales(
    tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 50 * shape[-1])
    torch.manual_seed(1)
    name = Q_PROJ if len(shape) == 2 else "model.layers.0.mlp.experts.down_proj"
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)) + 0.1
    kept = "model.layers.0.mlp.gate.weight"
    tensors = {name: weight, name + "_scale_inv": scale, kept: weight.view(-1, shape[-1])[:8].clone()}
    tensors[kept + "_scale_inv"] = torch.full((1, -(-shape[-1] // 128)), 2.0)
    source = write(tmp_path, tensors, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    view = QuantizingCheckpoint(source, SCHEME)
    assert set(view.tensors) == {name, kept}
    assert "quantization_config" not in view.config
    exact = weight.float()
    for row in range(shape[-2]):
        for column in range(0, shape[-1], 128):
            exact[..., row, column : column + 128] *= scale[..., row // 128, column // 128, None]
    found = view.read(name)
    assert isinstance(found, BlockWeight)
    assert same(found, quantize(exact.view(-1, shape[-1]), KINDS["I4_64"]))
    assert same(view.read(kept), (weight.view(-1, shape[-1])[:8].float() * 2).bfloat16())


def experts(count: int = 3, width: int = 32, hidden: int = 64) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    stem = "model.layers.0.mlp.experts"
    tensors = {}
    for e in (1, 0, *range(2, count)):  # not in order
        tensors[f"{stem}.{e}.down_proj.weight"] = torch.randn(hidden, width).bfloat16()
        tensors[f"{stem}.{e}.up_proj.weight"] = torch.randn(width, hidden).bfloat16()
        tensors[f"{stem}.{e}.gate_proj.weight"] = torch.randn(width, hidden).bfloat16()
    return tensors


def test_experts_one_by_one_are_offered_as_a_stack(tmp_path: Path) -> None:
    tensors = experts()
    view = QuantizingCheckpoint(write(tmp_path, tensors), SCHEME)
    stem = "model.layers.0.mlp.experts"
    assert {name: info.shape for name, info in view.tensors.items()} == {
        f"{stem}.gate_up_proj": (3, 64, 64),
        f"{stem}.down_proj": (3, 64, 32),
    }
    rows = [tensors[f"{stem}.{e}.{part}_proj.weight"] for e in range(3) for part in ("gate", "up")]
    assert same(view.read(f"{stem}.gate_up_proj"), quantize(torch.cat(rows), KINDS["I4_64"]))
    rows = [tensors[f"{stem}.{e}.down_proj.weight"] for e in range(3)]
    assert same(view.read(f"{stem}.down_proj"), quantize(torch.cat(rows), KINDS["I4_32"]))


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    def refused(tensors: dict[str, torch.Tensor], said: str, **config: Any) -> None:
        with pytest.raises(CheckpointError, match=said) as caught:
            QuantizingCheckpoint(write(tmp_path, tensors, **config), SCHEME).read(next(iter(tensors)))
        assert "\n" not in str(caught.value)

    matrix = torch.randn(8, 64)
    fp8 = matrix.to(torch.float8_e4m3fn)
    refused({Q_PROJ: fp8}, "q_proj.weight has no .*q_proj.weight_scale_inv of shape")
    refused({Q_PROJ: fp8, Q_PROJ + "_scale_inv": torch.ones(2, 1)}, r"of shape \[1, 1\]")
    refused({Q_PROJ: matrix}, "quantized with 'gptq', which", quantization_config={"quant_method": "gptq"})
    refused(
        {Q_PROJ: matrix},
        r"weight_block_size \[128\] is not",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128]},
    )
    refused({Q_PROJ: matrix / 0}, "q_proj.weight cannot be quantized: it has weights that are not finite")
    some = experts()
    del some["model.layers.0.mlp.experts.1.up_proj.weight"]
    refused(some, r"lacks .*experts.1.up_proj.weight \(1 in all\)")
    mixed = experts()
    mixed["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.randn(32, 64)
    refused(mixed, "parts of .*gate_up_proj are of several types")
    mixed["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.randn(16, 64).bfloat16()
    refused(mixed, "differ in their shapes")


def test_gguf_files_are_not_quantized_again(tmp_path: Path) -> None:
    file = GGUFFile(write_tiny(tmp_path / "tiny.gguf"))
    assert quantizing(file, None) is file
    with pytest.raises(UsageError, match="quantized already"):
        quantizing(file, "int4")
    with pytest.raises(UsageError, match="use int4, int4-g32"):
        quantizing(file, "int3")


class Heard:
    """Keeps what it is told of progress."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int | None]] = []

    def start(self, label: str, total_bytes: int | None) -> None:
        self.calls.append((label, total_bytes))

    def update(self, done_bytes: int) -> None:
        self.calls.append(("update", done_bytes))

    def stop(self) -> None:
        self.calls.append(("stop", None))


def test_progress_counts_the_bytes_of_the_checkpoint(tmp_path: Path) -> None:
    heard = Heard()
    view = QuantizingCheckpoint(write(tmp_path, {**experts(), "norm.weight": torch.ones(64)}), SCHEME, heard)
    for name in view.tensors:
        view.read(name)
    view.close()
    total = 3 * 3 * 32 * 64 * 2 + 64 * 4
    assert heard.calls[0] == ("quantizing to int4-g64", total)
    assert heard.calls[-2:] == [("update", total), ("stop", None)]
    done = [count for what, count in heard.calls if what == "update" and count is not None]
    assert done == sorted(done)


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("name", ["moe", "moe-six-values-tied", "dense", "qwen3-moe"])
def test_a_model_has_the_logits_of_the_weights_that_the_blocks_mean(
    name: str, one_by_one: bool, tmp_path: Path
) -> None:
    """transformers' model with each quantized matrix replaced by what its blocks mean, against ours, in float32."""
    spec = next(spec for spec in tiny_qwen3_5.SPECS if spec.name == name)
    theirs = tiny_qwen3_5.reference(spec)
    theirs.save_pretrained(tmp_path, save_original_format=one_by_one)
    view = QuantizingCheckpoint(HFCheckpoint(tmp_path), SCHEME)
    quantized = {}
    for key, parameter in theirs.named_parameters():
        stored = key if key in view.tensors else key.replace("model.", "model.language_model.", 1)
        weight = view.read(stored)
        if isinstance(weight, BlockWeight):
            quantized[key] = dequantize(weight).view(parameter.shape)
            assert (quantized[key] - parameter).norm() < 0.1 * parameter.norm()
    assert any("experts" in key for key in quantized) == ("moe" in name)
    theirs.load_state_dict(quantized, strict=False)
    ids = tiny.random_ids(20)
    expected = tiny.reference_logits(theirs, ids)
    found = tiny.Runs(tiny.build(view)).prefill(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=tiny_qwen3_5.tolerance(theirs, expected))
