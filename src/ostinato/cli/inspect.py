"""``ostinato inspect MODEL``: what a model's files hold and what it will need, without reading its weights."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import torch
import typer

from ostinato.cli import options
from ostinato.cli.options import count, progress, size
from ostinato.cli.table import table
from ostinato.errors import UnsupportedModelError, UsageError
from ostinato.load.describe import LayerTotal, ModelDescription, TypeTotal, describe
from ostinato.load.gguf import GGUFFile
from ostinato.load.quantizing import QuantizingCheckpoint, quantizing
from ostinato.load.resolve import resolve
from ostinato.load.safetensors import HFCheckpoint
from ostinato.load.source import WeightReader
from ostinato.models.interface import Checkpoint, Family
from ostinato.models.registry import family_of

_CONTEXT_WITHOUT_LIMIT = 4096
_KV_DTYPE = torch.bfloat16
_STATE_DTYPE = torch.float32


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="inspect", help="Show a model's layers, weights, and memory, without loading it.")(inspect)


def inspect(
    model: Annotated[str | None, typer.Argument(help="[default: the small default model]")] = None,
    context: Annotated[int | None, typer.Option(help="Show the memory for this many tokens.")] = None,
    quant: options.Quant = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Layers, types of the weights, sizes, and the memory at a context."""
    opened = quantizing(resolve(model, progress()).open(), quant)
    found = describe(opened)
    length = context if context is not None else found.context_length or _CONTEXT_WITHOUT_LIMIT
    if length < 1:
        raise UsageError(f"--context must be at least 1, got {length}")
    try:
        specs, refusal = _family(opened).kv_specs, None
        memory = Memory(
            length,
            found.num_bytes,
            kv_bytes=length * sum(spec.bytes_per_token(_KV_DTYPE) for spec in specs),
            state_bytes=sum(spec.bytes_per_slot(_STATE_DTYPE) for spec in specs),
        )
    except UnsupportedModelError as error:
        memory, refusal = Memory(length, found.num_bytes, None, None), str(error)
    if as_json:
        print(json.dumps(_as_json(found, memory, refusal), indent=2))
    else:
        print(_as_text(found, memory, refusal))


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one sequence needs, in bytes. state_bytes: of recurrent layers. None where nobody knows what layers keep."""

    context: int
    weight_bytes: int
    kv_bytes: int | None
    state_bytes: int | None


def _family(opened: GGUFFile | HFCheckpoint | QuantizingCheckpoint) -> Family:
    """The model's config. Raises UnsupportedModelError where no family implements it."""
    gguf = isinstance(opened, GGUFFile)
    metadata = opened.metadata if isinstance(opened, GGUFFile) else opened.config
    return family_of(Checkpoint("gguf" if gguf else "hf", metadata, WeightReader(opened)))


def _as_json(found: ModelDescription, memory: Memory, refusal: str | None) -> dict[str, Any]:
    return {**dataclasses.asdict(found), "memory": dataclasses.asdict(memory), "not_implemented": refusal}


def _as_text(found: ModelDescription, memory: Memory, refusal: str | None) -> str:
    title = f" ({found.title})" if found.title else ""
    lines = [f"{found.label}{title}", f"{found.architecture}, {found.file_format}"]
    if refusal is not None:
        lines.append(f"cannot be run: {refusal}")
    layers = "unknown" if found.num_layers is None else str(found.num_layers)
    limit = "unknown" if found.context_length is None else str(found.context_length)
    lines.append(f"{count(found.num_parameters)} parameters, {layers} layers, made for a context of {limit}\n")
    lines.append(
        table(
            ["type", "tensors", "parameters", "size", "bits per weight"],
            [
                [t.type_name, str(t.num_tensors), count(t.num_parameters), size(t.num_bytes), _bits(t)]
                for t in found.types
            ],
            right=(1, 2, 3, 4),
        )
    )
    lines.append("")
    lines.append(
        table(
            ["layer", "tensors", "size of each", "types"],
            [_layer_row(group) for group in _alike(found.layers)],
            right=(1, 2),
        )
    )
    lines.append("")
    if memory.kv_bytes is None or memory.state_bytes is None:
        lines.append(f"memory: weights {size(memory.weight_bytes)}, and what the layers keep")
    else:
        total = memory.weight_bytes + memory.kv_bytes + memory.state_bytes
        state = f" + recurrent state {size(memory.state_bytes)}" if memory.state_bytes else ""
        lines.append(
            f"memory at a context of {memory.context}: weights {size(memory.weight_bytes)} + KV in bf16 "
            f"{size(memory.kv_bytes)}{state} = {size(total)}, and working buffers"
        )
    return "\n".join(lines)


def _bits(total: TypeTotal) -> str:
    return f"{8 * total.num_bytes / max(total.num_parameters, 1):.2f}"


def _alike(layers: tuple[LayerTotal, ...]) -> list[list[LayerTotal]]:
    """Runs of layers that hold the same."""
    groups: list[list[LayerTotal]] = []
    for layer in layers:
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and last.index is not None
            and layer.index == last.index + 1
            and dataclasses.replace(layer, index=last.index) == last
        ):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _layer_row(group: list[LayerTotal]) -> list[str]:
    first, last = group[0], group[-1]
    if first.index is None:
        name = "no layer"
    else:
        name = str(first.index) if first is last else f"{first.index}–{last.index}"
    types = ", ".join(f"{t.num_tensors} {t.type_name}" for t in first.types)
    return [name, str(first.num_tensors), size(first.num_bytes), types]
