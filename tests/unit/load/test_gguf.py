"""The reader and the writer of GGUF files, against each other and against the gguf package."""

import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
import torch

from ostinato.errors import GGUFError
from ostinato.load.gguf import GGUFFile
from ostinato.load.gguf_writer import Typed, write_gguf, write_split_gguf
from ostinato.quant.blocks import BlockWeight, dequantize
from ostinato.quant.gguf import GGUF_TYPES
from tests.unit.load.files import METADATA, random_block_tensor, tiny_tensors, write_tiny


def plain(value):
    return value.value if isinstance(value, Typed) else value


def values_of(weight):
    return dequantize(weight) if isinstance(weight, BlockWeight) else weight.float()


def test_what_is_written_is_read(tmp_path):
    file = GGUFFile(write_tiny(tmp_path / "tiny.gguf"))
    assert file.metadata == {key: plain(value) for key, value in METADATA.items()}
    assert list(file.tensors) == list(tiny_tensors())
    info = file.tensors["blk.0.attn_q.weight"]
    assert (info.shape, info.type_name, info.num_bytes, info.num_elements) == ((7, 64), "Q4_1", 7 * 40, 448)
    for name, tensor in tiny_tensors().items():
        if isinstance(tensor, torch.Tensor):
            got = file.read(name)
            assert isinstance(got, torch.Tensor)
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor)
        else:
            assert isinstance(file.read(name), BlockWeight)
            assert torch.equal(file.raw(name).flatten(), tensor.raw.flatten())


def test_the_gguf_package_reads_what_is_written(tmp_path):
    path = tmp_path / "all.gguf"
    tensors = {f"t.{name}": random_block_tensor(name, (3, 512)) for name in GGUF_TYPES}
    write_gguf(path, METADATA, tensors)
    theirs = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        assert theirs.fields[key].contents() == plain(value)
    assert theirs.fields["tokenizer.ggml.token_type"].types[-1] == gguf.GGUFValueType.INT32
    ours = GGUFFile(path)
    for tensor in theirs.tensors:
        with np.errstate(invalid="ignore", over="ignore"):
            want = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        np.testing.assert_array_equal(values_of(ours.read(tensor.name)).numpy(), want)


def test_it_reads_what_the_gguf_package_writes(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    scalars = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "float32": 0.5,
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float64": 0.1,
        "bool": True,
    }
    for name, value in scalars.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    writer.add_string("x.string", "naïve 🙂")
    writer.add_array("x.strings", ["", "a", "\n"])
    writer.add_array("x.integers", [1, -2, 3])
    writer.add_array("x.floats", [0.5, -2.0])
    writer.add_array("x.flags", [True, False])
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    writer.add_tensor("dense", x)
    quantized = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("experts", quantized, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(path)
    for name, value in scalars.items():
        assert file.metadata[f"x.{name}"] == value
        assert type(file.metadata[f"x.{name}"]) is type(value)
    assert file.metadata["x.string"] == "naïve 🙂"
    assert file.metadata["x.strings"] == ["", "a", "\n"]
    assert file.metadata["x.integers"] == [1, -2, 3]
    assert file.metadata["x.floats"] == [0.5, -2.0]
    assert file.metadata["x.flags"] == [True, False]
    assert torch.equal(file.read("dense"), torch.from_numpy(x))
    assert file.tensors["experts"].shape == (2, 3, 32)
    experts = file.read("experts")
    assert isinstance(experts, BlockWeight)
    assert experts.shape == (6, 32)  # rows of all experts under each other
    want = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q5_1).reshape(6, 32)
    np.testing.assert_array_equal(dequantize(experts).numpy(), want)


@pytest.mark.parametrize("name", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_every_integer_type_is_written(tmp_path, name):
    low = 0 if name.startswith("u") else -7
    write_gguf(tmp_path / "x.gguf", {"one": Typed(name, low), "many": Typed(name, [low, 100])}, {})
    field = gguf.GGUFReader(tmp_path / "x.gguf").fields["many"]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[name.upper()]]
    assert GGUFFile(tmp_path / "x.gguf").metadata == {"one": low, "many": [low, 100]}


def test_values_find_their_type(tmp_path):
    metadata = {"a": 2**40, "b": -(2**40), "c": 1.5, "d": [1, 2.5], "e": [], "f": [[1, 2], [3]], "g": [["x"], []]}
    write_gguf(tmp_path / "x.gguf", metadata, {})
    assert GGUFFile(tmp_path / "x.gguf").metadata == metadata


