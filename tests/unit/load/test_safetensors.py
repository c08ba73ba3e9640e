"""Hugging Face directories: what the safetensors package writes is read, and what is missing or damaged is named."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ostinato.errors import CheckpointError
from ostinato.load.safetensors import HFCheckpoint

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {f"t.{i}": torch.randn(3, 5 + i, generator=generator).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def write(directory, tensors, shards=1):
    """A checkpoint as transformers saves it."""
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_every_dtype_is_read_exactly(tmp_path, tensors, shards):
    checkpoint = HFCheckpoint(write(tmp_path, tensors, shards))
    assert checkpoint.config == {"model_type": "llama"}
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.num_bytes == tensor.numel() * tensor.element_size()
        assert same(checkpoint.read(name), tensor)


def test_floats_are_converted_and_integers_are_not(tmp_path, tensors):
    checkpoint = HFCheckpoint(write(tmp_path, tensors))
    assert same(checkpoint.read("t.1", dtype=torch.bfloat16), tensors["t.1"].bfloat16())
    assert same(checkpoint.read("t.6", dtype=torch.bfloat16), tensors["t.6"])


def test_what_is_read_shares_nothing_with_the_file(tmp_path, tensors):
    path = write(tmp_path, tensors) / "model.safetensors"
    before = path.read_bytes()
    HFCheckpoint(tmp_path).read("t.1").zero_()
    assert path.read_bytes() == before


def test_one_file_of_another_name_will_do(tmp_path):
    write(tmp_path, {"x": torch.ones(2)})
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert HFCheckpoint(tmp_path).names() == ["x"]
    (tmp_path / "more.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        HFCheckpoint(tmp_path)


def test_missing_shards_are_named(tmp_path, tensors):
    write(tmp_path, tensors, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors \(1 of 3 files"):
        HFCheckpoint(tmp_path)


def test_tensors_that_the_index_promises_are_there(tmp_path, tensors):
    write(tmp_path, tensors, 2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors lacks tensor 'ghost' \(1 in all\)"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside of its directory"),
    ],
)
def test_a_damaged_index(tmp_path, index, message):
    write(tmp_path, {"x": torch.ones(2)})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(tmp_path)


def test_directories_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks config\.json"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="its weights are missing"):
        HFCheckpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"as pickles \(pytorch_model\.bin\)"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        HFCheckpoint(tmp_path)


def test_every_truncation_is_an_error(tmp_path):
    path = write(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(5)}) / "model.safetensors"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            HFCheckpoint(tmp_path)


def test_unknown_tensors_are_an_error(tmp_path):
    checkpoint = HFCheckpoint(write(tmp_path, {"a": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="has no tensor 'nothing'"):
        checkpoint.read("nothing")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, r"tensor 'a' has type F4, which cannot be read"),
        ({"dtype": "F32", "shape": [2]}, "is damaged"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "is damaged"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "is damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "is damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "is damaged"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "has 8 bytes, not those of"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "truncated"),
        ([], "is damaged"),
    ],
)
def test_damaged_entries(tmp_path, entry, message):
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff\xff"])
def test_damaged_headers(tmp_path, header):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        HFCheckpoint(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=5))
def test_any_mutation_is_an_error_or_a_valid_file(tmp_path, mutations):
    """No JSON, Unicode, struct or index error gets out, and what opens can be read."""
    path = tmp_path / "model.safetensors"
    if not (tmp_path / "original").exists():
        write(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)})
        path.rename(tmp_path / "original")
    content = bytearray((tmp_path / "original").read_bytes())
    for position, value in mutations:
        content[position % len(content)] = value
    path.write_bytes(content)
    message = ""
    try:
        checkpoint = HFCheckpoint(tmp_path)
        for name in checkpoint.names():
            checkpoint.read(name)
    except CheckpointError as error:
        message = str(error)
    finally:
        path.unlink()
    assert "\n" not in message
