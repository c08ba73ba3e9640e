"""The prefill kernels of the delta rule, interpreted on the CPU or compiled on a GPU, against their reference."""

import pytest
import torch
import triton
import triton.language as tl

from ostinato.kernels.delta.prefill.triton import Plan, _unit_lower_inverse
from ostinato.kernels.delta.prefill.triton import delta_prefill as launch
from ostinato.kernels.delta.ref import delta_prefill_ref

from .deltas import arguments, copied, distance, int32, with_past

# Sums of at most a few hundred float32 products, taken in another order.
FLOAT32 = 1e-5
# Results, keys and values are rounded to bfloat16, to 2^-9 of themselves, at random.
BFLOAT16 = 8e-3


def compare(
    given: dict,
    position: int,
    device: torch.device,
    *,
    tiled: bool = False,
    plan: Plan | None = None,
    short: int = 16,
    tolerance: float = FLOAT32,
) -> None:
    rows = len(given["h"])
    given = with_past(given, [0, position])
    given |= {"slots": int32(*[1] * rows), "positions": int32(*range(position, position + rows))}
    expected, got = copied(given), copied(given, device)
    y_ref = delta_prefill_ref(**expected, tiled=tiled)
    y = launch(**got, tiled=tiled, plan=plan, short=short)
    assert y.dtype == y_ref.dtype
    assert distance(y, y_ref) < tolerance
    for name in ("conv_state", "state", "pending"):
        ours, theirs = got[name].cpu().float(), expected[name].float()
        assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: entries of others were written, or own ones not"
        assert distance(ours.nan_to_num(0.0), theirs.nan_to_num(0.0)) < tolerance, name


@pytest.mark.parametrize(("rows", "position"), [(1, 0), (1, 2), (2, 1), (3, 0), (7, 5), (16, 3)])
def test_short(rows: int, position: int, device: torch.device) -> None:
    compare(arguments(rows), position, device)


@pytest.mark.parametrize(("rows", "position"), [(17, 0), (63, 2), (64, 0), (65, 9), (140, 1)])
def test_chunks(rows: int, position: int, device: torch.device) -> None:
    compare(arguments(rows, 1, 2), position, device)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_chunks_of_few_tokens(rows: int, device: torch.device) -> None:
    compare(arguments(rows, 1, 2), 4, device, short=0)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim", "hidden", "width"), [(8, 40, 20, 2), (24, 8, 70, 3)])
def test_odd_sizes(key_dim: int, value_dim: int, hidden: int, width: int, tiled: bool, device: torch.device) -> None:
    given = arguments(20, 3, 6, key_dim, value_dim, hidden, width)
    compare(copied(given), 4, device, tiled=tiled)
    compare(given, 1, device, tiled=tiled, short=32)


@pytest.mark.parametrize("gate_steps", [1, 2])
@pytest.mark.parametrize("rows", [3, 18])
def test_gates_summed_in_parts(rows: int, gate_steps: int, device: torch.device) -> None:
    given = arguments(rows, 1, 2, 8, 8, hidden=300)
    compare(given, 1, device, plan=Plan("tf32x3", torch.float32, 16, 4, 1, gate_steps=gate_steps))


def test_bfloat16(device: torch.device) -> None:
    given = arguments(70, 1, 2, 32, 16, dtype=torch.bfloat16)
    compare(copied(given), 3, device, tolerance=BFLOAT16)
    # The interpreter rounds to bfloat16 by cutting off, up to 2^-7, and such errors do not cancel in sums.
    compare(given, 3, device, tolerance=2e-2, plan=Plan("bf16", torch.bfloat16, 16, 4, 1))


@triton.jit
def _inverse_kernel(a, out):
    i = tl.arange(0, 64)
    at = i[:, None] * 64 + i[None, :]
    tl.store(out + at, _unit_lower_inverse(tl.load(a + at), "tf32x3"))


@pytest.mark.parametrize("alike", [0.0, 0.9, 1.0])
def test_inverse(alike: float, device: torch.device) -> None:
    """Also where all keys are nearly the same, and powers of the matrix would reach 10^18."""
    keys = torch.nn.functional.normalize(torch.randn(64, 128) * (1.0 - alike) + alike * torch.randn(128), dim=1)
    a = (keys @ keys.T).tril(-1)
    expected = torch.linalg.inv(a.double() + torch.eye(64))
    got = torch.full((64, 64), torch.nan, device=device)
    _inverse_kernel[(1,)](a.to(device), got)
    assert distance(got, expected) < FLOAT32
