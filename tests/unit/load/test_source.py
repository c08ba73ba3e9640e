"""The weight reader forgets no tensor, whatever the format of the checkpoint."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ostinato.errors import CheckpointError
from ostinato.load.gguf import GGUFFile
from ostinato.load.gguf_writer import write_gguf
from ostinato.load.safetensors import HFCheckpoint
from ostinato.load.source import WeightReader

TENSORS = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4), "rotary.inv_freq": torch.ones(2)}


@pytest.fixture(params=["gguf", "safetensors"])
def source(request, tmp_path):
    if request.param == "gguf":
        write_gguf(tmp_path / "x.gguf", {}, TENSORS)
        return GGUFFile(tmp_path / "x.gguf")
    (tmp_path / "config.json").write_text(json.dumps({}))
    save_file(TENSORS, tmp_path / "model.safetensors")
    return HFCheckpoint(tmp_path)


def test_a_model_that_reads_everything(source):
    reader = WeightReader(source)
    assert "a.weight" in reader
    assert "c.weight" not in reader
    assert torch.equal(reader.read("a.weight", (2, 3)), TENSORS["a.weight"])
    assert torch.equal(reader.read("b.weight"), TENSORS["b.weight"])
    assert reader.info("b.weight").shape == (4,)
    reader.ignore(r".*\.inv_freq")
    reader.finish(required=["a.weight", "b.weight"])


def test_leftover_tensors_are_listed(source):
    reader = WeightReader(source)
    reader.read("a.weight")
    reader.info("b.weight")  # knowing of a tensor is not using it
    with pytest.raises(CheckpointError) as caught:
        reader.finish()
    assert "has 2 tensors (" in str(caught.value)
    assert all(name in str(caught.value) for name in ("b.weight", "rotary.inv_freq"))


def test_patterns_match_whole_names(source):
    reader = WeightReader(source)
    reader.ignore("inv_freq", "weight", "a")
    with pytest.raises(CheckpointError, match="has 3 tensors"):
        reader.finish()


def test_missing_tensors_are_listed(source):
    reader = WeightReader(source)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors \(c, d\): it is incomplete, or another model"):
        reader.require(["a.weight", "c", "d"])
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(c\)"):
        reader.read("c")
    reader.ignore(".*")
    with pytest.raises(CheckpointError, match=r"lacks 12 tensors \(n0, n1, .*n7 and 4 more\)"):
        reader.finish(required=[f"n{i}" for i in range(12)])


def test_another_shape_is_an_error(source):
    with pytest.raises(CheckpointError, match=r"a\.weight has shape \[2, 3\], .* asks for \[3, 2\]"):
        WeightReader(source).read("a.weight", (3, 2))
