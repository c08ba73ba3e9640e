"""The memory that is promised before loading is what loading takes, and an error names what would fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from ostinato.engine import loading
from ostinato.engine.budget import MemoryBudget, device_bytes, plan_memory
from ostinato.engine.loading import EngineConfig, load_engine, pick_device, pick_dtypes
from ostinato.errors import ContextLengthError, DeviceError, MemoryBudgetError, UsageError
from ostinato.layers.linear import weight_bytes
from ostinato.load.gguf import GGUFFile
from ostinato.load.source import TensorInfo
from ostinato.models.llama import LlamaConfig
from ostinato.quant.blocks import KINDS, BlockWeight
from ostinato.quant.cpu import pack_for_cpu
from tests.unit.models.tiny import CONTEXT, FAMILIES, gguf_metadata, gguf_tensors, quantized, reference, save_gguf

SCRATCH = 256 << 20


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    return reference(FAMILIES[0])


@pytest.fixture(scope="module")
def opened(theirs: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    tensors = {
        name: quantized(tensor, "Q4_0") if "blk" in name and tensor.dim() == 2 else tensor
        for name, tensor in gguf_tensors(theirs, "llama").items()
    }
    return save_gguf(tmp_path_factory.mktemp("m") / "m.gguf", gguf_metadata(theirs, "llama"), tensors)


def plan(opened: GGUFFile, free: int, context: int | None, slots: int, page_size: int | None) -> MemoryBudget:
    family = LlamaConfig.from_gguf(opened.metadata, opened.tensors.__contains__)
    return plan_memory(
        family,
        opened.tensors,
        activation=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        context=context,
        num_slots=slots,
        free_bytes=free,
        page_size=page_size,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [1, 3])
def test_loading_takes_what_was_promised(opened: GGUFFile, dtype: str, slots: int) -> None:
    loaded = load_engine(opened, EngineConfig(device="cpu", dtype=dtype, context=64, num_slots=slots))
    assert loaded.runner.kv.num_bytes == loaded.budget.kv_bytes
    model = loaded.model
    vectors = sum(4 * t.num_elements for t in opened.tensors.values() if len(t.shape) == 1)
    held = model.bytes_per_step() + weight_bytes(model.embed) * (1 - 1 / model.vocab_size) + vectors
    assert loaded.budget.weight_bytes == pytest.approx(held, abs=1)
    b = loaded.runner.sampler.buffers
    large = b.logit_bias.numel() * 4 + b.token_counts.numel() * 4
    assert loaded.budget.sampler_bytes == large
    assert str(loaded.budget).startswith("weights ")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_bytes_of_packed_weights(name: str) -> None:
    kind = KINDS[name]
    n, k = 32, 512
    info = TensorInfo("w", (n, k), name, 0)
    columns = k // (4 if kind.bits == 8 else 8)
    per = k // kind.super_group
    weight = BlockWeight(
        kind,
        (n, k),
        torch.zeros(n, columns, dtype=torch.int32),
        torch.ones(n, per, dtype=torch.float16),
        high=torch.zeros(n, k // (32 if kind.bits == 5 else 16), dtype=torch.int32) if kind.bits in (5, 6) else None,
        m=torch.ones(n, per, dtype=torch.float16) if kind.min_sign else None,
        sub_d=torch.ones(n, k // kind.group, dtype=torch.int8) if kind.has_sub else None,
        sub_m=torch.ones(n, k // kind.group, dtype=torch.int8) if kind.has_sub and kind.min_sign else None,
    )
    assert device_bytes(info, torch.bfloat16, on_cpu=False) == weight.num_bytes
    scales = 2 * n if kind.bits == 8 else 0  # one bfloat16 a row is not worth a term
    assert device_bytes(info, torch.bfloat16, on_cpu=True) + scales == weight_bytes(pack_for_cpu(weight))
    assert device_bytes(info, torch.float32, on_cpu=True) == 4 * n * k


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("tokens", [200, 317, 450])
def test_what_would_fit_fits_and_one_page_more_does_not(
    opened: GGUFFile, page_size: int | None, slots: int, tokens: int
) -> None:
    least = plan(opened, 1 << 40, 2, slots, page_size)
    free = least.weight_bytes + least.sampler_bytes + SCRATCH + least.kv_bytes_per_token * tokens
    with pytest.raises(MemoryBudgetError) as caught:
        plan(opened, free, 2000, slots, page_size)
    message = str(caught.value)
    assert "a context of 2000" in message
    fits = int(re.search(r"--context (\d+) would fit", message)[1])  # type: ignore[index]  # asserted by the line above
    assert plan(opened, free, fits, slots, page_size).total_bytes <= free
    assert plan(opened, free, None, slots, page_size).context == min(fits, CONTEXT)
    with pytest.raises(MemoryBudgetError):
        plan(opened, free, fits + 1, slots, page_size)
    assert ("a smaller batch" in message) == (slots > 1)


def test_weights_that_do_not_fit(opened: GGUFFile) -> None:
    with pytest.raises(MemoryBudgetError, match=r"the weights need .* MiB .* use a smaller"):
        plan(opened, SCRATCH, None, 1, None)


def test_an_error_of_the_budget_comes_before_any_weight_is_read(
    opened: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(loading, "free_memory", lambda device: SCRATCH + (2 << 20))
    monkeypatch.setattr(GGUFFile, "read", read)
    with pytest.raises(MemoryBudgetError, match="would fit"):
        load_engine(opened, EngineConfig(device="cpu", context=128, num_slots=64))


def test_settings_that_cannot_be_meant(opened: GGUFFile) -> None:
    with pytest.raises(UsageError, match="--dtype float8"):
        pick_dtypes(EngineConfig(dtype="float8"))
    with pytest.raises(UsageError, match="--kv int2"):
        pick_dtypes(EngineConfig(kv="int2"))
    assert pick_dtypes(EngineConfig(dtype="float32", kv="float16")) == (torch.float32, torch.float16)
    for name, says in (("tpu9", "not known"), ("meta", "not supported")):
        with pytest.raises(DeviceError, match=says):
            pick_device(name)
    with pytest.raises(ContextLengthError, match=f"--context {CONTEXT + 1} is more than the {CONTEXT}"):
        load_engine(opened, EngineConfig(device="cpu", context=CONTEXT + 1))
    with pytest.raises(ContextLengthError, match="use at least 2"):
        load_engine(opened, EngineConfig(device="cpu", context=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_cuda() -> None:
    with pytest.raises(DeviceError, match="--device cpu"):
        pick_device("cuda")


def test_an_untied_model_of_dense_weights(tmp_path: Path, theirs: PreTrainedModel) -> None:
    dense = save_gguf(tmp_path / "d.gguf", gguf_metadata(theirs, "llama"), gguf_tensors(theirs, "llama"))
    budget = load_engine(dense, EngineConfig(device="cpu", dtype="float32")).budget
    assert budget.weight_bytes == 4 * sum(p.numel() for p in theirs.parameters())
    assert budget.context == CONTEXT
