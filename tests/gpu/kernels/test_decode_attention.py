"""Decode and prefill attention at the sizes of real models, compiled, against float32 references on the CPU."""

import pytest
import torch

from ostinato.kernels.decode_attention import decode_attention, fused_decode_attention
from ostinato.kernels.decode_attention.ref import decode_attention_ref, fused_decode_attention_ref
from ostinato.kernels.decode_attention.triton import Tiling
from ostinato.kernels.decode_attention.triton import decode_attention as decode_kernel
from ostinato.kernels.decode_attention.triton import fused_decode_attention as fused_kernel
from ostinato.kernels.prefill_attention import prefill_attention
from ostinato.kernels.prefill_attention.ref import prefill_attention_ref
from ostinato.kernels.rope import rope_append

from ...unit.kernels.paged import fp8, inputs

# name: query heads, kv heads, head size, rotary size, norms
MODELS = {
    "smollm2": (9, 3, 64, 64, False),
    "llama": (32, 8, 128, 128, False),
    "qwen3.5": (16, 2, 256, 64, True),
    "phi": (32, 32, 96, 96, False),
}


def filled(
    model: str,
    rows: int,
    page_size: int,
    positions: list[int],
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = False,
) -> dict:
    heads, kv_heads, dim, rotary, norms = MODELS[model]
    device = torch.device("cpu")
    given = inputs(device, rows, heads, kv_heads, dim, rotary, dtype, page_size, max(positions), norms, gated)
    given["positions"] = torch.tensor(positions, dtype=torch.int32)
    for cache in (given["k_cache"], given["v_cache"]):
        cache.copy_(torch.randn_like(cache))
    return given


