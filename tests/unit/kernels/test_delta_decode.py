"""The fused decode kernel of the delta rule, interpreted on the CPU or compiled on a GPU, against its reference."""

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear.eights import from_eights
from ostinato.kernels.delta.decode.triton import Tiling, choose
from ostinato.kernels.delta.decode.triton import delta_decode as launch
from ostinato.kernels.delta.ref import delta_decode_ref
from ostinato.kernels.delta.token.triton import takes
from ostinato.kernels.rms_norm.ref import rms_norm_ref

from .deltas import arguments, copied, distance, int32, with_past

# Sums of at most a few hundred float32 products, taken in another order.
FLOAT32 = 1e-5
# The result is rounded to bfloat16 once, to 2^-9 of itself.
BFLOAT16 = 4e-3


def compare(
    given: dict,
    device: torch.device,
    *,
    active: torch.Tensor | None = None,
    tiled: bool = False,
    form: str = "plain",
    prefetch: bool = False,
    given_gates: bool = False,
    tiling: Tiling | None = None,
    tolerance: float = FLOAT32,
    state_tolerance: float = FLOAT32,
) -> None:
    """Run both on copies of ``given`` and compare results and states; NaN stays where it was."""
    expected, got = copied(given), copied(given, device)
    runs = torch.ones_like(given["slots"]) if active is None else active
    flags = {"tiled": tiled, "form": form}
    y_ref, squares_ref, scale_ref = delta_decode_ref(**expected, active=active, **flags)
    gates = None
    if given_gates:
        normed = rms_norm_ref(given["h"], given["norm"], given["norm_eps"], torch.float32)
        gates = (normed @ given["beta_alpha"].float().T).to(device)
        for name in ("h", "norm", "beta_alpha"):
            got[name].fill_(torch.nan)
    active = None if active is None else active.to(device)
    y, squares, scale = launch(**got, active=active, **flags, gates=gates, prefetch=prefetch, tiling=tiling)
    assert y.dtype == y_ref.dtype
    assert squares.shape == squares_ref.shape
    assert scale.shape == scale_ref.shape
    chosen = runs != 0
    if form == "rounded":  # values that differ in their last bits may round to neighbours
        assert (y.cpu()[chosen].int() - y_ref[chosen].int()).abs().max() <= 1
        assert (y.cpu()[chosen] != y_ref[chosen]).float().mean() < 0.01
        assert distance(scale.cpu()[chosen], scale_ref[chosen]) < FLOAT32
        assert distance(squares.cpu().sum(-1)[chosen], squares_ref.sum(-1)[chosen]) < FLOAT32
    else:
        assert distance(y.cpu()[chosen], y_ref[chosen]) < tolerance
    for name in ("conv_state", "state", "pending"):
        ours, theirs = got[name].cpu().float(), expected[name].float()
        assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: entries of others were written, or own ones not"
        assert distance(ours.nan_to_num(0.0), theirs.nan_to_num(0.0)) < state_tolerance, name


@pytest.mark.parametrize("positions", [[0], [1], [2], [3], [4], [9, 0, 2]], ids=str)
def test_positions(positions: list[int], device: torch.device) -> None:
    compare(with_past(arguments(len(positions)), positions), device)


@pytest.mark.parametrize(("parts", "key_dim", "value_dim"), [(1, 16, 32), (2, 24, 64), (1, 8, 96), (4, 16, 128)])
def test_deferred_norm_in_parts(parts: int, key_dim: int, value_dim: int, device: torch.device) -> None:
    given = with_past(arguments(2, key_dim=key_dim, value_dim=value_dim), [5, 0])
    for tiled in (False, True):
        compare(given, device, tiled=tiled, form="rounded", tiling=Tiling(parts, 2), prefetch=True)


@pytest.mark.parametrize("parts", [1, 4])
def test_gates_that_are_there_already(parts: int, device: torch.device) -> None:
    given = with_past(arguments(1, value_dim=128), [5])
    compare(given, device, form="rounded", given_gates=True, tiling=Tiling(parts, 1))
    compare(with_past(arguments(3), [4, 0, 7]), device, given_gates=True)
    wide = with_past(arguments(1, value_dim=160), [3])  # too wide for one token's own kernel
    compare(wide, device, form="rounded", given_gates=True, prefetch=True)


# Keys: a part of a warp, several warps, some of them without keys. Values: of heads cut into one to four programs.
ONE_TOKEN = [(16, 32), (16, 128), (20, 64), (24, 96), (64, 32), (64, 96), (128, 64), (128, 128), (160, 32)]


@pytest.mark.parametrize(("key_dim", "value_dim"), ONE_TOKEN)
def test_one_token_of_given_gates(key_dim: int, value_dim: int, device: torch.device) -> None:
    assert takes(key_dim, value_dim, "rounded")
    given = with_past(arguments(1, 1, 2, key_dim, value_dim), [5])
    compare(given, device, form="rounded", given_gates=True, prefetch=True)


