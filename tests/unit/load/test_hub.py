"""Hub ids: what is chosen of a repository, what counts as cached, and errors of one line; nothing is downloaded."""

import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ostinato.config import Settings
from ostinato.errors import DownloadError
from ostinato.load.hub import cached_hub_path, fetch_hub_model
from ostinato.load.known import HubSource
from ostinato.load.progress import SilentProgress

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHECKPOINT = ["config.json", "model.safetensors", "tokenizer.json", "README.md", "consolidated.safetensors", "x.bin"]
QUANTS = ["README.md", "M-Q4_K.gguf", "M-Q4_K_M.gguf", "M-Q8_0-00001-of-00002.gguf", "M-Q8_0-00002-of-00002.gguf"]


class Hub:
    """A hub with one repository, and the cache of huggingface_hub in a temporary directory."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.files: dict[str, bytes] = {}
        self.calls: list[list[str]] = []

    @property
    def snapshot(self) -> Path:
        return self.cache / "models--org--name" / "snapshots" / COMMIT

    def put(self, *names: str) -> None:
        """Files in the cache."""
        refs = self.cache / "models--org--name" / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        (refs / "main").write_text(COMMIT)
        for name in names:
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (self.snapshot / name).write_bytes(self.files.get(name, b"{}"))

    def model_info(self, repo, files_metadata):
        assert (repo, files_metadata) == ("org/name", True)
        siblings = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in self.files.items()]
        return SimpleNamespace(siblings=siblings)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    real = huggingface_hub.snapshot_download

    def snapshot_download(repo, *, allow_patterns, local_files_only=False, tqdm_class=None):
        if local_files_only:
            return real(repo, allow_patterns=allow_patterns, local_files_only=True)
        names = [n for n in hub.files if any(fnmatch.fnmatchcase(n, pattern) for pattern in allow_patterns)]
        hub.calls.append(names)
        with tqdm_class(total=3) as bar:
            assert bar.disable
        hub.put(*names)
        return str(hub.snapshot)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "model_info", hub.model_info)
    return hub


@pytest.fixture
def configuration(tmp_path):
    return Settings(tmp_path / "cache")


def fetch(configuration, file=None) -> Path:
    return fetch_hub_model(HubSource("org/name", file), configuration, SilentProgress())


def test_a_checkpoint_is_fetched_without_its_copies(hub, configuration):
    hub.files = dict.fromkeys(CHECKPOINT, b"{}")
    assert cached_hub_path(HubSource("org/name")) is None
    assert fetch(configuration) == hub.snapshot
    assert hub.calls == [["config.json", "model.safetensors", "tokenizer.json"]]
    assert fetch(configuration) == hub.snapshot == cached_hub_path(HubSource("org/name"))
    assert len(hub.calls) == 1


def test_a_checkpoint_with_missing_shards_is_not_cached(hub, configuration):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": index, shards[0]: b"", shards[1]: b""}
    hub.put("config.json", "model.safetensors.index.json", shards[0])
    assert cached_hub_path(HubSource("org/name")) is None
    with pytest.raises(DownloadError, match=r"org/name is not in .* and OSTINATO_OFFLINE is set"):
        fetch(Settings(configuration.cache_dir, offline=True))
    assert fetch(configuration) == hub.snapshot
    assert fetch(Settings(configuration.cache_dir, offline=True)) == hub.snapshot


@pytest.mark.parametrize(
    ("file", "files"),
    [
        ("Q4_K", ["M-Q4_K.gguf"]),
        ("q4_k_m", ["M-Q4_K_M.gguf"]),
        ("Q8_0", ["M-Q8_0-00001-of-00002.gguf", "M-Q8_0-00002-of-00002.gguf"]),
        ("M-Q4_K_M.gguf", ["M-Q4_K_M.gguf"]),
        ("M-Q8_0-00002-of-00002.gguf", ["M-Q8_0-00001-of-00002.gguf", "M-Q8_0-00002-of-00002.gguf"]),
    ],
)
def test_a_gguf_model_is_chosen_by_its_name_or_type(hub, configuration, file, files):
    hub.files = dict.fromkeys(QUANTS, b"GGUF")
    source = HubSource("org/name", file)
    assert cached_hub_path(source) is None
    assert fetch(configuration, file) == hub.snapshot / files[0]
    assert hub.calls == [files]
    assert cached_hub_path(source) == hub.snapshot / files[0]
    (hub.snapshot / files[-1]).unlink()
    assert cached_hub_path(source) is None


@pytest.mark.parametrize(
    ("files", "file", "message"),
    [
        (QUANTS, None, r"has several GGUF models; choose as org/name:FILE from M-Q4_K\.gguf, M-Q4_K_M\.gguf, M-Q8_0"),
        (QUANTS, "Q5_K", "has no single GGUF model 'Q5_K'; choose"),
        (["README.md", "mmproj-F16.gguf"], "F16", "has neither model.safetensors .* nor a GGUF file"),
        (["config.json", "pytorch_model.bin"], None, "has neither model.safetensors"),
    ],
)
def test_repositories_without_a_clear_choice(hub, configuration, files, file, message):
    hub.files = dict.fromkeys(files, b"")
    with pytest.raises(DownloadError, match=message):
        fetch(configuration, file)
    assert hub.calls == []


def test_the_only_gguf_model_needs_no_choice(hub, configuration):
    hub.files = dict.fromkeys(["M-Q8_0.gguf", "mmproj-M.gguf"], b"GGUF")
    assert fetch(configuration) == hub.snapshot / "M-Q8_0.gguf"
    assert cached_hub_path(HubSource("org/name")) == hub.snapshot / "M-Q8_0.gguf"


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api/models/org/name"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated\nrepo", response=response(403)), "accept its licence: do so at https://.*/org/name"),
        (RepositoryNotFoundError("not\nfound", response=response(404)), "org/name is not on the hub, or is private"),
        (httpx.ConnectError("no route\nto host"), r"\(ConnectError: no route\).* try again, it resumes"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), r"\(RuntimeError\)"),
    ],
)
def test_errors_are_one_line(hub, configuration, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(configuration)
    assert "\n" not in str(caught.value)


def test_progress_is_the_growth_of_the_cache(hub, configuration, monkeypatch):
    events = []

    class Recorded(SilentProgress):
        def start(self, label, total_bytes):
            events.append((label, total_bytes))

        def stop(self):
            events.append("stop")

    hub.files = dict.fromkeys(CHECKPOINT, b"{}")
    fetch_hub_model(HubSource("org/name"), configuration, Recorded())
    assert events == [("org/name", 6), "stop"]
