"""What inspect and models tell."""

import json
import re

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from ostinato.config import Settings
from ostinato.load.describe import TypeTotal, describe, known_models
from ostinato.load.gguf import GGUFFile
from ostinato.load.known import DEFAULT_MODEL, KNOWN_MODELS, HubSource, WheelSource
from ostinato.load.safetensors import HFCheckpoint
from tests.unit.load.files import write_tiny


def test_a_gguf_model(tmp_path):
    told = describe(GGUFFile(write_tiny(tmp_path / "tiny.gguf")))
    assert (told.file_format, told.architecture, told.title) == ("GGUF v3", "llama", "Tiny")
    assert (told.num_layers, told.context_length) == (2, 64)
    assert told.num_parameters == 5 * 64 + 64 + 2 * (7 * 64 + 3 * 64)
    assert told.types == (
        TypeTotal("BF16", 2, 2 * 3 * 64, 2 * 3 * 64 * 2),
        TypeTotal("Q4_1", 2, 2 * 7 * 64, 2 * 7 * 2 * 20),
        TypeTotal("Q8_0", 1, 5 * 64, 5 * 2 * 34),
        TypeTotal("F32", 1, 64, 256),
    )
    assert told.num_bytes == sum(total.num_bytes for total in told.types)
    assert [layer.index for layer in told.layers] == [None, 0, 1]
    assert [layer.num_tensors for layer in told.layers] == [2, 2, 2]
    assert told.layers[1].num_bytes == 7 * 2 * 20 + 3 * 64 * 2


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint(tmp_path, nested):
    inner = {"num_hidden_layers": 3, "max_position_embeddings": 128}
    config = {"model_type": "llama"} | ({"text_config": inner} if nested else inner)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.layers.0.mlp.up.weight": torch.ones(2, 3), "model.norm.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    told = describe(HFCheckpoint(tmp_path))
    assert (told.file_format, told.architecture, told.num_layers) == ("safetensors", "llama", 3)
    assert (told.context_length, told.num_parameters, told.num_bytes) == (128, 9, 36)
    assert [layer.index for layer in told.layers] == [None, 0]


def test_layers_of_other_towers_are_no_layers_of_the_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": {}}))
    names = ("model.language_model.layers.1.mlp.up.weight", "model.visual.layers.1.w", "mtp.layers.0.mlp.up.weight")
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    told = describe(HFCheckpoint(tmp_path))
    assert [(layer.index, layer.num_tensors) for layer in told.layers] == [(None, 2), (1, 1)]


def test_known_models_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    configuration = Settings(tmp_path)
    assert all(status.path is None for status in known_models(configuration))
    source = KNOWN_MODELS[DEFAULT_MODEL].source
    assert isinstance(source, WheelSource)
    configuration.models_dir.mkdir()
    with (configuration.models_dir / source.file_name).open("wb") as file:
        file.truncate(source.file_bytes)
    first = known_models(configuration)[0]
    assert first.model.name == DEFAULT_MODEL
    assert first.path == configuration.models_dir / source.file_name
    assert first.num_bytes == source.file_bytes


def test_the_registry_is_consistent():
    for name, model in KNOWN_MODELS.items():
        assert name == model.name == name.lower()
        assert model.licence
        assert model.description
        if isinstance(model.source, WheelSource):
            assert re.fullmatch(r"[0-9a-f]{64}", model.source.wheel_sha256)
            assert re.fullmatch(r"[0-9a-f]{64}", model.source.file_sha256)
        else:
            assert model.source.repo.count("/") == 1
    assert isinstance(KNOWN_MODELS[DEFAULT_MODEL].source, WheelSource)
    assert HubSource("a/b", "Q8_0").reference == "a/b:Q8_0"
