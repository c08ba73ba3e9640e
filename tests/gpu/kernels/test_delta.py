"""The delta rule at the sizes of Qwen3.5-35B-A3B, compiled, against the reference in plain PyTorch."""

import pytest
import torch

from ostinato.kernels.delta import delta_decode, delta_prefill
from ostinato.kernels.delta.ref import delta_decode_ref, delta_prefill_ref
from ostinato.kernels.rms_norm.ref import rms_norm_ref

from ...unit.kernels.deltas import arguments, copied, distance, int32, rows_of, settled, with_past

# float32 sums of up to 2,048 products in another order, carried from token to token.
FLOAT32 = 2e-5
# One rounding to bfloat16, 2^-9 at random, and products of tf32, 2^-11 each.
BFLOAT16 = 4e-3
SIZES = {"key_heads": 16, "value_heads": 32, "key_dim": 128, "value_dim": 128, "hidden": 2048}


def same_states(ours: dict, theirs: dict, position: int, tolerance: float, slot: int = 1) -> None:
    """The states before ``position``. Entries of the ring that no token has reached stay poisoned."""
    assert distance(settled(ours, position, slot), settled(theirs, position, slot)) < tolerance
    mine, other = ours["conv_state"][slot], theirs["conv_state"][slot]
    assert torch.equal(mine.isnan(), other.isnan())
    assert distance(mine.nan_to_num(0.0), other.nan_to_num(0.0)) < tolerance


@pytest.mark.parametrize("form", ["plain", "rounded"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 33, 64])
def test_decode(rows: int, form: str) -> None:
    positions = [(7, 0, 3, 1)[i % 4] for i in range(rows)]
    given = with_past(arguments(rows, **SIZES, num_slots=rows, dtype=torch.bfloat16), positions)
    given["active"] = int32(*[int(i % 5 != 4) for i in range(rows)])
    ours, theirs = copied(given, "cuda"), copied(given)
    y, squares, scale = delta_decode(**ours, form=form)
    expected, squares_ref, scale_ref = delta_decode_ref(**theirs, tiled=False, form=form)
    chosen = given["active"] != 0
    if form == "rounded":  # values that differ in their last bits may round to neighbours
        assert (y.cpu()[chosen].int() - expected[chosen].int()).abs().max() <= 1
        assert (y.cpu()[chosen] != expected[chosen]).float().mean() < 0.01
        assert distance(scale.cpu()[chosen], scale_ref[chosen]) < FLOAT32
        assert distance(squares.cpu().sum(-1)[chosen], squares_ref.sum(-1)[chosen]) < FLOAT32
    else:
        assert distance(y.cpu()[chosen], expected[chosen]) < BFLOAT16
    for name in ("conv_state", "state", "pending"):
        assert torch.equal(ours[name].cpu().isnan(), theirs[name].isnan())
        assert distance(ours[name].nan_to_num(0.0), theirs[name].nan_to_num(0.0)) < FLOAT32


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [[0], [1], [7], [3, 0, 7, 1]], ids=str)
def test_one_token_of_given_gates(positions: list[int], state_dtype: torch.dtype, tiled: bool) -> None:
    rows = len(positions)
    given = arguments(rows, **SIZES, num_slots=rows, dtype=torch.bfloat16, state_dtype=state_dtype)
    given = with_past(given, positions)
    given["active"] = int32(*[int(i != 2) for i in range(rows)])
    ours, theirs = copied(given, "cuda"), copied(given)
    normed = rms_norm_ref(given["h"], given["norm"], given["norm_eps"], torch.float32)
    gates = (normed @ given["beta_alpha"].float().T).cuda()
    for name in ("h", "norm", "beta_alpha"):  # which are not read
        ours[name].fill_(torch.nan)
    y, squares, scale = delta_decode(**ours, tiled=tiled, form="rounded", gates=gates, prefetch=True)
    expected, squares_ref, scale_ref = delta_decode_ref(**theirs, tiled=tiled, form="rounded")
    chosen = given["active"] != 0
    # values that differ in their last bits may round to neighbours
    assert (y.cpu()[chosen].int() - expected[chosen].int()).abs().max() <= 1
    assert (y.cpu()[chosen] != expected[chosen]).float().mean() < 0.01
    assert distance(scale.cpu()[chosen], scale_ref[chosen]) < FLOAT32
    assert distance(squares.cpu().sum(-1)[chosen], squares_ref.sum(-1)[chosen]) < FLOAT32
    for name in ("conv_state", "state", "pending"):
        mine, other = ours[name].cpu().float(), theirs[name].float()
        assert torch.equal(mine.isnan(), other.isnan())
        # a state that differs in its last bits may round to a neighbour in bfloat16, seldom
        bound = BFLOAT16 if name == "state" and state_dtype == torch.bfloat16 else FLOAT32
        assert distance(mine.nan_to_num(0.0), other.nan_to_num(0.0)) < bound, name