def on_gpu(given: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def widened(given: dict) -> dict:
    wide = {
        name: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in given.items()
    }
    return wide | {"k_cache": given["k_cache"].float(), "v_cache": given["v_cache"].float()}


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("positions", [[0, 1, 63, 64], [511, 512, 513, 129], [3000, 17, 4095, 2048]], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_fused_decode(model: str, positions: list[int]) -> None:
    given = filled(model, 4, 64, positions)
    device = on_gpu(given)
    got, _ = fused_decode_attention(**device, scale=given["k_cache"].shape[3] ** -0.5, prefetch=True)
    wide = widened(given)
    expected, _ = fused_decode_attention_ref(*wide.values(), given["k_cache"].shape[3] ** -0.5, 0, 0.0)
    # bfloat16 keys, probabilities and result: each rounds to 2^-9 of itself, at random.
    assert distance(got, expected) < 4e-3
    assert distance(device["k_cache"], wide["k_cache"]) < 4e-3
    assert torch.equal(device["v_cache"].cpu(), wide["v_cache"].bfloat16())


@pytest.mark.parametrize("tiling", [(64, 40, 4, 2), (32, 7, 1, 1), (16, 128, 1, 1), (128, 9, 8, 2)], ids=str)
@pytest.mark.parametrize("page_size", [16, 256])
def test_decode_with_any_tiling_and_page(tiling: tuple, page_size: int) -> None:
    given = filled("smollm2", 3, page_size, [2500, 700, 0])
    q = torch.randn(3, 9, 64).bfloat16()
    cache = [given[name] for name in ("k_cache", "v_cache", "page_table", "slots", "positions")]
    expected = decode_attention_ref(q.float(), cache[0].float(), cache[1].float(), *cache[2:], 0.125, 1000, 0.0)
    got = decode_kernel(q.cuda(), *(t.cuda() for t in cache), 0.125, 1000, 0.0, False, tiling=Tiling(*tiling))
    assert distance(got, expected) < 4e-3


def test_decode_in_a_graph_follows_the_length_on_the_device() -> None:
    """One captured graph, replayed while positions grow over page, tile and split borders."""
    given = filled("smollm2", 2, 64, [1023, 1023])
    device = on_gpu(given)

    def step() -> torch.Tensor:
        return fused_decode_attention(**device, scale=0.125, prefetch=True)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    wide = widened(given)
    for position in (0, 1, 62, 63, 64, 65, 127, 128, 500, 1023):
        device["positions"].fill_(position)
        result.fill_(torch.nan)
        graph.replay()
        wide["positions"].fill_(position)
        expected, _ = fused_decode_attention_ref(*wide.values(), 0.125, 0, 0.0)
        assert distance(result, expected) < 4e-3, position


@pytest.mark.parametrize(("first", "tokens", "window"), [(0, 1000, 0), (517, 300, 0), (200, 513, 128), (1000, 3, 0)])
@pytest.mark.parametrize("model", MODELS)
def test_prefill(model: str, first: int, tokens: int, window: int) -> None:
    given = filled(model, 1, 64, [first + tokens - 1])
    heads, _, dim, *_ = MODELS[model]
    q = torch.randn(tokens, heads, dim).bfloat16()
    slots = given["slots"].repeat(tokens)
    positions = torch.arange(first, first + tokens, dtype=torch.int32)
    cache = [given["k_cache"], given["v_cache"], given["page_table"], slots, positions]
    got = prefill_attention(q.cuda(), *(t.cuda() for t in cache), dim**-0.5, window)
    expected = prefill_attention_ref(q.float(), cache[0].float(), cache[1].float(), *cache[2:], dim**-0.5, window, 0.0)
    assert distance(got, expected) < 4e-3


def test_float32_is_float32_for_wide_heads_too() -> None:
    """A long cache, whose tiles are smaller than those of bfloat16."""
    given = filled("qwen3.5", 2, 256, [9000, 33], torch.float32)
    expected, _ = fused_decode_attention_ref(*on_gpu(given).values(), 0.0625, 0, 0.0)
    got, _ = fused_decode_attention(**on_gpu(given), scale=0.0625)
    assert distance(got, expected.cpu()) < 1e-5


def test_float32_is_float32() -> None:
    given = filled("smollm2", 2, 64, [900, 33], torch.float32)
    q = torch.randn(2, 9, 64)
    cache = [given[name] for name in ("k_cache", "v_cache", "page_table", "slots", "positions")]
    expected = decode_attention_ref(q, *cache, 0.125, 0, 0.0)
    assert distance(decode_attention(q.cuda(), *(t.cuda() for t in cache), 0.125), expected) < 1e-5
    q = torch.randn(70, 9, 64)
    cache[3:] = [given["slots"][:1].repeat(70), torch.arange(831, 901, dtype=torch.int32)]
    expected = prefill_attention_ref(q, *cache, 0.125, 0, 0.0)
    assert distance(prefill_attention(q.cuda(), *(t.cuda() for t in cache), 0.125), expected) < 1e-5


def scaled_on_gpu(given: dict) -> tuple[dict, dict, dict, dict]:
    """``given`` over FP8 caches with their scales, and the same on the GPU."""
    given, scales = fp8(given)
    return given, scales, on_gpu(given), on_gpu(scales)


LONG = [
    Tiling(64, 66, 4, 3),
    Tiling(64, 7, 4, 3),
    Tiling(64, 128, 4, 2),
    Tiling(32, 128, 4, 2, 32, True),
    Tiling(64, 128, 4, 2, 32, True, 32),
    Tiling(64, 8, 4, 2, 64, True, 16),
    Tiling(64, 64, 8, 1, 32, True),
    Tiling(32, 66, 8, 4),
    Tiling(16, 5, 4, 1),
    None,
]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tiling", LONG, ids=str)
def test_gated_fused_decode(tiling: Tiling | None, scaled: bool) -> None:
    """Tiles alone, several per program, more programs than tiles; FP8 keys end up as the reference's to one step."""
    given = filled("qwen3.5", 6, 256, [0, 31, 64, 513, 4096, 9000], gated=True)
    scales, device_scales = ({"k_scale": None, "v_scale": None},) * 2
    device = on_gpu(given)
    if scaled:
        given, scales, device, device_scales = scaled_on_gpu(given)
    got, _ = fused_kernel(*device.values(), 0.0625, 0, 0.0, True, *device_scales.values(), True, tiling=tiling)
    wide = given | {"qkv": given["qkv"].float()}
    if not scaled:
        wide = widened(given)
    expected, _ = fused_decode_attention_ref(*wide.values(), 0.0625, 0, 0.0, *scales.values(), True)
    # bfloat16 queries, probabilities and results: each rounds to 2^-9 of itself, at random.
    assert distance(got, expected) < 5e-3
    if scaled:
        assert torch.equal(device["v_cache"].view(torch.uint8).cpu(), given["v_cache"].view(torch.uint8))
        assert torch.equal(device_scales["v_scale"].cpu(), scales["v_scale"])
        # A key on the border of two steps may fall to either: 2^-4 of itself, for one in thousands.
        assert distance(device["k_cache"].float(), given["k_cache"].float()) < 1e-3
    else:
        assert distance(device["k_cache"], wide["k_cache"]) < 4e-3


# int8 in groups of 32 gated numbers is off by 6.3e-3 (1 / sqrt(12) of a step, of which 127 are the largest, 2.8 times
# the root mean square); bfloat16 adds up to 5e-3 as above, at random.
ROUNDED = 9e-3


def unrounded(got: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, scale = got
    assert (x.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(x.view(*scale.shape, 32).int().abs().amax(-1) == 127, scale > 0)
    return x * scale.repeat_interleave(32, 1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tiling", [*LONG, Tiling(64, 1, 4, 2), Tiling(32, 9, 4, 3, 32)], ids=str)
def test_rounded_fused_decode(tiling: Tiling | None, scaled: bool) -> None:
    """As above to int8; a row that is idle costs nobody anything."""
    given = filled("qwen3.5", 7, 256, [0, 31, 64, 513, 4096, 9000, 70], gated=True)
    scales, device_scales = ({"k_scale": None, "v_scale": None},) * 2
    device = on_gpu(given)
    if scaled:
        given, scales, device, device_scales = scaled_on_gpu(given)
    for inputs_of in (given, device):
        inputs_of["positions"][6] = -1
    device["qkv"][6] = torch.nan
    before = device["v_cache"].clone()
    got = fused_kernel(*device.values(), 0.0625, 0, 0.0, True, *device_scales.values(), True, True, tiling)
    wide = given | {"qkv": given["qkv"].float()}
    if not scaled:
        wide = widened(given)
    some = wide | {name: wide[name][:6] for name in ("qkv", "positions", "slots")}
    expected, _ = fused_decode_attention_ref(*some.values(), 0.0625, 0, 0.0, *scales.values(), True)
    values = unrounded(got)
    assert distance(values[:6], expected) < ROUNDED
    # Half a step is the bound for each number, beside what bfloat16 makes of it: eight units of the largest, 2^-9 each.
    step = got[1][:6].repeat_interleave(32, 1).cpu()
    assert ((values[:6].cpu() - expected).abs() <= step * (0.5 + 127 * 2**-6)).all()
    assert not got[0][6].any()
    assert not got[1][6].any()
    changed = (device["v_cache"].view(torch.uint8) != before.view(torch.uint8)).flatten(3).any(3)
    assert int(changed.sum()) <= 6 * 2


def test_rounded_decode_in_a_graph_follows_the_length_on_the_device() -> None:
    """One captured graph at one row: no program, one and many have tiles, and the row is idle in between."""
    given = filled("qwen3.5", 1, 256, [4095], gated=True)
    device = on_gpu(given)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return fused_decode_attention(**device, scale=0.0625, prefetch=True, gated=True, rounded=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    wide = widened(given)
    for position in (0, 1, 63, 64, 65, -1, 500, 4095):
        device["positions"].fill_(position)
        result[0].fill_(77)
        result[1].fill_(torch.nan)
        graph.replay()
        if position < 0:
            assert not result[0].any()
            assert not result[1].any()
            continue
        wide["positions"].fill_(position)
        expected, _ = fused_decode_attention_ref(*wide.values(), 0.0625, 0, 0.0, gated=True)
        assert distance(unrounded(result), expected) < ROUNDED, position


@pytest.mark.parametrize(("first", "tokens"), [(0, 700), (517, 300), (1000, 3)])
@pytest.mark.parametrize("model", ["qwen3.5", "smollm2"])
def test_prefill_of_fp8_with_a_gate(model: str, first: int, tokens: int) -> None:
    given, scales, device, device_scales = scaled_on_gpu(filled(model, 1, 64, [first + tokens - 1]))
    heads, _, dim, *_ = MODELS[model]
    q = torch.randn(tokens, heads, dim).bfloat16()
    gate = torch.randn(tokens, 3 * heads * dim).bfloat16()[:, heads * dim : 2 * heads * dim]
    slots = given["slots"].repeat(tokens)
    positions = torch.arange(first, first + tokens, dtype=torch.int32)
    caches = [given["k_cache"], given["v_cache"], given["page_table"], slots, positions]
    device_caches = [device["k_cache"], device["v_cache"], device["page_table"], slots.cuda(), positions.cuda()]
    expected = prefill_attention_ref(q.float(), *caches, dim**-0.5, 0, 0.0, *scales.values(), gate.float())
    got = prefill_attention(q.cuda(), *device_caches, dim**-0.5, **device_scales, gate=gate.cuda())
    assert distance(got, expected) < 4e-3


@pytest.mark.parametrize("model", MODELS)
def test_append_of_fp8(model: str) -> None:
    given, scales, device, device_scales = scaled_on_gpu(
        filled(model, 7, 64, [0, 1, 63, 64, 500, 999, 300], gated=True)
    )
    got = rope_append(**device, **device_scales, gated=True)
    expected = rope_append(**given, **scales, gated=True)
    assert distance(got, expected) < 4e-3
    assert torch.equal(device["v_cache"].view(torch.uint8).cpu(), given["v_cache"].view(torch.uint8))
    assert torch.equal(device_scales["v_scale"].cpu(), scales["v_scale"])
    assert distance(device["k_cache"].float(), given["k_cache"].float()) < 1e-3
