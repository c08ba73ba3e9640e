"""What ``ostinato inspect`` and ``ostinato models`` tell of a model's files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostinato.config import Settings
from ostinato.load.fetch import cached_path
from ostinato.load.gguf import GGUFFile
from ostinato.load.hub import cached_hub_path
from ostinato.load.known import KNOWN_MODELS, KnownModel, WheelSource
from ostinato.load.quantizing import QuantizingCheckpoint
from ostinato.load.safetensors import HFCheckpoint
from ostinato.load.source import TensorInfo

# Layers for images and for multi-token prediction are numbered anew.
_LAYER = re.compile(r"(?!(?:model\.)?(?:visual|vision_tower|mtp)\.)(?:.*\.)?(?:blk|layers|h)\.(\d+)\.")


@dataclass(frozen=True)
class TypeTotal:
    """All tensors of one type."""

    type_name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class LayerTotal:
    """All tensors of one layer. index: None for what belongs to no layer: embedding, last norm, output."""

    index: int | None
    num_tensors: int
    num_bytes: int
    types: tuple[TypeTotal, ...]


@dataclass(frozen=True)
class ModelDescription:
    """A model as its files tell it.

    architecture: ``general.architecture`` or ``model_type``. title: its own name, if it has one.
    num_layers, context_length: None where the configuration does not say. types: the largest first.
    """

    label: str
    file_format: str
    architecture: str
    title: str | None
    num_layers: int | None
    context_length: int | None
    num_parameters: int
    num_bytes: int
    types: tuple[TypeTotal, ...]
    layers: tuple[LayerTotal, ...]


@dataclass(frozen=True)
class KnownModelStatus:
    """A known model and whether it is on this machine. num_bytes: on disk if cached, else of the file if known."""

    model: KnownModel
    path: Path | None
    num_bytes: int | None


def describe(model: GGUFFile | HFCheckpoint | QuantizingCheckpoint) -> ModelDescription:
    """Count the tensors of an opened model; reads none of them."""
    tensors = list(model.tensors.values())
    if isinstance(model, GGUFFile):
        architecture = str(model.metadata.get("general.architecture", "unknown"))
        file_format = f"GGUF v{model.version}"
        title = model.metadata.get("general.name")
        num_layers = model.metadata.get(f"{architecture}.block_count")
        context = model.metadata.get(f"{architecture}.context_length")
    else:
        config = model.config
        inner: dict[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        architecture = str(config.get("model_type", "unknown"))
        file_format = "safetensors"
        if isinstance(model, QuantizingCheckpoint):
            file_format = f"safetensors, as it would be in {model.scheme}"
        elif model.packed is not None:
            file_format = f"safetensors, packed as {model.packed.get('scheme')}"
        title = config.get("_name_or_path") or model.directory.name
        num_layers = inner.get("num_hidden_layers")
        context = inner.get("max_position_embeddings")
    return ModelDescription(
        label=model.label,
        file_format=file_format,
        architecture=architecture,
        title=title if isinstance(title, str) else None,
        num_layers=num_layers if isinstance(num_layers, int) else None,
        context_length=context if isinstance(context, int) else None,
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        types=_by_type(tensors),
        layers=_by_layer(tensors),
    )


def known_models(configuration: Settings) -> list[KnownModelStatus]:
    """Every known model with what is cached of it; uses no network."""
    found = []
    for model in KNOWN_MODELS.values():
        if isinstance(model.source, WheelSource):
            path = cached_path(model.source, configuration)
            found.append(KnownModelStatus(model, path, model.source.file_bytes))
        else:
            path = cached_hub_path(model.source)
            found.append(KnownModelStatus(model, path, None if path is None else _bytes_on_disk(path)))
    return found


def _by_type(tensors: Iterable[TensorInfo]) -> tuple[TypeTotal, ...]:
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type_name, []).append(tensor)
    totals = [
        TypeTotal(name, len(group), sum(t.num_elements for t in group), sum(t.num_bytes for t in group))
        for name, group in groups.items()
    ]
    return tuple(sorted(totals, key=lambda total: total.num_bytes, reverse=True))


def _by_layer(tensors: Iterable[TensorInfo]) -> tuple[LayerTotal, ...]:
    groups: dict[int, list[TensorInfo]] = {}
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        groups.setdefault(int(match[1]) if match else -1, []).append(tensor)
    return tuple(
        LayerTotal(None if index < 0 else index, len(group), sum(t.num_bytes for t in group), _by_type(group))
        for index, group in sorted(groups.items())
    )


def _bytes_on_disk(path: Path) -> int:
    """Size of a file, or of the weights in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
