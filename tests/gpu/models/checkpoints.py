"""Small random checkpoints in memory, of every family and any type of weight; needs PyTorch alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ostinato.kv.paged import PagedKV
from ostinato.kv.recurrent import RecurrentState
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Target
from ostinato.load.random import random_block_weight
from ostinato.load.source import TensorInfo, WeightReader
from ostinato.models.interface import Checkpoint, Model
from ostinato.models.llama import LlamaConfig
from ostinato.models.qwen3_5 import HF_TYPES as QWEN35_TYPES
from ostinato.models.qwen3_5 import Qwen35Config
from ostinato.quant.blocks import KINDS, BlockWeight
from ostinato.quant.plan import Scheme

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VOCAB, CONTEXT = 512, 256


@dataclass(frozen=True)
class Spec:
    """A family with the settings that make it different from the others. kind: of its matrices; F32: dense."""

    name: str
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "F32"

    def __str__(self) -> str:
        return f"{self.name}-{self.kind}"

    @property
    def config(self) -> dict[str, Any]:
        common = {
            "vocab_size": VOCAB,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        }
        return {**common, "model_type": self.model_type, **self.changes}


_BIASES = {"attention_bias": True, "mlp_bias": True}
_WINDOW = {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1}
FAMILIES = (
    Spec("llama", "llama"),
    Spec("llama-odd-heads", "llama", {"head_dim": 80, "num_key_value_heads": 1, **_BIASES}),
    Spec("mistral-window", "mistral", {"sliding_window": 37}),
    Spec("qwen2-tied-window", "qwen2", {"tie_word_embeddings": True, **_WINDOW}),
    Spec("qwen3", "qwen3", {"head_dim": 128}),
)


_DELTA = {
    "head_dim": 128,
    "num_attention_heads": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
}
_EXPERTS = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
DELTA_FAMILIES = (
    Spec("qwen35-moe", "qwen3_5_moe_text", {**_DELTA, **_EXPERTS}),
    Spec("qwen35", "qwen3_5_text", {**_DELTA, "linear_num_value_heads": 2, "tie_word_embeddings": True}),
    Spec("qwen3-next", "qwen3_next", {**_DELTA, **_EXPERTS, "linear_num_value_heads": 6}),
    Spec("qwen3-moe", "qwen3_moe", {**_EXPERTS, "head_dim": 64}),
    Spec("qwen35-wide-shared", "qwen3_5_moe_text", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 512}),
)


def config_of(spec: Spec) -> LlamaConfig | Qwen35Config:
    """The family's own config."""
    family = Qwen35Config if spec.model_type in QWEN35_TYPES else LlamaConfig
    return family.from_hf(spec.config)


class MemorySource:
    """Tensors by Hugging Face names. The same spec has the same weights every time, whatever it is placed on."""

    label = "a model in memory"

    def __init__(self, spec: Spec) -> None:
        self.values: dict[str, BlockWeight | torch.Tensor] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for number, (name, shape) in enumerate(config_of(spec).weight_shapes().items()):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(shape, generator=generator)
            plain = spec.kind == "F32" or len(shape) < 2 or _never_quantized(name)
            if len(shape) < 2:
                self.values[name] = 0.3 * noise + _centre(spec, name)
            elif plain:
                self.values[name] = noise * 1.2 * shape[-1] ** -0.5
            else:
                rows = noise.numel() // shape[-1]
                block = random_block_weight(KINDS[spec.kind], (rows, shape[-1]), "cpu", generator)
                self.values[name] = dataclasses.replace(
                    block, d=block.d * 3, m=None if block.m is None else block.m * 3
                )
            self._tensors[name] = TensorInfo(name, shape, "F32" if plain else spec.kind, 0)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, device: torch.device | str = "cpu") -> BlockWeight | torch.Tensor:
        return self.values[name].to(device)


def _never_quantized(name: str) -> bool:
    return name.startswith("model.layers.") and Scheme().kind_for(name, (128, 128)) is None


def _centre(spec: Spec, name: str) -> float:
    """Around what the elements of a vector lie: norms that are not stored without their one, logarithms of decays."""
    if "norm" not in name:
        return -1.0 if name.endswith(("A_log", "dt_bias")) else 0.0
    zero_centred = spec.model_type in QWEN35_TYPES and spec.model_type != "qwen3_moe"
    return 0.0 if zero_centred and "linear_attn" not in name else 1.0


def build(spec: Spec, device: torch.device, activation: torch.dtype, source: MemorySource | None = None) -> Model:
    """The model on ``device``, its weights read as from a file."""
    reader = WeightReader(MemorySource(spec) if source is None else source, device)
    checkpoint = Checkpoint("hf", spec.config, reader)
    with torch.inference_mode():
        model = config_of(spec).build(checkpoint, Target(device, activation), CONTEXT)
    reader.finish()
    return model


class Runs:
    """A model with a KV of its own, run without an engine. Rows of a batch may stand in any order."""

    def __init__(self, model: Model, device: torch.device, kv_dtype: torch.dtype, num_slots: int = 1) -> None:
        self.model, self.device = model, device
        page = 64 if device.type == "cuda" else CONTEXT
        self.kv = PagedKV(
            model.kv_specs, num_slots=num_slots, context=CONTEXT, page_size=page, dtype=kv_dtype, device=device
        )
        for layer in self.kv.layers:  # what nobody wrote must not be read
            for tensor in layer.tensors():
                tensor[0 if isinstance(layer, RecurrentState) else 1 :] = float("nan")
        for slot in reversed(range(num_slots)):
            self.kv.reserve(slot, CONTEXT)

    def _int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    @torch.inference_mode()
    def prefill(self, ids: list[int], start: int = 0, slot: int = 0) -> torch.Tensor:
        """Logits after each of ``ids``, float32 [n, vocab] on the CPU."""
        positions = list(range(start, start + len(ids)))
        batch = Batch(self._int32(ids), self._int32(positions), self._int32([slot] * len(ids)), decode=False)
        return self.model.forward(batch, self.kv.layers).cpu()

    @torch.inference_mode()
    def decode(self, tokens: list[int], positions: list[int], slots: list[int]) -> torch.Tensor:
        """Logits of one step, float32 [rows, vocab] on the CPU."""
        batch = Batch(self._int32(tokens), self._int32(positions), self._int32(slots), decode=True)
        return self.model.forward(batch, self.kv.layers).cpu()


def random_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids
