"""Qwen3.5 and its relatives against transformers on the same tiny random weights, from files of both formats."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ostinato.engine.runner import Runner
from ostinato.engine.scheduler import Scheduler
from ostinato.errors import CheckpointError, UnsupportedModelError
from ostinato.kv.paged import PagedKV
from ostinato.layers.moe import MoE
from ostinato.load.convert import convert
from ostinato.load.gguf import GGUFFile
from ostinato.load.quantizing import QuantizingCheckpoint
from ostinato.load.safetensors import HFCheckpoint
from ostinato.models.interface import Model
from ostinato.models.qwen3_5 import Qwen35Config, Qwen35ForCausalLM
from ostinato.quant.blocks import BlockWeight, dequantize
from ostinato.quant.int4 import quantize
from ostinato.quant.plan import Scheme
from tests.unit.engine.machine import request, run_all
from tests.unit.models.tiny import (
    CPU,
    Runs,
    build,
    dequantized,
    quantized,
    random_ids,
    reference_logits,
    save_gguf,
    save_hf,
)
from tests.unit.models.tiny_qwen3_5 import SPECS, Spec, gguf_metadata, gguf_tensors, reference, tolerance

Pair = tuple[PreTrainedModel, Model]
MOE, DENSE, NEXT = (next(s for s in SPECS if s.name == name) for name in ("moe", "dense", "next"))
WIDE = next(s for s in SPECS if s.name == "moe-wide-shared")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SPECS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same weights in transformers and here, through save_pretrained (which writes experts one by one)."""
    spec: Spec = request.param
    theirs = reference(spec)
    return theirs, build(save_hf(theirs, tmp_path_factory.mktemp(spec.name)))


def close(theirs: PreTrainedModel, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance(theirs, expected))


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Deviation of the logits' error over theirs, in the better rows: a rounding may swap two of a few experts.

    Each of some 30 activations in a row is rounded to the 8 bits of a bfloat16, which errs by less than 2^-8 of it.
    """
    return float((actual - expected).std(-1).quantile(0.25) / expected.std())


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.linear_attn.A_log",
        "layers.0.linear_attn.norm.weight",
        "layers.1.self_attn.q_proj.weight",
        "layers.2.mlp.shared_expert_gate.weight",
        "layers.2.mlp.gate.weight",
    ],
)
def test_the_tolerance_is_below_what_one_wrong_row_does(name: str) -> None:
    """The tests below can fail: a row (or an element of a vector) that is off by its own size is seen."""
    theirs = reference(MOE)
    ids = random_ids(12)
    right = reference_logits(theirs, ids)
    with torch.no_grad():
        theirs.model.get_parameter(name)[0] *= 2
    assert (reference_logits(theirs, ids) - right).abs().max() > 5 * tolerance(theirs, right)


@pytest.mark.parametrize("length", [1, 2, 8, 33, 70])
def test_prefill(pair: Pair, length: int) -> None:
    theirs, ours = pair
    ids = random_ids(length, seed=length)
    close(theirs, Runs(ours).prefill(ids), reference_logits(theirs, ids))


def test_prefill_then_64_decoded_steps(pair: Pair) -> None:
    """Greedy tokens are the reference's, and so are the logits that they were taken from."""
    theirs, ours = pair
    runs = Runs(ours)
    ids = random_ids(5, seed=3)
    rows = [runs.prefill(ids)]
    for _ in range(64):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(runs.decode(ids[-1:], [len(ids) - 1], [0]))
    expected = reference_logits(theirs, ids)
    close(theirs, torch.cat(rows), expected)
    assert ids[5:] == expected[4:-1].argmax(-1).tolist()


def test_decode_from_the_first_token_on(pair: Pair) -> None:
    theirs, ours = pair
    ids = random_ids(20, seed=4)
    runs = Runs(ours)
    logits = torch.cat([runs.decode([token], [at], [0]) for at, token in enumerate(ids)])
    close(theirs, logits, reference_logits(theirs, ids))


