"""Models from the Hugging Face hub: a checkpoint in safetensors, or one GGUF model of a repository.

huggingface_hub does the downloading: it resumes, checks, and keeps its own cache. What is complete there is used
without asking the network.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from ostinato.config import Settings
from ostinato.errors import DownloadError
from ostinato.load.gguf import SHARD_NAME
from ostinato.load.known import HubSource
from ostinato.load.progress import Progress
from ostinato.load.safetensors import CONFIG, INDEX, SINGLE

# All that a checkpoint needs; leaves out copies in other formats (consolidated.safetensors, pickles, ONNX).
CHECKPOINT_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")
_GGUF_FILES = ("*.gguf",)
_POLL_S = 0.2


def cached_hub_path(source: HubSource) -> Path | None:
    """The directory or GGUF file of ``source`` in the cache of huggingface_hub, or None if it is not there in full."""
    if source.file is None:
        snapshot = _snapshot(source.repo, CHECKPOINT_FILES)
        if snapshot is not None and _is_complete(snapshot):
            return snapshot
    patterns = _GGUF_FILES if source.file is None else _patterns(source.file)
    snapshot = _snapshot(source.repo, patterns)
    if snapshot is None:
        return None
    names = sorted(file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*.gguf"))
    models = _matching(names, source.file)
    if len(models) != 1 or not _has_all_parts(models[0]):
        return None
    return snapshot / models[0][0]


def fetch_hub_model(source: HubSource, settings: Settings, progress: Progress) -> Path:
    """The directory (safetensors) or the first GGUF file of ``source``, downloaded where it is not cached.

    Raises DownloadError: offline and not cached, no such repository or file, a licence that was not accepted, several
    GGUF models to choose from, or any failure of the download.
    """
    cached = cached_hub_path(source)
    if cached is not None:
        return cached
    if settings.offline:
        raise DownloadError(
            f"{source.reference} is not in {constants.HF_HUB_CACHE} and OSTINATO_OFFLINE is set; fetch it once online"
        )
    with _one_line_errors(source):
        info = huggingface_hub.model_info(source.repo, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = _choose(source, sorted(sizes))
    with _one_line_errors(source), _watched(source, sum(sizes[name] for name in wanted), progress):
        snapshot = huggingface_hub.snapshot_download(
            source.repo, allow_patterns=[_literal(name) for name in wanted], tqdm_class=_NoBar
        )
    return Path(snapshot) / wanted[0] if wanted[0].endswith(".gguf") else Path(snapshot)


def _choose(source: HubSource, names: Sequence[str]) -> list[str]:
    """The files to download. Raises DownloadError where the repository has none, or more than one model."""
    if source.file is None and CONFIG in names and any(name in names for name in (SINGLE, INDEX)):
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in CHECKPOINT_FILES)]
    models = _matching(names, source.file)
    if len(models) == 1 and _has_all_parts(models[0]):
        return models[0]
    offered = [model[0] for model in _matching(names, None)]
    if not offered:
        raise DownloadError(
            f"{source.repo} on the hub has neither {SINGLE} (or its shards) with {CONFIG} nor a GGUF file"
        )
    problem = "several GGUF models" if source.file is None else f"no single GGUF model {source.file!r}"
    raise DownloadError(f"{source.repo} has {problem}; choose as {source.repo}:FILE from {', '.join(offered)}")


def _matching(names: Sequence[str], file: str | None) -> list[list[str]]:
    """The GGUF models among ``names``, each as its files in order, that ``file`` (a name or a type) means."""
    models: dict[str, list[str]] = {}
    for name in names:
        if not name.endswith(".gguf") or "mmproj" in name.lower():  # mmproj: the image encoder of another program
            continue
        match = SHARD_NAME.fullmatch(name)
        models.setdefault(match["prefix"] + match["count"] if match else name, []).append(name)
    if file is None:
        return list(models.values())
    if file.endswith(".gguf"):
        return [model for model in models.values() if file in model]
    # "Q4_K" must not find Q4_K_M.
    tag = re.compile(rf"(?<![A-Za-z0-9]){re.escape(file)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return [model for model in models.values() if tag.search(model[0].rpartition("/")[2])]


def _has_all_parts(model: Sequence[str]) -> bool:
    match = SHARD_NAME.fullmatch(model[0])
    return match is None or len(model) == int(match["count"])


def _patterns(file: str) -> tuple[str, ...]:
    """Patterns that find ``file`` in a cache, whatever the case of a type."""
    if file.endswith(".gguf"):
        match = SHARD_NAME.fullmatch(file)
        return (_literal(match["prefix"]) + "-*.gguf",) if match else (_literal(file),)
    return tuple({f"*{tag}*.gguf" for tag in (file, file.upper(), file.lower())})


def _literal(name: str) -> str:
    """``name`` as a pattern that matches nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _snapshot(repo: str, patterns: Sequence[str]) -> Path | None:
    """The newest snapshot of ``repo`` in the cache, or None if the cache knows of files that it lacks."""
    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_complete(snapshot: Path) -> bool:
    """Whether a snapshot has its configuration and all of its weights."""
    if not (snapshot / CONFIG).is_file():
        return False
    index = snapshot / INDEX
    if not index.is_file():
        return (snapshot / SINGLE).is_file()
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return all((snapshot / shard).is_file() for shard in weight_map.values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return False


@contextmanager
def _one_line_errors(source: HubSource) -> Iterator[None]:
    """Errors of huggingface_hub as DownloadErrors of one line."""
    url = f"https://huggingface.co/{source.repo}"
    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(
            f"{source.repo} asks to accept its licence: do so at {url}, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{source.repo} is not on the hub, or is private (`hf auth login`), and there is no such path here"
        ) from error
    except HFValidationError as error:
        raise DownloadError(f"{source.repo!r} is no hub id: {_first_line(error)}") from error
    except Exception as error:  # errors of the HTTP and Xet clients come through huggingface_hub as they are
        raise DownloadError(
            f"cannot download {source.reference} from the hub ({_first_line(error)}), and there is no such path here; "
            "check the network and try again, it resumes"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@contextmanager
def _watched(source: HubSource, total_bytes: int, progress: Progress) -> Iterator[None]:
    """Report the growth of the repository's folder in the cache while the download runs.

    What an earlier attempt left there is not counted: the bar of a resumed download ends before it is full.
    """
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{source.repo.replace('/', '--')}" / "blobs"
    before = _size(blobs)
    done = Event()

    def watch() -> None:
        while not done.wait(_POLL_S):
            progress.update(min(_size(blobs) - before, total_bytes))

    progress.start(source.reference, total_bytes)
    thread = Thread(target=watch, name="ostinato-download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        progress.stop()


def _size(blobs: Path) -> int:
    """Bytes of all files in ``blobs``, some of which change their names while they are counted."""
    total = 0
    for blob in blobs.glob("*"):
        try:
            total += blob.stat().st_size
        except FileNotFoundError:
            continue
    return total


class _NoBar(tqdm):
    """huggingface_hub's own bars, not shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]  # tqdm has no types
