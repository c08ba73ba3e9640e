"""From a checkpoint's own description to the family that runs it."""

from __future__ import annotations

from ostinato.errors import UnsupportedModelError
from ostinato.models import llama
from ostinato.models.interface import Checkpoint, Family


def family_of(checkpoint: Checkpoint) -> Family:
    """The config of ``checkpoint`` in the family that implements it; UnsupportedModelError where none does."""
    if checkpoint.format == "gguf":
        arch = checkpoint.metadata.get("general.architecture")
        if arch in llama.GGUF_ARCHITECTURES:
            return llama.LlamaConfig.from_gguf(checkpoint.metadata, checkpoint.source.__contains__)
        raise UnsupportedModelError(
            f"GGUF architecture '{arch}' is not implemented; known are {', '.join(llama.GGUF_ARCHITECTURES)}"
        )
    model_type = checkpoint.metadata.get("model_type")
    if model_type in llama.HF_TYPES:
        return llama.LlamaConfig.from_hf(checkpoint.metadata)
    raise UnsupportedModelError(f"model_type '{model_type}' is not implemented; known are {', '.join(llama.HF_TYPES)}")