@pytest.mark.parametrize("sizes", [(1,) * 4 + (30,), (13, 1, 20), (33, 1), (2, 3, 29), (64, 6), (65, 1, 4)], ids=str)
def test_a_prompt_in_any_chunks(pair: Pair, sizes: tuple[int, ...]) -> None:
    theirs, ours = pair
    ids = random_ids(sum(sizes), seed=5)
    runs = Runs(ours, page_size=8)
    rows, start = [], 0
    for size in sizes:
        rows.append(runs.prefill(ids[start : start + size], start))
        start += size
    close(theirs, torch.cat(rows), reference_logits(theirs, ids))


def test_a_slot_that_another_text_used_starts_afresh(pair: Pair) -> None:
    theirs, ours = pair
    runs = Runs(ours)
    runs.prefill(random_ids(30, seed=1))
    ids = random_ids(9, seed=2)
    close(theirs, runs.prefill(ids), reference_logits(theirs, ids))
    runs.decode([3], [9], [0])
    close(theirs, runs.decode(ids[:1], [0], [0]), reference_logits(theirs, ids[:1]))


def test_a_batch_of_three_of_different_lengths(pair: Pair) -> None:
    theirs, ours = pair
    texts = [random_ids(length, seed=10 + length) for length in (3, 11, 6)]
    runs = Runs(ours, num_slots=3, page_size=4)
    for slot, ids in enumerate(texts):
        runs.prefill(ids[:-1], slot=slot)
    order = [2, 0, 1]  # rows need not stand in the order of their slots
    for step in range(8):
        logits = runs.decode([texts[s][-1] for s in order], [len(texts[s]) - 1 for s in order], order)
        for row, slot in enumerate(order):
            close(theirs, logits[row], reference_logits(theirs, texts[slot])[-1])
            texts[slot].append((7 * step + slot) % theirs.config.vocab_size)


@pytest.mark.parametrize("chunk", [5, 512])
def test_three_requests_through_the_scheduler(pair: Pair, chunk: int) -> None:
    """Prompts run in chunks between the steps of others, whose buckets have idle rows; slots are used twice."""
    theirs, ours = pair
    kv = PagedKV(ours.kv_specs, num_slots=2, context=64, page_size=8, dtype=torch.float32, device=CPU)
    scheduler = Scheduler(Runner(ours, kv, num_slots=2, device=CPU, graphs=False, chunk=chunk), 64)
    prompts = [random_ids(length, seed=20 + length) for length in (17, 4, 9)]
    lengths = (6, 20, 12)
    sequences = [
        scheduler.add(request(prompt, max_tokens=n, temperature=0.0, ignore_eos=True))
        for prompt, n in zip(prompts, lengths, strict=True)
    ]
    run_all(scheduler, sequences)
    for prompt, sequence, n in zip(prompts, sequences, lengths, strict=True):
        assert len(sequence.tokens) == n
        expected = reference_logits(theirs, prompt + sequence.tokens)
        assert sequence.tokens == expected[len(prompt) - 1 : -1].argmax(-1).tolist()


# -- Hugging Face checkpoints --------------------------------------------------------------------------------------


