"""The choice of experts by itself: a stable sort's first ones, whatever the number of experts."""

import pytest
import torch
import triton
import triton.language as tl

from ostinato.kernels.moe.choice.triton import largest, nth_largest
from ostinato.kernels.triton import store_own

EXPERTS = (5, 33, 256, 512, 1000)


@triton.jit
def _largest_kernel(logits, out, E, EP: tl.constexpr, COUNT: tl.constexpr):
    experts = largest(logits, E, EP, COUNT)
    for i in tl.static_range(COUNT):
        tl.store(out + i, experts[i].to(tl.float32))


@triton.jit
def _nth_kernel(logits, out, E, EP: tl.constexpr, COUNT: tl.constexpr, W: tl.constexpr):
    """The expert of place thread % COUNT in each thread."""
    thread = tl.arange(0, W)[:, None] * 32 + tl.arange(0, 32)[None, :]
    store_own(out + thread, nth_largest(logits, thread % COUNT, E, EP, COUNT).to(tl.float32), thread >= 0)


def choose(logits: torch.Tensor, count: int, warps: int, device: torch.device) -> torch.Tensor:
    """``largest``, once all threads have found the same by ``nth_largest``."""
    experts = len(logits)
    found = torch.full((count,), torch.nan, device=device)
    nth = torch.full((32 * warps,), torch.nan, device=device)
    padded, given = max(32, triton.next_power_of_2(experts)), logits.to(device)
    _largest_kernel[(1,)](given, found, experts, padded, count, num_warps=warps)
    _nth_kernel[(1,)](given, nth, experts, padded, count, warps, num_warps=warps)
    assert torch.equal(nth.cpu(), found.cpu()[torch.arange(32 * warps) % count])
    return found.cpu().int()


def spaced(experts: int) -> torch.Tensor:
    """Logits that are equal or 1/16 apart, 2^-9 of them or more: the lowest ten bits of 23 need not tell them apart."""
    return (torch.randn(experts) * 64).round() / 16 + 0.0  # no negative zero


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("experts", EXPERTS)
def test_the_largest_logits(experts: int, count: int, warps: int, device: torch.device) -> None:
    """Ties go to the lower expert: among few values, among infinities and where all are equal."""
    few = torch.randint(-1, 2, (experts,)).float()
    infinite = spaced(experts)
    infinite[torch.rand(experts) < 0.4] = -torch.inf
    infinite[experts // 2] = torch.inf
    for logits in (spaced(experts), few, infinite, torch.full((experts,), -2.5)):
        expected = logits.sort(descending=True, stable=True).indices[:count]
        found = choose(logits, min(count, experts), warps, device)
        assert torch.equal(found, expected.int())


@pytest.mark.parametrize("experts", EXPERTS)
def test_nan_is_some_expert(experts: int, device: torch.device) -> None:
    """Of either sign and any bits, some or all: what is chosen are experts, since their weights are loaded."""
    least = torch.full((experts,), -1, dtype=torch.int32).view(torch.float32)
    assert least.isnan().all()
    for nan in (torch.full((experts,), torch.nan), -torch.full((experts,), torch.nan), least):
        for share in (0.3, 1.0):
            logits = torch.where(torch.rand(experts) <= share, nan, spaced(experts))
            found = choose(logits, min(8, experts), 4, device)
            assert int(found.min()) >= 0
            assert int(found.max()) < experts
