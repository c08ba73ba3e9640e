"""Llama-like models against transformers on the same tiny random weights, from files of both formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from ostinato.errors import CheckpointError, UnsupportedModelError
from ostinato.layers.batch import Batch
from ostinato.layers.rope import make_rope
from ostinato.load.gguf import GGUFFile
from ostinato.load.safetensors import HFCheckpoint
from ostinato.models.interface import Checkpoint, Model
from ostinato.models.llama import LlamaConfig, gguf_name
from ostinato.models.registry import family_of
from tests.unit.models.tiny import (
    FAMILIES,
    SPECS,
    Runs,
    Spec,
    build,
    dequantized,
    gguf_metadata,
    gguf_tensors,
    quantized,
    random_ids,
    reference,
    reference_logits,
    save_gguf,
    save_hf,
    tolerance,
)

Pair = tuple[PreTrainedModel, Model, Spec]


@pytest.fixture(scope="module", params=SPECS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same weights in transformers and here, through save_pretrained."""
    spec: Spec = request.param
    theirs = reference(spec)
    return theirs, build(save_hf(theirs, tmp_path_factory.mktemp(spec.name)), context=spec.context), spec


def close(theirs: PreTrainedModel, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance(theirs, expected))


def test_the_tolerance_is_far_below_what_one_wrong_weight_does() -> None:
    """The tests below can fail: a single weight that is off by its own size moves logits far more than rounding."""
    theirs = reference(FAMILIES[0])
    ids = random_ids(12)
    right = reference_logits(theirs, ids)
    with torch.no_grad():
        theirs.model.layers[0].self_attn.k_proj.weight[3, 5] *= -1
    assert (reference_logits(theirs, ids) - right).abs().max() > 20 * tolerance(theirs, right)