def test_decode_in_a_graph_follows_positions_on_the_device() -> None:
    """40 tokens by replays of one graph are 40 tokens of the reference; only the first position resets the states."""
    whole = arguments(40, **SIZES, dtype=torch.bfloat16)
    ours, theirs = copied(whole, "cuda"), copied(whole, "cuda")
    expected = delta_prefill_ref(**rows_of(theirs, 0, 40), tiled=False)
    step = rows_of(ours, 0, 1)
    step["qkvz"], step["h"] = step["qkvz"].clone(), step["h"].clone()
    delta_decode(**step, prefetch=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _, _ = delta_decode(**step, prefetch=True)
    for t in range(40):
        step["qkvz"].copy_(ours["qkvz"][t : t + 1])
        step["h"].copy_(ours["h"][t : t + 1])
        step["positions"].fill_(t)
        y.fill_(torch.nan)
        graph.replay()
        assert distance(y, expected[t : t + 1]) < BFLOAT16, t
    same_states(ours, theirs, 40, 2 * FLOAT32)


@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 32, 63, 64, 65, 128, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill(tokens: int, dtype: torch.dtype) -> None:
    given = arguments(tokens, **SIZES, dtype=dtype)
    ours, theirs = copied(given, "cuda"), copied(given, "cuda")
    y = delta_prefill(**rows_of(ours, 0, tokens))
    expected = delta_prefill_ref(**rows_of(theirs, 0, tokens), tiled=False)
    assert distance(y, expected) < (FLOAT32 if dtype == torch.float32 else BFLOAT16)
    same_states(ours, theirs, tokens, FLOAT32 if dtype == torch.float32 else BFLOAT16)
    assert ours["state"][[0, 2]].isnan().all()
    assert torch.equal(settled(ours, tokens), ours["state"][1]), "nothing is left pending"


@pytest.mark.parametrize("splits", [(1, 999), (64, 64, 872), (31, 32, 63, 65, 3, 2, 804), (500, 1, 1, 498)], ids=str)
def test_any_split_gives_the_same(splits: tuple[int, ...]) -> None:
    given = arguments(1000, **SIZES, dtype=torch.float32)
    whole, parts = copied(given, "cuda"), copied(given, "cuda")
    expected = delta_prefill(**rows_of(whole, 0, 1000))
    ends = [sum(splits[: i + 1]) for i in range(len(splits))]
    got = torch.cat([delta_prefill(**rows_of(parts, end - n, end)) for end, n in zip(ends, splits, strict=True)])
    assert distance(got, expected) < FLOAT32
    same_states(parts, whole, 1000, FLOAT32)


def test_decode_after_prefill() -> None:
    given = arguments(140, **SIZES, dtype=torch.float32)
    whole, parts = copied(given, "cuda"), copied(given, "cuda")
    expected = delta_prefill(**rows_of(whole, 0, 140))
    got = [
        delta_prefill(**rows_of(parts, 0, 100)),
        *(delta_decode(**rows_of(parts, t, t + 1))[0] for t in range(100, 131)),
    ]
    got.append(delta_prefill(**rows_of(parts, 131, 135)))
    got += [delta_decode(**rows_of(parts, t, t + 1))[0] for t in range(135, 140)]
    assert distance(torch.cat(got), expected) < FLOAT32
    same_states(parts, whole, 140, FLOAT32)


def test_keys_that_are_all_alike() -> None:
    """The worst case of the chunks' triangular inverse: one key, written again and again with beta near 1."""
    given = arguments(200, **SIZES, dtype=torch.float32)
    given["qkvz"][:, : 2 * 16 * 128] = given["qkvz"][:1, : 2 * 16 * 128]
    given["beta_alpha"] = torch.zeros_like(given["beta_alpha"])
    given["dt_bias"] = torch.full((32,), -9.0)
    ours, theirs = copied(given, "cuda"), copied(given, "cuda")
    y = delta_prefill(**rows_of(ours, 0, 200))
    expected = delta_prefill_ref(**rows_of(theirs, 0, 200), tiled=False)
    assert distance(y, expected) < 1e-4
    same_states(ours, theirs, 200, 1e-4)
