"""Decode attention: the reference against arithmetic in float64, the kernels against the reference."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.decode_attention import decode_attention, fused_decode_attention
from ostinato.kernels.decode_attention.ref import decode_attention_ref, fused_decode_attention_ref
from ostinato.kernels.decode_attention.triton import Tiling, choose_tiling
from ostinato.kernels.decode_attention.triton import decode_attention as kernel
from ostinato.kernels.decode_attention.triton import fused_decode_attention as fused_kernel

from .paged import cached, inputs


def exact(given: dict[str, torch.Tensor], scale: float, window: int, softcap: float) -> torch.Tensor:
    """The result in float64, position by position."""
    q, k, v = (given[name].double() for name in ("q", "k_cache", "v_cache"))
    out = torch.zeros_like(q)
    size, group = k.shape[2], q.shape[1] // k.shape[1]
    for b in range(len(q)):
        position = int(given["positions"][b])
        first = max(0, position - window + 1) if window else 0
        pages = given["page_table"][given["slots"][b]]
        keys = torch.stack([k[pages[n // size], :, n % size] for n in range(first, position + 1)], 1)
        values = torch.stack([v[pages[n // size], :, n % size] for n in range(first, position + 1)], 1)
        scores = torch.einsum("hd,hnd->hn", q[b], keys.repeat_interleave(group, 0)) * scale
        if softcap:
            scores = (scores / softcap).tanh() * softcap
        out[b] = torch.einsum("hn,hnd->hd", scores.softmax(-1), values.repeat_interleave(group, 0))
    return out.flatten(1)


# Sums of up to 48 products of numbers of size one; the largest value is below 4, so this is some 50 units of 2^-24.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}

SHAPES = [
    {"positions": [0], "heads": 1, "kv_heads": 1, "dim": 16},
    {"positions": [0, 1, 7, 8, 9, 47], "heads": 3, "kv_heads": 1, "dim": 16},
    {"positions": [15, 16, 33], "heads": 9, "kv_heads": 3, "dim": 64},
    {"positions": [40], "heads": 8, "kv_heads": 1, "dim": 96},
    {"positions": [22, 3], "heads": 4, "kv_heads": 2, "dim": 128},
    {"positions": [17], "heads": 2, "kv_heads": 2, "dim": 256},
    {"positions": [5, 31], "heads": 6, "kv_heads": 2, "dim": 12, "page_size": 5, "pages": 7},
    {"positions": [31, 12], "heads": 14, "kv_heads": 2, "dim": 32, "page_size": 48, "pages": 1},
]
ATTENDED = [
    {"window": 0, "softcap": 0.0},
    {"window": 1, "softcap": 0.0},
    {"window": 9, "softcap": 0.0},
    {"window": 16, "softcap": 3.0},
]


@pytest.mark.parametrize("attended", ATTENDED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_equals_arithmetic_in_float64(shape: dict, attended: dict, device: torch.device) -> None:
    given = cached(device, **shape)
    got = decode_attention_ref(*given.values(), 0.3, **attended)
    torch.testing.assert_close(got.double(), exact(given, 0.3, **attended), **FLOAT32)


@pytest.mark.parametrize("attended", ATTENDED, ids=str)
@pytest.mark.parametrize(("block", "splits", "first"), [(16, 1, 0), (16, 2, 0), (8, 6, 0), (16, 2, 8), (16, 4, 4)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_reference(
    shape: dict, block: int, splits: int, first: int, attended: dict, device: torch.device
) -> None:
    """With first tiles that are smaller, too, which a window may leave without a position."""
    given = cached(device, **shape)
    if device.type == "cuda":  # what tl.dot takes at least
        block, first = (16, 0) if first == 0 else (16 * block // first, 16)
    cut = Tiling(block, splits, 4, 1, first=first)
    got = kernel(*given.values(), 0.3, *attended.values(), False, tiling=cut)
    torch.testing.assert_close(got, decode_attention_ref(*given.values(), 0.3, **attended), **FLOAT32)


FUSED = [
    {"rows": 4, "heads": 3, "kv_heads": 1, "dim": 16, "rotary": 16, "page_size": 8, "max_position": 47},
    {"rows": 2, "heads": 9, "kv_heads": 3, "dim": 64, "rotary": 64, "page_size": 16, "max_position": 47},
    {"rows": 2, "heads": 4, "kv_heads": 2, "dim": 96, "rotary": 48, "page_size": 5, "max_position": 44, "norms": True},
    {"rows": 1, "heads": 8, "kv_heads": 1, "dim": 32, "rotary": 32, "page_size": 64, "max_position": 63, "norms": True},
]


@pytest.mark.parametrize("positions", ["random", 0, 1, 8, 15, 16, 17, 32, 44])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("block", "first"), [(8, 0), (16, 0), (16, 8)])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_kernel_equals_reference(
    case: dict, block: int, first: int, own: bool, positions: object, device: torch.device
) -> None:
    """At every border of a page, a tile and a round of splits; the cache ends up the same, V bit for bit."""
    given = inputs(device, **case)
    if positions != "random":
        given["positions"].fill_(positions)
    for cache in (given["k_cache"], given["v_cache"]):
        cache.copy_(torch.randn_like(cache))
    window = 11 if case["dim"] == 96 else 0
    softcap = 2.0 if case["dim"] == 16 else 0.0
    again = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    expected, _ = fused_decode_attention_ref(*again.values(), 0.2, window, softcap)
    if device.type == "cuda":
        block, first = (16, 0) if first == 0 else (32, 16)
    cut = Tiling(block, 2, 4, 1, own=own, first=first)
    got, _ = fused_kernel(*given.values(), 0.2, window, softcap, True, tiling=cut)
    torch.testing.assert_close(got, expected, **FLOAT32)
    torch.testing.assert_close(given["k_cache"], again["k_cache"], rtol=0, atol=1e-5)
    assert torch.equal(given["v_cache"], again["v_cache"])


def test_fused_kernel_never_reads_what_the_slot_does_not_hold(device: torch.device) -> None:
    """NaN beyond the position, and at it before the append, must not reach the result."""
    for position in (0, 5, 16, 30):
        given = inputs(device, 1, 6, 2, 32, 32, page_size=8)
        given["positions"].fill_(position)
        held = cached(device, [position - 1], 6, 2, 32, pages=4)
        given |= {name: held[name] for name in ("k_cache", "v_cache", "page_table", "slots")}
        for splits, own in ((1, False), (3, False), (3, True), (1, True)):
            got, _ = fused_kernel(*given.values(), 0.2, 0, 0.0, False, tiling=Tiling(16, splits, 4, 1, own=own))
            assert got.isfinite().all()


def test_half_precision_is_as_good_as_its_rounding(device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter has no bfloat16 products
    given = cached(device, [40, 7], 6, 2, 32, dtype=dtype)
    expected = exact(given, 0.3, 0, 0.0)
    got = kernel(*given.values(), 0.3, 0, 0.0, False, tiling=Tiling(16, 2, 4, 1))
    assert got.dtype == dtype
    # The result is rounded once (2^-9); the matrix units also take rounded probabilities (2^-9 of sums below 4).
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=2**-7)


@pytest.mark.parametrize("element_size", [1, 2, 4])
def test_every_size_has_a_tiling(element_size: int) -> None:
    for batch in (1, 2, 64):
        for dim in (16, 64, 96, 128, 256, 512):
            for length in (1, 64, 4096, 131072):
                tiling = choose_tiling(batch, 4, dim, length, 132, element_size)
                assert 1 <= tiling.splits <= 128
                assert tiling.block >= 16
                # Keys and values of the tiles in flight; what else a kernel keeps fits into the rest of 227 KiB.
                assert 2 * max(1, tiling.stages - 1) * tiling.block * dim * element_size <= 131072


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 33, 66])
def test_long_caches_of_wide_heads_fill_the_gpu_in_one_round(batch: int, fp8: bool) -> None:
    """At 128K, more than three quarters of the programs that can run at once, and none more."""
    at_once = 132 * 2
    tiling = choose_tiling(batch, 2, 256, 131072, 132, 1 if fp8 else 2)
    programs = 2 * batch * (tiling.splits + tiling.own)
    assert 0.75 * at_once < programs <= at_once


def test_first_tiles_fill_whole_ones() -> None:
    with pytest.raises(ValueError, match="3 first tiles of 8 positions do not fill tiles of 16"):
        Tiling(16, 3, 4, 1, first=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 16)}, "takes contiguous floats q"),
        ({"q": torch.zeros(2, 5, 32)}, "5 query heads"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, "slots int32"),
        ({"positions": torch.zeros(2)}, "positions int32"),
        ({"window": -1}, "window -1"),
    ],
)
def test_refuses_what_it_does_not_take(change: dict, message: str) -> None:
    given = cached(torch.device("cpu"), [4, 7], 6, 2, 32) | {"scale": 1.0} | change
    with pytest.raises(KernelError, match=message):
        decode_attention(**given)


def test_fused_refuses_heads_that_do_not_fit() -> None:
    given = inputs(torch.device("cpu"), 2, 5, 2, 16, 16)
    with pytest.raises(KernelError, match="do not fit each other"):
        fused_decode_attention(**given, scale=1.0)


def test_traces_as_one_node() -> None:
    """The registered op has a fake implementation with the shapes of the real one."""
    given = inputs(torch.device("cpu"), 3, 6, 2, 16, 16)
    torch.library.opcheck(
        torch.ops.ostinato.fused_decode_attention.default,
        (*given.values(), 1.0, 0, 0.0, False, None, None, False, False),
        test_utils=("test_schema", "test_faketensor"),
    )
