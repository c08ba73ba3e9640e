"""Sums over lanes by hand against the same over a dimension of a tensor. Values are small integers: sums are exact."""

import pytest
import torch
import triton
import triton.language as tl

from ostinato.kernels.lanes.triton import (
    add_across,
    fold,
    max_across,
    max_lanes,
    of_lane,
    row_of,
    share,
    sum_lanes,
    sum_rows,
)
from ostinato.kernels.triton import load_float, load_word, nothing, store_own

WARPS = (1, 2, 4, 8)
MASKS = (1, 2, 4, 8, 16)
# FIRST and SPAN: all lanes, some in a row, some far apart, none
SPANS = ((1, 32), (1, 4), (2, 8), (8, 32), (16, 32), (1, 1))


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-99, 100, shape).float()


def room(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.full(shape, torch.nan, device=device)


def groups(x: torch.Tensor, first: int, span: int) -> torch.Tensor:
    """[..., threads] as [..., n, lanes that differ in the bits from first below span, first]."""
    return x.reshape(*x.shape[:-1], -1, span // first, first)


def over_lanes(x: torch.Tensor, first: int, span: int, *, largest: bool = False) -> torch.Tensor:
    """The sum or the maximum of each group, in all of its threads."""
    grouped = groups(x, first, span)
    found = grouped.amax(-2, keepdim=True) if largest else grouped.sum(-2, keepdim=True)
    return found.expand(grouped.shape).reshape(x.shape)


@triton.jit
def _thread(W: tl.constexpr):
    return tl.arange(0, W)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def _across_kernel(x, out, MASK: tl.constexpr, W: tl.constexpr):
    """Sums, maxima and folded pairs of two values a thread."""
    at = _thread(W)
    a = load_float(x + at, at >= 0)
    b = load_float(x + 32 * W + at, at >= 0)
    store_own(out + at, add_across(a, MASK), at >= 0)
    store_own(out + 32 * W + at, max_across(a, MASK), at >= 0)
    store_own(out + 64 * W + at, fold(a, b, MASK), at >= 0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("warps", WARPS)
def test_two_lanes(warps: int, mask: int, device: torch.device) -> None:
    x, out = integers(2, 32 * warps), room(3, 32 * warps, device=device)
    _across_kernel[(1,)](x.to(device), out, mask, warps, num_warps=warps)
    sums, upper = over_lanes(x, mask, 2 * mask), torch.arange(32 * warps) & mask != 0
    wanted = [sums[0], over_lanes(x[0], mask, 2 * mask, largest=True), torch.where(upper, sums[1], sums[0])]
    assert torch.equal(out.cpu(), torch.stack(wanted))


@triton.jit
def _lanes_kernel(x, out, FIRST: tl.constexpr, SPAN: tl.constexpr, W: tl.constexpr):
    at = _thread(W)
    a = load_float(x + at, at >= 0)
    store_own(out + at, sum_lanes(a, FIRST, SPAN), at >= 0)
    store_own(out + 32 * W + at, max_lanes(a, FIRST, SPAN), at >= 0)


@pytest.mark.parametrize(("first", "span"), SPANS)
@pytest.mark.parametrize("warps", WARPS)
def test_lanes_of_a_span(warps: int, first: int, span: int, device: torch.device) -> None:
    x, out = integers(32 * warps), room(2, 32 * warps, device=device)
    _lanes_kernel[(1,)](x.to(device), out, first, span, warps, num_warps=warps)
    wanted = [x, x] if span == first else [over_lanes(x, first, span, largest=largest) for largest in (False, True)]
    assert torch.equal(out.cpu(), torch.stack(wanted))


@triton.jit
def _of_lane_kernel(x, lanes, out, W: tl.constexpr):
    at = _thread(W)
    store_own(out + at, of_lane(load_float(x + at, at >= 0), load_word(lanes + at, at >= 0)), at >= 0)


@pytest.mark.parametrize("warps", WARPS)
def test_values_of_other_lanes(warps: int, device: torch.device) -> None:
    x, out = integers(warps, 32), room(warps, 32, device=device)
    lanes = torch.randint(32, (warps, 32), dtype=torch.int32)
    _of_lane_kernel[(1,)](x.to(device), lanes.to(device), out, warps, num_warps=warps)
    assert torch.equal(out.cpu(), x.gather(1, lanes.long()))


@triton.jit
def _rows_kernel(
    x, out, rows, R: tl.constexpr, COUNT: tl.constexpr, KEPT: tl.constexpr, FIRST: tl.constexpr, SPAN: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    at = _thread(W)
    values = nothing()
    for i in tl.static_range(COUNT * R):
        values += (load_float(x + i * (32 * W) + at, at >= 0),)
    found = sum_rows(values, R, COUNT, FIRST, SPAN)
    for i in tl.static_range(COUNT * KEPT):
        store_own(out + i * (32 * W) + at, found[i], at >= 0)
    store_own(rows + at, row_of(at % 32, R, FIRST, SPAN).to(tl.float32), at >= 0)


@pytest.mark.parametrize(("rows", "count"), [(1, 3), (2, 1), (4, 2), (8, 1), (32, 1)])
@pytest.mark.parametrize(("first", "span"), SPANS)
@pytest.mark.parametrize("warps", WARPS)
def test_sums_of_rows(warps: int, first: int, span: int, rows: int, count: int, device: torch.device) -> None:
    """Each lane has its own rows, and the lanes that were summed have them all, each as often as the others."""
    kept = max(1, rows // (span // first))
    x, out = integers(count, rows, 32 * warps), room(count, kept, 32 * warps, device=device)
    first_of = room(32 * warps, device=device)
    _rows_kernel[(1,)](x.to(device), out, first_of, rows, count, kept, first, span, warps, num_warps=warps)
    own = first_of.cpu().long() + torch.arange(kept)[:, None]
    assert torch.equal(out.cpu(), over_lanes(x, first, span).gather(1, own.expand(count, -1, -1)))
    members = groups(own, first, span).transpose(0, 1).flatten(1, 2)
    assert bool((torch.nn.functional.one_hot(members, rows).sum(1) * rows == members.shape[1]).all())


@triton.jit
def _share_kernel(values, places, writes, wanted, out, READS: tl.constexpr, SIZE: tl.constexpr, W: tl.constexpr):
    at = _thread(W)
    written = nothing()
    for i in tl.static_range(2):
        mine = i * (32 * W) + at
        value = load_float(values + mine, at >= 0)
        written += (value, load_word(places + mine, at >= 0), load_word(writes + mine, at >= 0) != 0)
    read = nothing()
    for i in tl.static_range(READS):
        read += (load_word(wanted + i * (32 * W) + at, at >= 0),)
    found = share(written, read, 2, READS, SIZE)
    for i in tl.static_range(READS):
        store_own(out + i * (32 * W) + at, found[i], at >= 0)


@pytest.mark.parametrize("reads", [2, 3, 5])
@pytest.mark.parametrize("warps", WARPS)
def test_values_of_other_warps(warps: int, reads: int, device: torch.device) -> None:
    """Some threads of each warp write, anywhere but at three places, and all read what any of them wrote."""
    threads, size = 32 * warps, 16 * warps + 3
    values, writes = integers(2, threads), torch.rand(2, warps, 32).argsort(2).view(2, threads) < 8
    order = torch.randperm(size, dtype=torch.int32)
    places = order[torch.randint(size, (2, threads))]  # those of threads that write nothing are anybody's
    places[writes] = order[3:]
    wanted = order[3:][torch.randint(size - 3, (reads, threads))]
    out = room(reads, threads, device=device)
    given = (values, places, writes.int(), wanted)
    _share_kernel[(1,)](*(t.to(device) for t in given), out, reads, size, warps, num_warps=warps)
    shared = torch.full((size,), torch.nan)
    shared[places[writes].long()] = values[writes]
    assert torch.equal(out.cpu(), shared[wanted.long()])