@pytest.mark.parametrize("position", [0, 1, 5])
@pytest.mark.parametrize("tiled", [False, True])
def test_positions_of_one_token(position: int, tiled: bool, device: torch.device) -> None:
    """Six value heads of two key heads; the first tokens have an empty convolution and state."""
    given = with_past(arguments(1, 2, 6, 24, 64, dtype=torch.bfloat16), [position])
    compare(given, device, tiled=tiled, form="rounded", given_gates=True, prefetch=True)
    given = with_past(arguments(1, 2, 4, 40, 32, width=3), [position])
    compare(given, device, tiled=tiled, form="rounded", given_gates=True)


def test_one_token_of_each_row(device: torch.device) -> None:
    """Rows that do not run leave their states, and rows need not stand in the order of their slots."""
    given = with_past(arguments(3, 1, 2, 24, 64), [5, 0, 2])
    compare(given, device, active=int32(1, 0, 1), form="rounded", given_gates=True, prefetch=True)
    compare(given, device, active=int32(0, 1, 0), form="rounded", given_gates=True)
    moved = given | {"slots": int32(2, 0, 1), "positions": int32(2, 5, 0)}
    compare(moved, device, form="rounded", given_gates=True, prefetch=True)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 64), (128, 32)])
def test_one_token_and_a_bfloat16_state(key_dim: int, value_dim: int, device: torch.device) -> None:
    given = arguments(1, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    # as in test_bfloat16_state
    compare(with_past(given, [5]), device, form="rounded", given_gates=True, prefetch=True, state_tolerance=6e-3)


def test_heads_that_one_token_has_no_kernel_for() -> None:
    """More keys than eight warps have lanes, more columns than sums of squares, and results of other forms."""
    assert takes(256, 128, "rounded")
    assert not takes(257, 128, "rounded")
    assert not takes(128, 160, "rounded")
    assert not takes(128, 128, "plain")
    assert not takes(128, 128, "eights")


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim", "hidden", "width"), [(8, 24, 20, 2), (24, 8, 40, 3)])
def test_odd_sizes(key_dim: int, value_dim: int, hidden: int, width: int, tiled: bool, device: torch.device) -> None:
    given = arguments(2, 3, 6, key_dim, value_dim, hidden, width)
    compare(with_past(given, [4, 1]), device, tiled=tiled)


def test_inactive_rows_leave_their_states(device: torch.device) -> None:
    given = with_past(arguments(3, value_dim=32), [5, 3, 0])
    compare(given, device, active=int32(1, 0, 0))
    compare(given, device, active=int32(0, 1, 1), form="rounded")


def test_rows_of_permuted_slots(device: torch.device) -> None:
    given = with_past(arguments(2), [6, 2, 0])
    compare(given | {"slots": int32(1, 0), "positions": int32(2, 6)}, device)


def test_bfloat16(device: torch.device) -> None:
    given = with_past(arguments(2, dtype=torch.bfloat16), [5, 0])
    compare(given, device, tolerance=BFLOAT16)


def test_bfloat16_state(device: torch.device) -> None:
    given = with_past(arguments(2, state_dtype=torch.bfloat16), [5, 0])
    # The interpreter rounds to bfloat16 by cutting off: up to a unit, 2^-7, of which the root mean square is 2^-7 / √3.
    compare(given, device, state_tolerance=6e-3)


def test_hidden_sizes_that_are_no_multiple_of_four_are_refused(device: torch.device) -> None:
    given = with_past(arguments(1, hidden=26), [0])
    with pytest.raises(KernelError, match="multiple of 4, got 26"):
        compare(given, device)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_heads_rounded_by_eight_rows(rows: int, device: torch.device) -> None:
    """A head of 128 columns has one scale; rows beyond the last are zeros."""
    given = with_past(arguments(rows, value_dim=128, num_slots=9), [5, 0, 1, 2, 3, 4, 6, 7, 8][:rows])
    got = copied(given, device)
    y_ref, _, factors_ref = delta_decode_ref(**copied(given), active=None, tiled=False, form="eights")
    flags = {"active": None, "tiled": False, "form": "eights", "prefetch": False}
    y, squares, factors = launch(**got, gates=None, **flags)
    assert squares.numel() == 0
    assert y.shape == y_ref.shape
    # values that differ in their last bits may round to neighbours, which changes their sum too
    assert (y.cpu().int() - y_ref.int()).abs().max() <= 1
    assert (y.cpu() != y_ref).float().mean() < 0.01
    assert distance(factors.cpu()[..., 0], factors_ref[..., 0]) < FLOAT32
    assert torch.equal(factors.cpu()[..., 1], from_eights(y.cpu(), factors_ref, 8 * len(y))[0].float().view(
        len(y), 8, -1, 128).sum(3).transpose(1, 2))  # fmt: skip


def test_parts_fill_the_gpu_and_no_more() -> None:
    assert choose(1, 32, 128, "rounded", 132) == Tiling(4, 2)
    assert choose(4, 32, 128, "rounded", 132) == Tiling(2, 4)
    assert choose(64, 32, 128, "rounded", 132) == Tiling(1, 4)
    assert choose(1, 32, 128, "plain", 132) == Tiling(1, 4)
    assert choose(1, 4, 16, "rounded", 132).parts == 1
    assert choose(1, 32, 64, "rounded", 132).parts == 2  # whole groups of 32 columns
