"""From a checkpoint's own description to the family that runs it."""

from __future__ import annotations

from ostinato.errors import UnsupportedModelError
from ostinato.models import llama, qwen3_5
from ostinato.models.interface import Checkpoint, Family


def family_of(checkpoint: Checkpoint) -> Family:
    """The config of ``checkpoint`` in the family that implements it; UnsupportedModelError where none does."""
    metadata = checkpoint.metadata
    if checkpoint.format == "gguf":
        has = checkpoint.source.__contains__
        arch = metadata.get("general.architecture")
        if arch in llama.GGUF_ARCHITECTURES:
            return llama.LlamaConfig.from_gguf(metadata, has)
        if arch in qwen3_5.GGUF_ARCHITECTURES:
            return qwen3_5.Qwen35Config.from_gguf(metadata, has)
        known = ", ".join(llama.GGUF_ARCHITECTURES + qwen3_5.GGUF_ARCHITECTURES)
        raise UnsupportedModelError(f"GGUF architecture '{arch}' is not implemented; known are {known}")
    model_type = metadata.get("model_type")
    if model_type in llama.HF_TYPES:
        return llama.LlamaConfig.from_hf(metadata)
    if model_type in qwen3_5.HF_TYPES:
        return qwen3_5.Qwen35Config.from_hf(metadata)
    known = ", ".join(llama.HF_TYPES + qwen3_5.HF_TYPES)
    raise UnsupportedModelError(f"model_type '{model_type}' is not implemented; known are {known}")
