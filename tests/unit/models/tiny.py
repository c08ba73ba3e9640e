"""Tiny random models of every family: as transformers' modules, as checkpoints of both formats, and as ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import PreTrainedModel

from ostinato.engine.loading import open_checkpoint
from ostinato.kv.paged import PagedKV
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Target
from ostinato.load.gguf import GGUFFile
from ostinato.load.gguf_writer import EncodedTensor, write_gguf
from ostinato.load.safetensors import HFCheckpoint
from ostinato.models.interface import Model
from ostinato.models.llama import gguf_name
from ostinato.models.registry import family_of
from ostinato.quant.gguf import GGUF_TYPES

CPU = torch.device("cpu")
VOCAB = 160
CONTEXT = 128

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
        "long_factor": [1.0, 1.3, 1.7, 2.2, 3.0, 4.5, 6.0, 9.0],
    },
}


@dataclass(frozen=True)
class Spec:
    """One tiny model: transformers' class, what differs from the common sizes, the context it is loaded with."""

    name: str
    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    context: int = CONTEXT

    def __str__(self) -> str:
        return self.name


def _rope(kind: str) -> dict[str, Any]:
    return {"rope_parameters": dict(ROPE[kind])}


FAMILIES = (
    Spec("llama", "Llama"),
    Spec("llama-tied", "Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Spec("llama-bias", "Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    Spec("mistral-window", "Mistral", {"sliding_window": 7}),
    Spec("mistral-full", "Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    Spec("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    Spec(
        "qwen2-window",
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Spec("qwen3", "Qwen3", {"head_dim": 32}),
    Spec("qwen3-tied", "Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
)
ROPES = (
    *(Spec(f"rope-{kind}", "Llama", _rope(kind)) for kind in ROPE if kind not in ("default", "longrope")),
    Spec("rope-longrope-short", "Llama", _rope("longrope"), 64),
    Spec("rope-longrope-long", "Llama", _rope("longrope"), 128),
)
SPECS = FAMILIES + ROPES


def reference(spec: Spec, seed: int = 0) -> PreTrainedModel:
    """transformers' model in float32 with random weights, norms and biases, large enough that attention matters."""
    config_class = getattr(transformers, f"{spec.family}Config")
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = config_class(**{**sizes, **spec.changes})
    config._attn_implementation = "eager"
    model: PreTrainedModel = getattr(transformers, f"{spec.family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name else 0.0))
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)
    return model


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Logits after each of ``ids`` from one pass without a cache: float32 [n, vocab]."""
    logits: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float()


def tolerance(model: PreTrainedModel, expected: torch.Tensor) -> float:
    """How far two float32 evaluations may be apart, absolutely.

    A sum of K products errs by at most K/2 units of 2^-23 of its size, and no chain of them here is longer than five
    products a layer (query/key, scores, values, out, and the MLP's two count as they follow each other) and the head;
    norms keep errors at the size that they have relative to the stream. Both sides err.
    """
    config = model.config
    chain = 6 * config.num_hidden_layers + 1
    widest = max(config.hidden_size, config.intermediate_size)
    return 2 * chain * widest / 2 * 2.0**-23 * float(expected.abs().max())


def save_hf(model: PreTrainedModel, directory: Path, *, shard: str | None = None) -> HFCheckpoint:
    """Written by transformers, opened by us."""
    model.save_pretrained(directory, **({} if shard is None else {"max_shard_size": shard}))
    return HFCheckpoint(directory)


def gguf_metadata(model: PreTrainedModel, arch: str, tokens: Sequence[str] | None = None) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for these families."""
    c = model.config
    values: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
    }
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if head_dim * c.num_attention_heads != c.hidden_size:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    rope = c.rope_parameters
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    names = [f"<{i}>" for i in range(c.vocab_size)] if tokens is None else list(tokens)
    return {"general.architecture": arch, "tokenizer.ggml.tokens": names} | {
        f"{arch}.{k}": v for k, v in values.items()
    }


def gguf_tensors(model: PreTrainedModel, arch: str) -> dict[str, torch.Tensor]:
    """Weights under GGUF's names and in GGUF's row order, float32."""
    c = model.config
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = c.num_attention_heads if ".q_proj." in name else c.num_key_value_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
            tensors[gguf_name(name)] = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        else:
            tensors[gguf_name(name)] = tensor.contiguous()
    rope = c.rope_parameters
    if rope["rope_type"] == "llama3":
        dim = c.hidden_size // c.num_attention_heads
        plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2).double() / dim)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.double()).float()
    return tensors


def quantized(tensor: torch.Tensor, type_name: str) -> EncodedTensor:
    """A matrix in the bytes of ``type_name``, by the ``gguf`` package."""
    kind = gguf.GGMLQuantizationType[type_name]
    raw = torch.from_numpy(gguf.quants.quantize(tensor.numpy(), kind)).view(torch.uint8)
    return EncodedTensor(GGUF_TYPES[type_name], tuple(tensor.shape), raw)


def dequantized(encoded: EncodedTensor, type_name: str) -> torch.Tensor:
    """What the ``gguf`` package reads from these bytes."""
    rows = encoded.raw.numpy()
    if type_name == "F16":
        return encoded.raw.view(torch.float16).float()
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_name]).copy())


def save_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | EncodedTensor]) -> GGUFFile:
    """Written by our writer, opened by our reader."""
    write_gguf(path, metadata, tensors)
    return GGUFFile(path)


def build(
    opened: GGUFFile | HFCheckpoint,
    *,
    activation: torch.dtype = torch.float32,
    context: int = CONTEXT,
    device: torch.device = CPU,
) -> Model:
    """From a checkpoint to a model, as the engine does it; every tensor must have been used."""
    checkpoint, reader = open_checkpoint(opened, device)
    with torch.inference_mode():
        model = family_of(checkpoint).build(checkpoint, Target(device, activation), context)
    reader.finish()
    return model


class Runs:
    """A model with a KV of its own, run without an engine."""

    def __init__(
        self,
        model: Model,
        *,
        num_slots: int = 1,
        page_size: int = CONTEXT,
        context: int = CONTEXT,
        kv_dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self.model = model
        self.device = device
        self.kv = PagedKV(
            model.kv_specs, num_slots=num_slots, context=context, page_size=page_size, dtype=kv_dtype, device=device
        )
        for layer in self.kv.layers:  # nothing may be read that was not written
            for tensor in layer.tensors():
                tensor.fill_(float("nan"))
        for slot in range(num_slots):
            self.kv.reserve(slot, context)

    def _int32(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], start: int = 0, slot: int = 0) -> torch.Tensor:
        """Logits after each of ``ids``, which stand at positions start …; float32 [n, vocab] on the CPU."""
        positions = range(start, start + len(ids))
        batch = Batch(self._int32(ids), self._int32(positions), self._int32([slot] * len(ids)), decode=False)
        return self.model.forward(batch, self.kv.layers).cpu()

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """Logits of one step: float32 [rows, vocab] on the CPU."""
        batch = Batch(self._int32(tokens), self._int32(positions), self._int32(slots), decode=True)
        return self.model.forward(batch, self.kv.layers).cpu()


def random_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids
