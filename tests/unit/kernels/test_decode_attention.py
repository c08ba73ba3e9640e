"""Decode attention: the reference against arithmetic in float64, the kernels against the reference."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.decode_attention import attention_counters, decode_attention, fused_decode_attention
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
FLOAT32 = dict(rtol=1e-5, atol=1e-5)

SHAPES = [
    dict(positions=[0], heads=1, kv_heads=1, dim=16),
    dict(positions=[0, 1, 7, 8, 9, 47], heads=3, kv_heads=1, dim=16),
    dict(positions=[15, 16, 33], heads=9, kv_heads=3, dim=64),
    dict(positions=[40], heads=8, kv_heads=1, dim=96),
    dict(positions=[22, 3], heads=4, kv_heads=2, dim=128),
    dict(positions=[17], heads=2, kv_heads=2, dim=256),
    dict(positions=[5, 31], heads=6, kv_heads=2, dim=12, page_size=5, pages=7),
    dict(positions=[31, 12], heads=14, kv_heads=2, dim=32, page_size=48, pages=1),
]
ATTENDED = [dict(window=0, softcap=0.0), dict(window=1, softcap=0.0), dict(window=9, softcap=0.0), dict(window=16, softcap=3.0)]


@pytest.mark.parametrize("attended", ATTENDED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_equals_arithmetic_in_float64(shape: dict, attended: dict, device: torch.device) -> None:
    given = cached(device, **shape)
    got = decode_attention_ref(*given.values(), 0.3, **attended)
    torch.testing.assert_close(got.double(), exact(given, 0.3, **attended), **FLOAT32)


@pytest.mark.parametrize("join", ["counters", "kernel"])
@pytest.mark.parametrize("tiling", [(16, 1, False), (8, 6, False), (16, 3, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_reference(shape: dict, tiling: tuple, join: str, device: torch.device) -> None:
    given = cached(device, **shape)
    counters = attention_counters(8, shape["kv_heads"], device) if join == "counters" else None
    attended = ATTENDED[SHAPES.index(shape) % 2 * 2 + (join == "counters")]
    cut = Tiling(tiling[0], tiling[1], 4, 1, tiling[2])
    got = kernel(*given.values(), 0.3, *attended.values(), counters, False, cut)
    torch.testing.assert_close(got, decode_attention_ref(*given.values(), 0.3, **attended), **FLOAT32)
    assert counters is None or not counters.any(), "counters must be zero again"


FUSED = [
    dict(rows=4, heads=3, kv_heads=1, dim=16, rotary=16, page_size=8, max_position=47),
    dict(rows=2, heads=9, kv_heads=3, dim=64, rotary=64, page_size=16, max_position=47),
    dict(rows=2, heads=4, kv_heads=2, dim=96, rotary=48, page_size=5, max_position=44, norms=True),
    dict(rows=1, heads=8, kv_heads=1, dim=32, rotary=32, page_size=64, max_position=63, norms=True),
]


@pytest.mark.parametrize("positions", ["random", 0, 1, 8, 15, 16, 17, 32, 44])
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_kernel_equals_reference(case: dict, dot: bool, positions: object, device: torch.device) -> None:
    """At every border of a page, a tile and a round of splits; the cache ends up the same, bit for bit where unturned."""
    given = inputs(device, **case)
    if positions != "random":
        given["positions"].fill_(positions)
    for cache in (given["k_cache"], given["v_cache"]):
        cache.copy_(torch.randn_like(cache))
    window = 11 if case["dim"] == 96 else 0
    softcap = 2.0 if case["dim"] == 16 else 0.0
    again = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    expected = fused_decode_attention_ref(*again.values(), 0.2, window, softcap)
    counters = attention_counters(4, 3, device)
    cut = Tiling(16 if dot else 8, 2, 4, 1, dot)
    got = fused_kernel(*given.values(), 0.2, window, softcap, counters, True, cut)
    torch.testing.assert_close(got, expected, **FLOAT32)
    torch.testing.assert_close(given["k_cache"], again["k_cache"], rtol=0, atol=1e-5)
    assert torch.equal(given["v_cache"], again["v_cache"])
    assert not counters.any()


def test_fused_kernel_never_reads_what_the_slot_does_not_hold(device: torch.device) -> None:
    """NaN beyond the position, and at it before the append, must not reach the result."""
    for position in (0, 5, 16, 30):
        given = inputs(device, 1, 6, 2, 32, 32, page_size=8)
        given["positions"].fill_(position)
        held = cached(device, [position - 1], 6, 2, 32, pages=4)
        given |= {name: held[name] for name in ("k_cache", "v_cache", "page_table", "slots")}
        counters = attention_counters(1, 2, device)
        for tiling in (Tiling(8, 3, 4, 1, False), Tiling(16, 2, 4, 1, True)):
            assert fused_kernel(*given.values(), 0.2, 0, 0.0, counters, False, tiling).isfinite().all()


def test_half_precision_is_as_good_as_its_rounding(device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter has no bfloat16 products
    given = cached(device, [40, 7], 6, 2, 32, dtype=dtype)
    expected = exact(given, 0.3, 0, 0.0)
    for dot in (False, True):
        got = kernel(*given.values(), 0.3, 0, 0.0, None, False, Tiling(16, 2, 4, 1, dot))
        assert got.dtype == dtype
        # The result is rounded once (2^-9); the matrix units also take rounded probabilities (2^-9 of sums below 4).
        torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=2**-7)


def test_every_size_has_a_tiling() -> None:
    for batch in (1, 2, 64):
        for group, dim in ((1, 64), (3, 64), (8, 128), (16, 256), (7, 96)):
            for element_size in (2, 4):
                for length in (1, 64, 4096, 131072):
                    tiling = choose_tiling(batch, 4, group, dim, element_size, length, 132)
                    assert 1 <= tiling.splits <= 128
                    assert not tiling.dot or element_size == 2


def test_public_functions_run_on_the_device(device: torch.device) -> None:
    given = cached(device, [40, 7], 6, 2, 32)
    expected = exact(given, 0.3, 0, 0.0)
    torch.testing.assert_close(decode_attention(*given.values(), 0.3).double(), expected, **FLOAT32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 6, 16)), "takes contiguous floats q"),
        (dict(q=torch.zeros(2, 5, 32)), "5 query heads"),
        (dict(slots=torch.zeros(3, dtype=torch.int32)), "slots int32"),
        (dict(positions=torch.zeros(2)), "positions int32"),
        (dict(window=-1), "window -1"),
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
        (*given.values(), 1.0, 0, 0.0, None, False),
        test_utils=("test_schema", "test_faketensor"),
    )
