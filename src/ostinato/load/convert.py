"""``convert``: a Hugging Face checkpoint quantized into a directory that loads at the speed of the disk.

What was finished before an interruption stays: the directory holds ``conversion.json`` until it is complete, which
tells of what source and with which settings, and the same call goes on behind the last complete file. ``config.json``
comes last, so that no half of a model is taken for one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ostinato.errors import ConversionError
from ostinato.load.packed_writer import PARTIAL, Shard, index, is_complete, plan_shards, write_shard
from ostinato.load.progress import Progress
from ostinato.load.quantizing import QuantizingCheckpoint
from ostinato.load.safetensors import CONFIG, PACKED_METHOD, PACKED_VERSION, HFCheckpoint
from ostinato.quant.plan import Scheme

MARKER = "conversion.json"
SHARD_BYTES = 4 << 30
# What a tokenizer, a chat template and generation are made of, where the source has it.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
_SPARE_BYTES = 64 << 20
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What has been written. num_bytes: of the weights' files. num_kept: files that an earlier call had finished."""

    directory: Path
    num_files: int
    num_kept: int
    num_bytes: int
    num_parameters: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / max(self.num_parameters, 1)


def convert(
    source: HFCheckpoint,
    directory: Path,
    scheme: Scheme,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Quantize ``source`` by ``scheme`` on ``device`` into ``directory``, made where it is not there.

    Raises ConversionError: the directory holds something else, the disk is full or cannot be written; and the errors
    of QuantizingCheckpoint.
    """
    view = QuantizingCheckpoint(source, scheme, progress)
    fingerprint = _fingerprint(source, scheme, shard_bytes)
    shards = plan_shards(view.tensors, shard_bytes, fingerprint)
    settings = {
        "quant_method": PACKED_METHOD,
        "version": PACKED_VERSION,
        "scheme": str(scheme),
        "head": scheme.head,
        "fingerprint": fingerprint,
    }
    try:
        finished = _prepare(directory, source, settings, shards)
        kept = [shard for shard in shards if is_complete(shard, directory)]
        if not finished or len(kept) < len(shards):
            _check_room(directory, [shard for shard in shards if shard not in kept])
            _write(view, shards, kept, directory, settings, torch.device(device))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"the disk of {directory} is full: free some space and run the same command again, it goes on behind "
                "the last finished file"
            ) from error
        raise ConversionError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        view.close()
    total = sum(shard.num_bytes for shard in shards)
    count = sum(tensor.num_elements for tensor in view.tensors.values())
    return Conversion(directory, len(shards), len(kept), total, count)


def _prepare(directory: Path, source: HFCheckpoint, settings: dict[str, Any], shards: list[Shard]) -> bool:
    """Whether the conversion was complete already. Raises ConversionError where ``directory`` holds something else."""
    if directory.exists() and not directory.is_dir():
        raise ConversionError(f"{directory} is a file: give a directory that is new or empty")
    directory.mkdir(parents=True, exist_ok=True)
    if directory.samefile(source.directory):
        raise ConversionError(f"{directory} is the source itself: give another directory")
    found = {path.name for path in directory.iterdir() if path.suffix != PARTIAL}
    if not found:
        _replace(directory / MARKER, settings)
        return False
    if MARKER in found:
        earlier = _read(directory / MARKER)
    elif CONFIG in found:
        config = _read(directory / CONFIG)
        earlier = config.get("quantization_config") if isinstance(config, dict) else None
    else:
        earlier = None
    if earlier == settings:
        return MARKER not in found
    if isinstance(earlier, dict) and earlier.get("quant_method") == PACKED_METHOD:
        raise ConversionError(
            f"{directory} holds a conversion to {earlier.get('scheme')} with head {earlier.get('head')} of another "
            "source, or with other settings: give another directory, or delete this one"
        )
    shown = ", ".join(sorted(found)[:3])
    raise ConversionError(f"{directory} is not empty ({shown} …): give a directory that is new or empty")


def _write(
    view: QuantizingCheckpoint,
    shards: list[Shard],
    kept: list[Shard],
    directory: Path,
    settings: dict[str, Any],
    device: torch.device,
) -> None:
    _replace(directory / MARKER, settings)
    (directory / CONFIG).unlink(missing_ok=True)  # from now on it is no model until it is complete again
    for shard in shards:
        if shard in kept:
            _LOG.info("%s is complete", shard.file_name)
            view.skip(shard.source_bytes)
        else:
            write_shard(shard, view, directory, device)
    for name in COPIED:
        if (view.directory / name).is_file():
            shutil.copyfile(view.directory / name, directory / name)
    listing = index(shards)
    if listing is not None:
        (directory / listing[0]).write_bytes(listing[1])
    _replace(directory / CONFIG, {**view.config, "quantization_config": settings})
    (directory / MARKER).unlink()
    for rest in directory.glob(f"*{PARTIAL}"):
        rest.unlink()


def _check_room(directory: Path, missing: list[Shard]) -> None:
    needed = sum(shard.num_bytes for shard in missing) + _SPARE_BYTES
    partial = sum(path.stat().st_size for path in directory.glob(f"*{PARTIAL}"))
    free = shutil.disk_usage(directory).free + partial
    if needed > free:
        raise ConversionError(
            f"{directory} needs {needed / 2**30:.1f} GiB more and its disk has {free / 2**30:.1f} GiB free: free some "
            "space, or give a directory on another disk"
        )


def _fingerprint(source: HFCheckpoint, scheme: Scheme, shard_bytes: int) -> str:
    """Of the source's files (names, sizes, times of change) and everything that decides what is written."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    told = json.dumps([PACKED_VERSION, str(scheme), scheme.head, shard_bytes, files])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _replace(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that the file has either its old or its new content."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