def at_length(spec: Spec, theirs: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The reference's logits; LongRoPE picks its frequencies by the text's length there, by the context here."""
    if spec.name != "rope-longrope-long":
        return reference_logits(theirs, ids)
    return reference_logits(theirs, ids + random_ids(max(0, 65 - len(ids)), seed=9))[: len(ids)]


@pytest.mark.parametrize("length", [1, 2, 8, 33])
def test_prefill(pair: Pair, length: int) -> None:
    theirs, ours, spec = pair
    ids = random_ids(length, seed=length)
    close(theirs, Runs(ours, context=spec.context).prefill(ids), at_length(spec, theirs, ids))


def test_prefill_then_64_decoded_steps(pair: Pair) -> None:
    """Greedy tokens are the reference's, and so are the logits that they were taken from."""
    theirs, ours, spec = pair
    runs = Runs(ours, context=spec.context)
    ids = random_ids(5, seed=3)
    rows = [runs.prefill(ids)]
    start = len(ids)
    for _ in range(min(64, spec.context - start)):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(runs.decode(ids[-1:], [len(ids) - 1], [0]))
    logits = torch.cat(rows)
    expected = at_length(spec, theirs, ids)
    close(theirs, logits, expected)
    assert ids[start:] == expected[start - 1 : -1].argmax(-1).tolist()


def test_decode_from_the_first_token_on(pair: Pair) -> None:
    theirs, ours, spec = pair
    ids = random_ids(20, seed=4)
    runs = Runs(ours, context=spec.context)
    logits = torch.cat([runs.decode([token], [at], [0]) for at, token in enumerate(ids)])
    close(theirs, logits, at_length(spec, theirs, ids))


@pytest.mark.parametrize("sizes", [(1,) * 6 + (24,), (13, 1, 16), (29, 1), (7, 7, 7, 9), (2, 28)], ids=str)
def test_a_prompt_in_any_chunks(pair: Pair, sizes: tuple[int, ...]) -> None:
    theirs, ours, spec = pair
    ids = random_ids(sum(sizes), seed=5)
    runs = Runs(ours, context=spec.context, page_size=8)
    rows, start = [], 0
    for size in sizes:
        rows.append(runs.prefill(ids[start : start + size], start))
        start += size
    close(theirs, torch.cat(rows), at_length(spec, theirs, ids))


@pytest.mark.parametrize("page_size", [4, 128])
def test_a_batch_of_three_of_different_lengths(pair: Pair, page_size: int) -> None:
    theirs, ours, spec = pair
    texts = [random_ids(length, seed=10 + length) for length in (3, 11, 6)]
    runs = Runs(ours, num_slots=3, page_size=page_size, context=spec.context)
    for slot, ids in enumerate(texts):
        runs.prefill(ids[:-1], slot=slot)
    order = [2, 0, 1]  # rows need not stand in the order of their slots
    for step in range(8):
        logits = runs.decode([texts[s][-1] for s in order], [len(texts[s]) - 1 for s in order], order)
        for row, slot in enumerate(order):
            expected = at_length(spec, theirs, texts[slot])
            close(theirs, logits[row], expected[-1])
            texts[slot].append((7 * step + slot) % theirs.config.vocab_size)


def test_only_the_rows_that_are_asked_for(pair: Pair) -> None:
    _, ours, spec = pair
    ids = random_ids(9)
    runs = Runs(ours, context=spec.context)
    every = runs.prefill(ids)
    batch = Batch(runs._int32(ids), runs._int32(range(9)), runs._int32([0] * 9), decode=False)
    rows = torch.tensor([8, 0, 3])
    with torch.inference_mode():
        some = ours.forward(batch, runs.kv.layers, rows)
    # A product of three rows may sum in another order than one of nine.
    torch.testing.assert_close(some, every[rows], rtol=1e-5, atol=1e-5)


def test_sharded_checkpoints(tmp_path: Path) -> None:
    theirs = reference(FAMILIES[0])
    opened = save_hf(theirs, tmp_path, shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = random_ids(10)
    close(theirs, Runs(build(opened)).prefill(ids), reference_logits(theirs, ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    """The exact path multiplies by the stored values as they are."""
    theirs = reference(FAMILIES[2])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.to(dtype))
    opened = save_hf(reference(FAMILIES[2]).to(dtype), tmp_path)
    assert opened.tensors["model.norm.weight"].dtype == dtype
    ids = random_ids(10)
    close(theirs, Runs(build(opened)).prefill(ids), reference_logits(theirs, ids))


@pytest.mark.parametrize("spec", [s for s in FAMILIES if not s.changes.get("tie_word_embeddings")], ids=str)
@pytest.mark.parametrize("activation", [torch.float32, torch.bfloat16], ids=str)
def test_untied_embeddings_are_not_the_output_matrix(tmp_path: Path, spec: Spec, activation: torch.dtype) -> None:
    theirs = reference(spec)
    model = build(save_hf(theirs, tmp_path), activation=activation)
    table = theirs.model.embed_tokens.weight.detach()
    assert torch.equal(model.embed, table.to(activation))
    assert torch.equal(model.head.parts[0], theirs.lm_head.weight.detach().to(activation))


# -- GGUF ----------------------------------------------------------------------------------------------------------

GGUF_SPECS = [
    s
    for s in SPECS
    if "window" not in s.name and s.name.split("-")[-1] not in ("dynamic", "mscale", "attention", "short", "long")
]  # what GGUF files of these architectures can say


def arch_of(spec: Spec) -> str:
    return {"Llama": "llama", "Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"}[spec.family]


@pytest.mark.parametrize("spec", GGUF_SPECS, ids=str)
def test_the_same_weights_from_gguf(tmp_path: Path, spec: Spec) -> None:
    theirs, arch = reference(spec), arch_of(spec)
    opened = save_gguf(tmp_path / "m.gguf", gguf_metadata(theirs, arch), gguf_tensors(theirs, arch))
    ids = random_ids(24)
    runs = Runs(build(opened))
    expected = reference_logits(theirs, ids)
    close(
        theirs,
        torch.cat([runs.prefill(ids[:20]), *(runs.decode(ids[i : i + 1], [i], [0]) for i in range(20, 24))]),
        expected,
    )


def quantized_file(spec: Spec, path: Path, types: dict[str, str]) -> tuple[GGUFFile, PreTrainedModel]:
    """A GGUF file whose matrices have ``types`` (by the end of their name), and the model that it then is."""
    theirs, arch = reference(spec), arch_of(spec)
    tensors: dict[str, Any] = {}
    rounded = {}
    for name, tensor in gguf_tensors(theirs, arch).items():
        kind = next((kind for part, kind in types.items() if part in name), None)
        if tensor.dim() < 2 or kind is None:
            tensors[name] = tensor
            continue
        tensors[name] = quantized(tensor, kind)
        rounded[name] = dequantized(tensors[name], kind)
    # Which row of the checkpoint each row of the file is: the same permutation, applied to row numbers.
    numbered = reference(spec)
    for tensor in numbered.state_dict().values():
        tensor.copy_(torch.arange(tensor.shape[0]).view(-1, *[1] * (tensor.dim() - 1)).expand_as(tensor))
    rows_of = {
        name: tensor.reshape(tensor.shape[0], -1)[:, 0].long() for name, tensor in gguf_tensors(numbered, arch).items()
    }
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            stored = rounded.get(gguf_name(name))
            if stored is not None:
                parameter[rows_of[gguf_name(name)]] = stored
    return save_gguf(path, gguf_metadata(theirs, arch), tensors), theirs


ALL = ("token_embd", "output.", "attn_q", "attn_k", "attn_v", "attn_output", "ffn")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
@pytest.mark.parametrize("spec", [FAMILIES[0], FAMILIES[1], FAMILIES[5], FAMILIES[7]], ids=str)
def test_quantized_gguf_in_exact_mode(tmp_path: Path, spec: Spec, kind: str) -> None:
    """Equal to transformers on the dequantized weights: nothing is rounded but what the file had rounded."""
    opened, theirs = quantized_file(spec, tmp_path / "m.gguf", dict.fromkeys(ALL, kind))
    ids = random_ids(24)
    runs = Runs(build(opened))
    expected = reference_logits(theirs, ids)
    close(theirs, torch.cat([runs.prefill(ids[:-1]), runs.decode(ids[-1:], [23], [0])]), expected)


MIXED = {"token_embd": "Q8_0", "output.": "Q5_1", "attn_q": "Q4_0", "attn_k": "Q8_0", "attn_v": "Q4_1",
         "attn_output": "Q5_0", "ffn_gate": "Q4_0", "ffn_up": "Q4_1", "ffn_down": "Q8_0"}  # fmt: skip


@pytest.mark.parametrize("spec", [FAMILIES[0], FAMILIES[2], FAMILIES[5], FAMILIES[7]], ids=str)
def test_matrices_of_different_types_side_by_side(tmp_path: Path, spec: Spec) -> None:
    opened, theirs = quantized_file(spec, tmp_path / "m.gguf", MIXED)
    model = build(opened)
    ids = random_ids(24)
    close(theirs, Runs(model).prefill(ids), reference_logits(theirs, ids))


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def rounding_noise(
    theirs: PreTrainedModel, ids: list[int], expected: torch.Tensor, types: dict[str, str] | None
) -> float:
    """The divergence that the fast path's roundings make: the reference with the input, the result and the weights of
    every product off by random relative errors as large as one rounding to bfloat16 (2^-9), and weights of Q8_0, which
    become 8-bit once more with one scale a row, by half such a step (row's largest / 254)."""
    generator = torch.Generator().manual_seed(0)
    eight_bits = {
        module
        for name, module in theirs.named_modules()
        if types is not None
        and isinstance(module, torch.nn.Linear)
        and any(kind == "Q8_0" and part in gguf_name(f"{name}.weight") for part, kind in types.items())
    }
    if theirs.config.tie_word_embeddings and types is not None and types["token_embd"] == "Q8_0":
        eight_bits.add(theirs.lm_head)

    def off(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 2.0**-9 * (2 * torch.rand(x.shape, generator=generator) - 1))

    def product(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, torch.nn.Linear)
        weight = off(module.weight)
        if module in eight_bits:
            half_step = module.weight.abs().amax(1, keepdim=True) / 254
            weight += half_step * (2 * torch.rand(weight.shape, generator=generator) - 1)
        return off(torch.nn.functional.linear(off(inputs[0]), weight, module.bias))

    hooks = [m.register_forward_hook(product) for m in theirs.modules() if isinstance(m, torch.nn.Linear)]
    noise = sum(divergence(expected, reference_logits(theirs, ids)) for _ in range(4)) / 4
    for hook in hooks:
        hook.remove()
    return noise


@pytest.mark.parametrize(
    "types",
    [None, MIXED, dict.fromkeys(ALL, "Q4_1"), dict.fromkeys(ALL, "Q8_0")],
    ids=["dense", "mixed", "Q4_1", "Q8_0"],
)
@pytest.mark.parametrize("spec", [FAMILIES[0], FAMILIES[1], FAMILIES[2], FAMILIES[5], FAMILIES[7]], ids=str)
def test_the_fast_path_is_near_the_exact_one(tmp_path: Path, spec: Spec, types: dict[str, str] | None) -> None:
    """bfloat16 between ops and packed products, in the prompt's path and in the answer's.

    Besides what ``rounding_noise`` has, queries, keys, values and the gated activation are rounded: five times as much
    leaves room for these (twice as many roundings) and for the luck of one draw.
    """
    if types is None:
        theirs = reference(spec)
        opened: GGUFFile | HFCheckpoint = save_hf(theirs, tmp_path)
    else:
        opened, theirs = quantized_file(spec, tmp_path / "m.gguf", types)
    ids = random_ids(40)
    expected = reference_logits(theirs, ids)
    bound = 5 * rounding_noise(theirs, ids, expected, types)
    model = build(opened, activation=torch.bfloat16)
    at_once = Runs(model, kv_dtype=torch.bfloat16).prefill(ids)
    stepwise = Runs(model, kv_dtype=torch.bfloat16)
    one_by_one = torch.cat([stepwise.decode([token], [at], [0]) for at, token in enumerate(ids)])
    assert 0 < divergence(expected, at_once) < bound
    assert 0 < divergence(expected, one_by_one) < bound


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [FAMILIES[0], FAMILIES[3], FAMILIES[7]], ids=str)
def test_keys_and_values_in_half_precision(tmp_path: Path, spec: Spec, kv_dtype: torch.dtype) -> None:
    """Two roundings a layer, of the many that ``rounding_noise`` has, with everything else in float32."""
    theirs = reference(spec)
    model = build(save_hf(theirs, tmp_path))
    ids = random_ids(40)
    expected = reference_logits(theirs, ids)
    runs = Runs(model, kv_dtype=kv_dtype, page_size=8)
    logits = torch.cat([runs.prefill(ids[:20]), *(runs.decode(ids[i : i + 1], [i], [0]) for i in range(20, 40))])
    assert 0 < divergence(expected, logits) < rounding_noise(theirs, ids, expected, None)


# -- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_configurations_say_what_transformers_says(tmp_path: Path, spec: Spec) -> None:
    theirs = reference(spec).config
    theirs.save_pretrained(tmp_path)
    ours = LlamaConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    shapes = {name: tuple(t.shape) for name, t in reference(spec).state_dict().items()}
    if ours.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert ours.weight_shapes() == shapes


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_configuration_leaves_out_is_the_familys_own_default(model_type: str) -> None:
    given = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
             "num_attention_heads": 32, "use_sliding_window": False}  # fmt: skip
    theirs = AutoConfig.for_model(model_type, **given)
    ours = LlamaConfig.from_hf({**given, "model_type": model_type})
    window = getattr(theirs, "sliding_window", None) or 0
    assert ours.windows == (window,) * 2
    assert ours.max_context == theirs.max_position_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)