def fused_checkpoint(theirs: PreTrainedModel, directory: Path, *, multimodal: bool) -> HFCheckpoint:
    """As the published checkpoints are: experts in one tensor, the text model inside another."""
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    config = theirs.config.to_dict()
    if multimodal:
        tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
        tensors |= {
            "model.visual.blocks.0.attn.qkv.weight": torch.ones(4, 4),
            "mtp.fc.weight": torch.ones(4, 4),
            "mtp.layers.0.mlp.gate.weight": torch.ones(4, 4),
        }
        outer = config["model_type"].removesuffix("_text")
        config = {"model_type": outer, "text_config": config, "vision_config": {"depth": 1}}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return HFCheckpoint(directory)


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("spec", [MOE, DENSE], ids=str)
def test_checkpoints_as_they_are_published(
    tmp_path: Path, spec: Spec, multimodal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = reference(spec)
    with caplog.at_level(logging.INFO):
        model = build(fused_checkpoint(theirs, tmp_path, multimodal=multimodal))
    assert [r.getMessage() for r in caplog.records if "skipping" in r.getMessage()] == (
        ["skipping 3 tensors for images and for multi-token prediction: the text model runs"] if multimodal else []
    )
    ids = random_ids(24)
    close(theirs, Runs(model).prefill(ids), reference_logits(theirs, ids))


def test_tied_embeddings_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    theirs = reference(DENSE)
    opened = fused_checkpoint(theirs, tmp_path, multimodal=True)
    assert not family_of_config(opened.config).tie_word_embeddings
    assert family_of_config({**opened.config, "tie_word_embeddings": True}).tie_word_embeddings


def family_of_config(config: dict[str, Any]) -> Qwen35Config:
    return Qwen35Config.from_hf(config)


def test_bfloat16_checkpoints_keep_router_and_gates_as_they_are(tmp_path: Path) -> None:
    opened = save_hf(reference(MOE).bfloat16(), tmp_path)
    fast, exact = build(opened, activation=torch.bfloat16), build(opened)
    for model, dtype in ((fast, torch.bfloat16), (exact, torch.float32)):
        assert isinstance(model, Qwen35ForCausalLM)
        layer = model.layers[0]
        assert isinstance(layer.mlp, MoE)
        assert layer.mlp.router.shape[0] == layer.mlp.num_experts + 1
        assert isinstance(layer.mlp.gate_up, torch.Tensor)
        tensors = (layer.mlp.router, layer.mlp.gate_up, layer.mixer.beta_alpha)
        assert [t.dtype for t in tensors] == [dtype] * 3
        assert layer.mixer.norm.weight.dtype == torch.float32
    ids = random_ids(24)
    theirs = reference(MOE)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16())
    expected = reference_logits(theirs, ids)
    close(theirs, Runs(exact).prefill(ids), expected)
    assert apart(Runs(fast).prefill(ids), expected) < 30**0.5 * 2.0**-8


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("spec", [MOE, WIDE, DENSE, NEXT], ids=str)
def test_int4_made_on_the_fly_and_converted(tmp_path: Path, spec: Spec, multimodal: bool) -> None:
    """Equal to transformers on the dequantized weights, whether experts come one by one or as stacks."""
    theirs, scheme = reference(spec), Scheme(32, "int8")
    if multimodal:
        opened = fused_checkpoint(theirs, tmp_path / "source", multimodal=spec is not NEXT)
    else:
        opened = save_hf(theirs, tmp_path / "source")
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            kind = scheme.kind_for(name, tuple(tensor.shape))
            if kind is not None:
                tensor.copy_(dequantize(quantize(tensor.reshape(-1, tensor.shape[-1]), kind)).view(tensor.shape))
    convert(opened, tmp_path / "packed", scheme)
    ids = random_ids(24)
    expected = reference_logits(theirs, ids)
    for source in (QuantizingCheckpoint(opened, scheme), HFCheckpoint(tmp_path / "packed")):
        close(theirs, Runs(build(source)).prefill(ids), expected)
        fast = build(source, activation=torch.bfloat16)
        assert apart(Runs(fast).prefill(ids), expected) < 2 * 30**0.5 * 2.0**-8


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    save_hf(reference(MOE), tmp_path)
    tensors = {}
    for file in list(tmp_path.glob("*.safetensors")):
        opened = HFCheckpoint(tmp_path)
        tensors = {name: opened.read(name) for name in opened.names() if ".experts.5.up_proj" not in name}
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 3 tensors \(model.layers.0.mlp.experts.5.up_proj.weight"):
        build(HFCheckpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is not implemented for qwen3_5_moe"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ({"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized with 'fp8'"),
        ({"model_type": "qwen4_moe"}, "'qwen4_moe' is not one of"),
    ],
)
def test_settings_that_are_not_implemented(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        family_of_config({**reference(MOE).config.to_dict(), **changes})


def test_defaults_are_those_of_the_published_models() -> None:
    config = {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
    }
    c = family_of_config(config)
    assert [i for i, full in enumerate(c.full_attention) if full] == list(range(3, 40, 4))
    assert c.rope.dim == 64
    assert c.delta is not None
    assert c.delta.conv_channels == 8192
    total = sum(torch.Size(shape).numel() for shape in c.weight_shapes().values())
    assert 34e9 < total < 36e9


# -- GGUF ----------------------------------------------------------------------------------------------------------

GGUF_SPECS = [spec for spec in SPECS if spec.arch is not None]


def gguf_of(spec: Spec, path: Path, **options: Any) -> tuple[PreTrainedModel, GGUFFile]:
    theirs, arch = reference(spec), spec.arch
    assert arch is not None
    return theirs, save_gguf(path, gguf_metadata(theirs, arch), gguf_tensors(theirs, arch, **options))


@pytest.mark.parametrize("spec", GGUF_SPECS, ids=str)
def test_the_same_weights_from_gguf(tmp_path: Path, spec: Spec) -> None:
    theirs, opened = gguf_of(spec, tmp_path / "m.gguf")
    ids = random_ids(24)
    runs = Runs(build(opened))
    logits = [runs.prefill(ids[:20]), *(runs.decode(ids[i : i + 1], [i], [0]) for i in range(20, 24))]
    close(theirs, torch.cat(logits), reference_logits(theirs, ids))


def test_gate_and_up_of_the_experts_in_one_tensor(tmp_path: Path) -> None:
    theirs, opened = gguf_of(MOE, tmp_path / "m.gguf", fused_experts=True)
    ids = random_ids(24)
    close(theirs, Runs(build(opened)).prefill(ids), reference_logits(theirs, ids))


def test_early_files_of_qwen3next(tmp_path: Path) -> None:
    """Their inputs of the delta rule are one tensor, in the checkpoint's own order."""
    theirs = reference(NEXT)
    tensors = gguf_tensors(theirs, "qwen3next")
    for name, tensor in theirs.state_dict().items():
        if name.endswith("in_proj_qkvz.weight"):
            block = f"blk.{name.split('.')[2]}."
            del tensors[f"{block}attn_qkv.weight"], tensors[f"{block}attn_gate.weight"]
            tensors[f"{block}ssm_in.weight"] = tensor
    opened = save_gguf(tmp_path / "m.gguf", gguf_metadata(theirs, "qwen3next"), tensors)
    ids = random_ids(24)
    close(theirs, Runs(build(opened)).prefill(ids), reference_logits(theirs, ids))


def test_layers_for_multi_token_prediction_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = reference(MOE)
    metadata = gguf_metadata(theirs, "qwen35moe")
    metadata |= {"qwen35moe.block_count": 4, "qwen35moe.nextn_predict_layers": 1}
    extra = {"blk.3.nextn.eh_proj.weight": torch.ones(4, 4), "blk.3.attn_norm.weight": torch.ones(4)}
    opened = save_gguf(tmp_path / "m.gguf", metadata, gguf_tensors(theirs, "qwen35moe") | extra)
    with caplog.at_level(logging.INFO):
        model = build(opened)
    assert "skipping 2 tensors for multi-token prediction" in caplog.text
    ids = random_ids(24)
    close(theirs, Runs(model).prefill(ids), reference_logits(theirs, ids))


MIXED = {"token_embd": "Q8_0", "output.": "Q5_1", "attn_qkv": "Q5_0", "attn_gate": "Q4_0", "attn_q.": "Q4_0",
         "attn_k.": "Q8_0", "attn_v.": "Q4_1", "attn_output": "Q5_0", "ssm_out": "Q4_1", "ssm_beta": "Q8_0",
         "ssm_alpha": "Q8_0", "gate_exps": "Q4_0", "up_exps": "Q4_0", "down_exps": "Q8_0", "gate_shexp": "Q8_0",
         "up_shexp": "Q8_0", "down_shexp": "Q8_0", "ffn_gate.": "Q4_0", "ffn_up.": "Q4_1", "ffn_down.": "Q8_0",
}  # fmt: skip
EQUAL = dict.fromkeys(MIXED, "Q4_0") | {"ssm_beta": "F32", "ssm_alpha": "F32"}


def quantized_file(spec: Spec, path: Path, types: dict[str, str]) -> tuple[GGUFFile, GGUFFile]:
    """A file whose matrices have ``types``, and one with the float32 values that those mean."""
    theirs, arch = reference(spec), spec.arch
    assert arch is not None
    stored: dict[str, Any] = {}
    meant = {}
    for name, tensor in gguf_tensors(theirs, arch).items():
        kind = next((kind for part, kind in types.items() if part in name), "F32")
        if tensor.dim() < 2 or kind == "F32" or "gate_inp" in name or tensor.shape[-1] % 32:
            stored[name] = meant[name] = tensor
        else:
            stored[name] = quantized(tensor, kind)
            meant[name] = dequantized(stored[name], kind).reshape(tensor.shape)
    metadata = gguf_metadata(theirs, arch)
    return save_gguf(path / "q.gguf", metadata, stored), save_gguf(path / "f.gguf", metadata, meant)


@pytest.mark.parametrize("types", [MIXED, EQUAL], ids=["mixed", "equal"])
@pytest.mark.parametrize("spec", GGUF_SPECS, ids=str)
def test_quantized_gguf_in_exact_mode(tmp_path: Path, spec: Spec, types: dict[str, str]) -> None:
    """Nothing is rounded but what the file had rounded, whatever is joined with what."""
    file, plain = quantized_file(spec, tmp_path, types)
    ids = random_ids(24)
    expected = Runs(build(plain)).prefill(ids)
    assert torch.equal(Runs(build(file)).prefill(ids), expected)


@pytest.mark.parametrize("types", [MIXED, EQUAL], ids=["mixed", "equal"])
@pytest.mark.parametrize("spec", [MOE, WIDE, DENSE, NEXT], ids=str)
def test_the_cpus_fast_path_is_near(tmp_path: Path, spec: Spec, types: dict[str, str]) -> None:
    """Block weights as they are: the shared expert joins the stacks where types and widths allow it."""
    file, plain = quantized_file(spec, tmp_path, types)
    ids = random_ids(24)
    expected = Runs(build(plain)).prefill(ids)
    model = build(file, activation=torch.bfloat16)
    assert isinstance(model, Qwen35ForCausalLM)
    mlp = model.layers[0].mlp
    if isinstance(mlp, MoE):
        assert isinstance(mlp.gate_up, BlockWeight)
        assert (mlp.shared is None) == (types is EQUAL and spec is not WIDE)
        assert mlp.router.shape[0] == 8 + (mlp.shared is None)
        experts = 8 + (mlp.shared is None)
        assert mlp.gate_up.shape == (experts * 64, 64)
        assert mlp.down.shape == (experts * 64, 32)
    # Twice, for scales and minima that PyTorch's int4 products take in bfloat16.
    assert apart(Runs(model).prefill(ids), expected) < 2 * 30**0.5 * 2.0**-8


def test_experts_of_two_types_are_refused_where_they_cannot_be_multiplied_by(tmp_path: Path) -> None:
    file, plain = quantized_file(MOE, tmp_path, {"gate_exps": "Q4_0", "up_exps": "Q8_0", "down_exps": "Q8_0"})
    with pytest.raises(UnsupportedModelError, match="experts of Q8_0 beside experts of another type"):
        build(file, activation=torch.bfloat16)
    ids = random_ids(12)
    assert torch.equal(Runs(build(file)).prefill(ids), Runs(build(plain)).prefill(ids))


def test_a_file_that_lacks_a_key_or_a_tensor(tmp_path: Path) -> None:
    theirs = reference(MOE)
    metadata, tensors = gguf_metadata(theirs, "qwen35moe"), gguf_tensors(theirs, "qwen35moe")
    without = {key: value for key, value in metadata.items() if not key.endswith("ssm.group_count")}
    with pytest.raises(UnsupportedModelError, match=r"lacks 'qwen35moe\.ssm\.group_count'"):
        build(save_gguf(tmp_path / "m.gguf", without, tensors))
    del tensors["blk.0.ffn_up_exps.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(blk\.0\.ffn_up_exps\.weight\)"):
        build(save_gguf(tmp_path / "m.gguf", metadata, tensors))


def test_bytes_per_step_count_the_experts_that_are_read(tmp_path: Path) -> None:
    theirs = reference(MOE)
    model = build(save_hf(theirs, tmp_path))
    shutil.rmtree(tmp_path)
    c = theirs.config
    unread = (c.num_experts - c.num_experts_per_tok) * 3 * c.moe_intermediate_size * c.hidden_size
    embedding = (c.vocab_size - 1) * c.hidden_size
    matrices = sum(p.numel() for p in theirs.parameters() if p.dim() > 1)
    assert model.bytes_per_step() == 4 * (matrices - 3 * unread - embedding)
