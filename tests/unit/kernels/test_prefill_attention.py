"""Prefill attention: the reference against decode attention row by row, the kernel against the reference."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.decode_attention.ref import decode_attention_ref
from ostinato.kernels.prefill_attention import prefill_attention
from ostinato.kernels.prefill_attention.ref import prefill_attention_ref
from ostinato.kernels.prefill_attention.triton import choose_blocks
from ostinato.kernels.prefill_attention.triton import prefill_attention as kernel

from .paged import cached


def chunk(device: torch.device, first: int, tokens: int, heads: int, kv_heads: int, dim: int, **cache: object) -> dict:
    """A chunk of ``tokens`` tokens from position ``first`` on, of one of two slots."""
    given = cached(device, [first + tokens - 1, 3], heads, kv_heads, dim, **cache)
    given["q"] = torch.randn(tokens, heads, dim).to(device, given["k_cache"].dtype)
    given["slots"] = given["slots"][:1].repeat(tokens)
    given["positions"] = torch.arange(first, first + tokens, dtype=torch.int32, device=device)
    return given


CHUNKS = [
    {"first": 0, "tokens": 1, "heads": 1, "kv_heads": 1, "dim": 16},
    {"first": 0, "tokens": 37, "heads": 3, "kv_heads": 1, "dim": 16},
    {"first": 13, "tokens": 20, "heads": 4, "kv_heads": 2, "dim": 64},
    {"first": 30, "tokens": 18, "heads": 6, "kv_heads": 2, "dim": 96},
    {"first": 16, "tokens": 16, "heads": 2, "kv_heads": 1, "dim": 128, "page_size": 16, "pages": 2},
    {"first": 7, "tokens": 25, "heads": 5, "kv_heads": 1, "dim": 12, "page_size": 5, "pages": 7},
    {"first": 47, "tokens": 1, "heads": 2, "kv_heads": 2, "dim": 256},
]
ATTENDED = [(0, 0.0), (1, 0.0), (7, 0.0), (19, 0.0), (100, 0.0), (16, 2.0)]


@pytest.mark.parametrize("attended", ATTENDED, ids=str)
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_reference_equals_decode_row_by_row(case: dict, attended: tuple, device: torch.device) -> None:
    given = chunk(device, **case)
    got = prefill_attention_ref(*given.values(), 0.3, *attended)
    torch.testing.assert_close(got, decode_attention_ref(*given.values(), 0.3, *attended), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attended", ATTENDED, ids=str)
@pytest.mark.parametrize("blocks", [(16, 8), (8, 16)], ids=str)
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_kernel_equals_reference(case: dict, blocks: tuple, attended: tuple, device: torch.device) -> None:
    if device.type == "cuda":
        blocks = (16, 16)  # what tl.dot takes at least
    given = chunk(device, **case)
    got = kernel(*given.values(), 0.3, *attended, blocks=(*blocks, 4, 1))
    expected = prefill_attention_ref(*given.values(), 0.3, *attended)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_as_good_as_its_rounding(device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter has no bfloat16 products
    given = chunk(device, 10, 30, 4, 2, 32, dtype=dtype)
    wide = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    got = kernel(*given.values(), 0.3, 0, 0.0, blocks=(16, 16, 4, 1))
    # Rounded results (2^-9), rounded probabilities (2^-9 of sums below 4).
    torch.testing.assert_close(got.float(), prefill_attention_ref(*wide.values(), 0.3, 0, 0.0), rtol=2**-8, atol=2**-7)


def test_every_size_has_blocks() -> None:
    for tokens in (1, 65, 2048):
        for dim in (16, 96, 256):
            for element_size in (2, 4):
                block_m, block_n, warps, stages = choose_blocks(tokens, dim, element_size)
                assert min(block_m, block_n) >= 16
                assert warps in (4, 8)
                assert stages >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(20, 4, 16)}, "takes contiguous floats q"),
        ({"q": torch.zeros(20, 3, 64)}, "3 heads"),
        ({"positions": torch.zeros(20)}, "positions int32"),
        ({"window": -1}, "window -1"),
    ],
)
def test_refuses_what_it_does_not_take(change: dict, message: str) -> None:
    given = chunk(torch.device("cpu"), **CHUNKS[2]) | {"scale": 1.0} | change
    with pytest.raises(KernelError, match=message):
        prefill_attention(**given)