LLAMA_JSON: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        family_of(Checkpoint("hf", {**LLAMA_JSON, **change}, None))  # type: ignore[arg-type]  # no weights are read


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_scaling": {"rope_type": "spiral"}}, "RoPE scaling 'spiral'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn.*lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3.*lacks 'low_freq_factor'"),
    ],
)
def test_rope_that_cannot_be_made_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        make_rope(LlamaConfig.from_hf({**LLAMA_JSON, **change}).rope, 64)


def test_dynamic_rope_beyond_its_length_is_refused(tmp_path: Path) -> None:
    spec = next(s for s in SPECS if s.name == "rope-dynamic")
    with pytest.raises(UnsupportedModelError, match="--context 128 or less"):
        build(save_hf(reference(spec), tmp_path), context=129)


def test_missing_extra_and_misshapen_tensors(tmp_path: Path) -> None:
    theirs = reference(FAMILIES[0])
    theirs.config.save_pretrained(tmp_path)
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}

    def attempt(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            build(HFCheckpoint(tmp_path))
        return str(caught.value)

    lost = ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight")
    message = attempt({name: tensor for name, tensor in state.items() if name not in lost})
    assert all(name in message for name in lost)
    assert "model.layers.0.self_attn.k_proj.bias" in attempt(
        {**state, "model.layers.0.self_attn.k_proj.bias": torch.zeros(32)}
    )
    assert "[64, 96]" in attempt({**state, "model.layers.2.mlp.down_proj.weight": torch.zeros(64, 95)})


def test_gguf_files_that_lack_a_key_or_have_experts(tmp_path: Path) -> None:
    theirs = reference(FAMILIES[0])
    metadata, tensors = gguf_metadata(theirs, "llama"), gguf_tensors(theirs, "llama")
    without = {key: value for key, value in metadata.items() if key != "llama.feed_forward_length"}
    with pytest.raises(UnsupportedModelError, match=r"llama\.feed_forward_length"):
        build(save_gguf(tmp_path / "a.gguf", without, tensors))
    with pytest.raises(UnsupportedModelError, match="experts"):
        build(save_gguf(tmp_path / "b.gguf", {**metadata, "llama.expert_count": 8}, tensors))
    with pytest.raises(UnsupportedModelError, match="'falcon'"):
        build(save_gguf(tmp_path / "c.gguf", {**metadata, "general.architecture": "falcon"}, tensors))
    del tensors["blk.2.ffn_up.weight"]
    with pytest.raises(CheckpointError, match=r"blk\.2\.ffn_up\.weight"):
        build(save_gguf(tmp_path / "d.gguf", metadata, tensors))