@pytest.mark.parametrize("value", [{"a": 1}, [1, "a"], None, [True, 1.5]])
def test_values_without_a_type_are_refused(tmp_path, value):
    with pytest.raises(GGUFError, match="cannot write metadata 'key'"):
        write_gguf(tmp_path / "x.gguf", {"key": value}, {})


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(GGUFError, match=r"cannot write tensor 'x': GGUF has no type for torch\.int64"):
        write_gguf(tmp_path / "x.gguf", {}, {"x": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(GGUFError, match="cannot write metadata 'key'"):
        write_gguf(tmp_path / "x.gguf", {"key": Typed("uint8", 256)}, {})
    assert list(tmp_path.iterdir()) == []


def test_alignment_is_kept(tmp_path):
    path = tmp_path / "x.gguf"
    tensors = {"a": torch.arange(3.0), "b": torch.arange(5.0)}
    write_gguf(path, {}, tensors, alignment=256)
    file = GGUFFile(path)
    assert all(tensor.start % 256 == 0 for tensor in file.tensors.values())
    assert torch.equal(file.read("b"), tensors["b"])


def test_required_metadata(tmp_path):
    file = GGUFFile(write_tiny(tmp_path / "tiny.gguf"))
    assert file.require("llama.block_count", int) == 2
    assert file.require("llama.block_count", float) == 2.0
    assert file.require("general.name", str) == "Tiny"
    assert file.require("tokenizer.ggml.add_bos_token", bool) is False
    with pytest.raises(GGUFError, match=r"tiny\.gguf lacks the metadata key 'llama\.nothing'"):
        file.require("llama.nothing", int)
    with pytest.raises(GGUFError, match=r"'general\.name' is str, not int"):
        file.require("general.name", int)
    with pytest.raises(GGUFError, match="is bool, not int"):
        file.require("tokenizer.ggml.add_bos_token", int)


def test_tensors_outlive_the_file_and_share_nothing(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf")
    before = path.read_bytes()
    file = GGUFFile(path)
    norm, raw = file.read("output_norm.weight"), file.raw("output_norm.weight")
    del file
    want = raw.clone()
    norm.zero_()
    assert torch.equal(raw, want)
    assert path.read_bytes() == before


def test_an_unknown_name_is_an_error(tmp_path):
    with pytest.raises(GGUFError, match="has no tensor 'nothing'"):
        GGUFFile(write_tiny(tmp_path / "tiny.gguf")).read("nothing")


@pytest.mark.parametrize("opened", [1, 2, 3])
def test_split_files_are_one_model(tmp_path, opened):
    paths = write_split_gguf(tmp_path, "tiny", METADATA, tiny_tensors(), per_file=2)
    assert [path.name for path in paths] == [f"tiny-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    file = GGUFFile(paths[opened - 1])
    assert file.paths == paths
    assert file.metadata["general.name"] == "Tiny"
    assert list(file.tensors) == list(tiny_tensors())
    for name, tensor in tiny_tensors().items():
        want = tensor if isinstance(tensor, torch.Tensor) else tensor.raw
        assert torch.equal(file.raw(name).flatten(), want.contiguous().view(torch.uint8).flatten())


def test_a_big_vocabulary_is_read_quickly(tmp_path):
    """250,000 strings in well under a second: the bound is several times what a busy small machine needs."""
    tokens = [f"token-{i}" for i in range(250_000)]
    write_gguf(tmp_path / "x.gguf", {"tokens": tokens, "scores": [0.5] * 250_000}, {})
    start = time.perf_counter()
    file = GGUFFile(tmp_path / "x.gguf")
    elapsed_s = time.perf_counter() - start
    assert file.metadata["tokens"] == tokens
    assert elapsed_s < 1.5


PEAK_MEMORY = """
import resource, sys, torch
from ostinato.load.gguf import GGUFFile
unit = 1 if sys.platform == "darwin" else 1024
file = GGUFFile(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in file.tensors:
    file.read(name)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


def test_memory_stays_within_a_tensor(tmp_path):
    """Tensors of 16 MiB are read one after the other: the peak is one of them, its pages in the file, a constant.

    Only Linux gives pages of a mapping back on request; elsewhere all of the file may be resident.
    """
    path = tmp_path / "x.gguf"
    ones = random_block_tensor("Q8_0", (64, 32 * 7710))
    write_gguf(path, {}, {f"t{i}": ones for i in range(10)})
    largest = ones.raw.numel()
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY, str(path)], capture_output=True, text=True, check=True)
    files_pages = largest if sys.platform == "linux" else 10 * largest
    # The last tensor lives until the next one is read.
    assert int(done.stdout) < 2 * largest + files_pages + (8 << 20)
