"""``pack`` followed by ``dequantize`` is the file's own meaning, bit for bit, for any bytes."""

import gguf
import numpy as np
import pytest
import torch

from ostinato.errors import KernelError
from ostinato.quant.blocks import KINDS, BlockWeight, dequantize, join_rows, quants
from ostinato.quant.gguf import _CHUNK_BYTES_CPU, _CHUNK_BYTES_SMALL, GGUF_TYPES, TYPES_BY_ID, UNSUPPORTED_TYPES, pack

BLOCK_TYPES = [name for name, kind in GGUF_TYPES.items() if kind.dtype is None]
DENSE_TYPES = [name for name, kind in GGUF_TYPES.items() if kind.dtype is not None]


def random_rows(name: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Any bytes at all: scales become denormal, negative, infinite and NaN."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, GGUF_TYPES[name].row_bytes(k)), dtype=torch.uint8, generator=generator)


def expected(raw: torch.Tensor, name: str) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name]).astype(np.float32)


def assert_same_bits(got: torch.Tensor, want: np.ndarray) -> None:
    """Equal to the bit, signs of zeros included; a NaN equals any NaN."""
    values = got.numpy()
    assert values.shape == want.shape
    same = (values.view(np.int32) == want.view(np.int32)) | (np.isnan(values) & np.isnan(want))
    assert same.all(), f"{(~same).sum()} of {same.size} values differ"


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_constants_are_those_of_the_gguf_package(name):
    kind = GGUF_TYPES[name]
    theirs = gguf.GGMLQuantizationType[name]
    assert kind.type_id == theirs
    assert (kind.block, kind.num_bytes) == gguf.GGML_QUANT_SIZES[theirs]


def test_every_type_is_known_by_name():
    for theirs in gguf.GGMLQuantizationType:
        ours = TYPES_BY_ID.get(int(theirs))
        assert (ours.name if ours else UNSUPPORTED_TYPES.get(int(theirs))) == theirs.name


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (7, 3), (13, 9)])
def test_block_types_mean_what_the_file_means(name, n, blocks):
    k = GGUF_TYPES[name].block * blocks
    raw = random_rows(name, n, k, seed=n)
    before = raw.clone()
    weight = pack(raw, GGUF_TYPES[name], k)
    assert isinstance(weight, BlockWeight)
    assert weight.shape == (n, k)
    assert_same_bits(dequantize(weight), expected(raw, name))
    assert torch.equal(raw, before)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("chunk_bytes", [_CHUNK_BYTES_SMALL, _CHUNK_BYTES_CPU])
def test_chunks_meet_without_a_seam(name, chunk_bytes):
    """More bytes than are packed at a time, with a border inside a row."""
    k = GGUF_TYPES[name].block * 33
    n = chunk_bytes * 5 // 4 // GGUF_TYPES[name].row_bytes(k) + 3
    raw = random_rows(name, n, k)
    assert_same_bits(dequantize(pack(raw, GGUF_TYPES[name], k)), expected(raw, name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_planes_are_as_documented(name):
    k = 512
    weight = pack(random_rows(name, 3, k), GGUF_TYPES[name], k)
    kind = KINDS[name]
    words = k // 4 if kind.bits == 8 else k // 8
    want = {"words": ((3, words), torch.int32), "d": ((3, k // kind.super_group), torch.float16)}
    if kind.bits in (5, 6):
        want["high"] = ((3, k // 32 if kind.bits == 5 else k // 16), torch.int32)
    if kind.min_sign:
        want["m"] = ((3, k // kind.super_group), torch.float16)
    if kind.has_sub:
        want["sub_d"] = ((3, k // kind.group), torch.int8)
    if kind.has_sub and kind.min_sign:
        want["sub_m"] = ((3, k // kind.group), torch.int8)
    assert {key: (tuple(p.shape), p.dtype) for key, p in weight.planes().items()} == want
    assert all(plane.is_contiguous() for plane in weight.planes().values())
    low = {"Q8_0": -128}.get(name, 0)
    q = quants(weight).int()
    assert low <= q.min()
    assert q.max() < (1 << kind.bits) + low


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_are_independent(name):
    """Chosen and joined rows are the rows."""
    k = 256
    raw = random_rows(name, 9, k)
    weight = pack(raw, GGUF_TYPES[name], k)
    order = torch.tensor([8, 0, 3, 3])
    want = expected(raw[order], name)
    assert_same_bits(dequantize(weight.select_rows(order)), want)
    joined = join_rows([weight.slice_rows(2, 5), pack(raw[7:8], GGUF_TYPES[name], k)])
    assert_same_bits(dequantize(joined), expected(torch.cat([raw[2:5], raw[7:8]]), name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_odd_views_are_packed_too(name):
    """Bytes that begin anywhere in a buffer, and columns of a wider one."""
    k = 256
    raw = random_rows(name, 4, k)
    buffer = torch.empty(raw.numel() + 3, dtype=torch.uint8)
    buffer[3:] = raw.flatten()
    wide = torch.cat([raw, raw], dim=1)
    for view in (buffer[3:].view(4, -1), wide[:, : raw.shape[1]]):
        assert_same_bits(dequantize(pack(view, GGUF_TYPES[name], k)), expected(raw, name))


@pytest.mark.parametrize("name", DENSE_TYPES)
def test_dense_types_keep_their_bits_and_share_nothing(name):
    raw = random_rows(name, 3, 20)
    values = pack(raw, GGUF_TYPES[name], 20)
    assert isinstance(values, torch.Tensor)
    assert values.dtype == GGUF_TYPES[name].dtype
    assert torch.equal(values.view(torch.uint8), raw)
    raw.zero_()
    assert values.view(torch.uint8).any()


@pytest.mark.parametrize(
    ("raw", "k"),
    [
        (torch.zeros(2, 18, dtype=torch.uint8), 33),
        (torch.zeros(2, 17, dtype=torch.uint8), 32),
        (torch.zeros(36, dtype=torch.uint8), 32),
        (torch.zeros(2, 18, dtype=torch.int8), 32),
    ],
)
def test_what_does_not_fit_is_refused(raw, k):
    with pytest.raises(KernelError, match="Q4_0 rows of"):
        pack(raw, GGUF_TYPES["Q4_0"], k)
