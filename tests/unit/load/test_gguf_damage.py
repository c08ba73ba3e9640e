"""Whatever the bytes of a file are, opening it is a GGUFError of one line or a file that can be read."""

import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ostinato.errors import GGUFError
from ostinato.load.gguf import GGUFFile
from ostinato.load.gguf_header import parse_header
from ostinato.load.gguf_writer import EncodedTensor, write_gguf, write_split_gguf
from ostinato.quant.gguf import GGUF_TYPES
from tests.unit.load.files import METADATA, tiny_tensors, write_tiny


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(*parts: bytes, tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(parts)


def tensor(name: bytes, dims: tuple[int, ...], type_id: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def open_bytes(tmp_path, content: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


DAMAGED = {
    "empty": (b"", "is not a GGUF file: it is empty"),
    "short": (b"GG", "is not a GGUF file"),
    "other": (b"PK\x03\x04" + bytes(40), "is not a GGUF file: it begins with"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian GGUF"),
    "version 1": (header(version=1), "has GGUF version 1"),
    "version 4": (header(version=4), "has GGUF version 4"),
    "only magic": (b"GGUF", "is truncated"),
    "many pairs": (header(pairs=2**63), "is truncated"),
    "many tensors": (header(tensors=2**63), "is truncated"),
    "value type": (header(string(b"k") + struct.pack("<I", 99), pairs=1), "metadata 'k' has value type 99"),
    "array type": (header(string(b"k") + struct.pack("<IIQ", 9, 99, 1) + bytes(32), pairs=1), "has value type 99"),
    "deep array": (header(string(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6, pairs=1), "value type 9"),
    "long array": (header(string(b"k") + struct.pack("<IIQ", 9, 8, 2**61), pairs=1), "ends? inside metadata 'k'"),
    "long numbers": (header(string(b"k") + struct.pack("<IIQ", 9, 6, 2**61), pairs=1), "ends? inside metadata 'k'"),
    "long string": (header(string(b"k") + struct.pack("<IQ", 8, 2**63), pairs=1), "ends? inside metadata 'k'"),
    "utf-8": (header(string(b"k") + struct.pack("<I", 8) + string(b"\xff\xfe"), pairs=1), "not UTF-8"),
    "empty key": (header(string(b"") + struct.pack("<IB", 0, 1), pairs=1), "name of 0 characters"),
    "same key": (header(*[string(b"k") + struct.pack("<IB", 0, 1)] * 2, pairs=2), "metadata key 'k' twice"),
    "alignment": (header(string(b"general.alignment") + struct.pack("<II", 4, 48), pairs=1), "no power of two"),
    "IQ type": (header(tensor(b"w", (256, 2), 23, 0), bytes(500), tensors=1), r"tensor 'w' has type IQ4_XS \(id 23\)"),
    "new type": (header(tensor(b"w", (256, 2), 1234, 0), bytes(500), tensors=1), r"'w' has type unknown \(id 1234\)"),
    "no dims": (header(tensor(b"w", (), 0, 0), bytes(64), tensors=1), "has 0 dimensions"),
    "five dims": (header(tensor(b"w", (1,) * 5, 0, 0), bytes(64), tensors=1), "has 5 dimensions"),
    "empty tensor": (header(tensor(b"w", (4, 0), 0, 0), bytes(64), tensors=1), "is empty"),
    "odd row": (header(tensor(b"w", (33, 2), 8, 0), bytes(200), tensors=1), "rows of 33 elements; Q8_0 takes"),
    "huge": (header(tensor(b"w", (2**62, 2**62), 0, 0), bytes(64), tensors=1), "is truncated"),
    "far": (header(tensor(b"w", (4,), 0, 2**40), bytes(64), tensors=1), "is truncated"),
    "unaligned": (header(tensor(b"w", (4,), 0, 8), bytes(64), tensors=1), "not aligned to 32 bytes"),
    "overlap": (
        header(tensor(b"a", (16,), 0, 0), tensor(b"b", (4,), 0, 32), bytes(256), tensors=2),
        "tensors 'a' and 'b' overlap",
    ),
    "same tensor": (
        header(tensor(b"a", (4,), 0, 0), tensor(b"a", (4,), 0, 32), bytes(256), tensors=2),
        "tensor 'a' twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_in_one_line(tmp_path, case):
    content, message = DAMAGED[case]
    with pytest.raises(GGUFError, match=message) as caught:
        open_bytes(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert "model.gguf" in str(caught.value)


def test_version_2_is_read(tmp_path):
    content = header(string(b"k") + struct.pack("<IB", 0, 7), pairs=1, version=2)
    assert open_bytes(tmp_path, content).metadata == {"k": 7}


def test_every_truncation_is_an_error(tmp_path):
    """Cut at every byte of the header, and at and beside every border of the data."""
    whole = write_tiny(tmp_path / "tiny.gguf").read_bytes()
    parsed = parse_header(whole, "x")
    borders = {t.start + d for t in parsed.tensors.values() for d in (-1, 0, 1)}
    borders |= {t.start + t.num_bytes - 1 for t in parsed.tensors.values()}
    first = min(t.start for t in parsed.tensors.values())
    last = max(t.start + t.num_bytes for t in parsed.tensors.values())
    for cut in sorted(set(range(first)) | {b for b in borders if b < last}):
        with pytest.raises(GGUFError) as caught:
            parse_header(whole[:cut], "x")
        assert "truncated" in str(caught.value) or cut < 4
    parse_header(whole[:last], "x")  # padding after the last tensor is not missed


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(GGUFError, match=r"cannot read .*nothing\.gguf: No such file"):
        GGUFFile(tmp_path / "nothing.gguf")
    with pytest.raises(GGUFError, match="Is a directory"):
        GGUFFile(tmp_path)


def test_missing_files_of_a_split_model_are_named(tmp_path):
    paths = write_split_gguf(tmp_path, "tiny", METADATA, tiny_tensors(), per_file=2)
    paths[1].unlink()
    with pytest.raises(GGUFError, match=r"lacks tiny-00002-of-00003\.gguf: all 3 files"):
        GGUFFile(paths[0])
    paths[0].unlink()
    with pytest.raises(GGUFError, match=r"lacks tiny-00001-of-00003\.gguf, tiny-00002-of-00003\.gguf"):
        GGUFFile(paths[2])


def test_exchanged_or_renamed_parts_are_found_out(tmp_path):
    paths = write_split_gguf(tmp_path, "tiny", METADATA, tiny_tensors(), per_file=2)
    lone = tmp_path / "model.gguf"
    lone.write_bytes(paths[0].read_bytes())
    with pytest.raises(GGUFError, match=r"holds part 0 .* of a model in 3 files"):
        GGUFFile(lone)
    second, third = paths[1].read_bytes(), paths[2].read_bytes()
    paths[1].write_bytes(third)
    paths[2].write_bytes(second)
    with pytest.raises(GGUFError, match="holds part 2"):
        GGUFFile(paths[0])
    wrong = tmp_path / "tiny-00004-of-00003.gguf"
    with pytest.raises(GGUFError, match="file 4 of 3"):
        GGUFFile(wrong)


def test_a_tensor_in_two_parts_is_an_error(tmp_path):
    paths = write_split_gguf(tmp_path, "tiny", {}, {"a": torch.ones(4), "b": torch.ones(4)}, per_file=1)
    content = paths[1].read_bytes().replace(string(b"b"), string(b"a"))
    paths[1].write_bytes(content)
    with pytest.raises(GGUFError, match="tensor 'a', which an earlier file"):
        GGUFFile(paths[0])


def test_a_wrong_total_is_an_error(tmp_path):
    paths = write_split_gguf(tmp_path, "tiny", {}, {"a": torch.ones(4), "b": torch.ones(4)}, per_file=1)
    key = string(b"split.tensors.count") + struct.pack("<I", 5)
    paths[0].write_bytes(paths[0].read_bytes().replace(key + struct.pack("<i", 2), key + struct.pack("<i", 9)))
    with pytest.raises(GGUFError, match="speaks of 9 tensors in all files, but they have 2"):
        GGUFFile(paths[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "small.gguf"
    metadata = {"a": 1, "b": ["x", "yz"], "c": [[1, 2], [3]], "d": 0.5, "e": True, "f": "text", "general.alignment": 32}
    tensors = {
        "q": EncodedTensor(GGUF_TYPES["Q4_0"], (2, 32), torch.zeros(36, dtype=torch.uint8)),
        "d": torch.ones(3, 2),
    }
    write_gguf(path, metadata, tensors)
    return path.read_bytes()


MUTATION = st.tuples(st.integers(0, 1 << 16), st.integers(0, 255))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(MUTATION, min_size=1, max_size=6), cut=st.none() | st.integers(0, 1 << 16))
def test_any_mutation_is_an_error_or_a_valid_file(tmp_path, small, mutations, cut):
    """No struct.error, MemoryError, UnicodeError, RecursionError … gets out, and what opens can be read."""
    content = bytearray(small)
    for position, value in mutations:
        content[position % len(content)] = value
    if cut is not None:
        del content[cut % len(content) :]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    message = ""
    try:
        file = GGUFFile(path)
        for name in file.tensors:
            file.read(name)
    except GGUFError as error:
        message = str(error)
    assert "\n" not in message


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_header_after_the_magic(content):
    message = ""
    try:
        parse_header(b"GGUF\x03\x00\x00\x00" + content, "x")
    except GGUFError as error:
        message = str(error)
    assert "\n" not in message
