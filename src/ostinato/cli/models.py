"""``ostinato models``: the models that have a name, and what is cached of them."""

from __future__ import annotations

import typer

from ostinato.cli.options import size
from ostinato.cli.table import table
from ostinato.config import settings
from ostinato.load.describe import KnownModelStatus, known_models
from ostinato.load.known import DEFAULT_MODEL, HubSource


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="models", help="List the models that are known by name.")(models)


def models() -> None:
    """One line for each: name, size, whether it is on this machine, licence, what it is."""
    rows = [_row(status) for status in known_models(settings())]
    print(table(["name", "size", "cached", "licence", ""], rows))
    print("\nMODEL may also be a GGUF file, a directory with a Hugging Face checkpoint, or a hub id (org/name).")


def _row(status: KnownModelStatus) -> list[str]:
    model = status.model
    notes = [model.description]
    if model.name == DEFAULT_MODEL and "default" not in model.description:
        notes.append("the default")
    if isinstance(model.source, HubSource) and model.source.gated:
        notes.append("licence to be accepted on the hub")
    return [
        model.name,
        "–" if status.num_bytes is None else size(status.num_bytes),
        "yes" if status.path is not None else "no",
        model.licence,
        "; ".join(notes),
    ]
