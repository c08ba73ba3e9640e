"""Streams, events, the allocator and random generators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .case import Case, case_of, ramp, twice

CASES: list[Case] = []
case = case_of(CASES)


@case("error", "STREAM_SYNC")
def synchronize(dev):
    def fn(x):
        y = x * 2
        torch.cuda.synchronize()  # BAD
        return y

    return fn, twice(dev, 4)


@case("error", "STREAM_SYNC")
def event_synchronize(dev):
    done = torch.cuda.Event()

    def fn(x):
        y = x * 2
        done.record()
        done.synchronize()  # BAD
        return y

    return fn, twice(dev, 4)


@case("error", "STREAM_SYNC")
def stream_synchronize(dev):
    def fn(x):
        y = x * 2
        torch.cuda.current_stream().synchronize()  # BAD
        return y

    return fn, twice(dev, 4)


@case("ok")
def forked_and_joined(dev):
    side = torch.cuda.Stream()

    def fn(x):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x * 2
        torch.cuda.current_stream().wait_stream(side)
        return y + x

    return fn, twice(dev, 4)


@case("error", "STREAM_FORK")
def never_joined(dev):
    side = torch.cuda.Stream()

    def fn(x):
        side.wait_stream(torch.cuda.current_stream())  # BAD
        with torch.cuda.stream(side):
            x.mul(2)
        return x + 1

    return fn, twice(dev, 4)


@case("error", "ALLOCATOR")
def empty_cache(dev):
    def fn(x):
        torch.cuda.empty_cache()  # BAD
        return x + 1

    return fn, twice(dev, 4)


@case("ok")
def default_rng(dev):
    def fn(x):
        return F.dropout(x, 0.5, True) + torch.randn(4, device=dev) + torch.rand_like(x)

    return fn, twice(dev, 4)


@case("error", "RNG_UNREGISTERED")
def own_generator(dev):
    generator = torch.Generator(device=dev)

    def fn(x):
        return x + torch.rand(4, device=dev, generator=generator)  # BAD

    return fn, twice(dev, 4)


@case("hazard", "RNG_SEED")
def reseed(dev):
    def fn(x):
        torch.manual_seed(1234)  # BAD
        return x + torch.rand(4, device=dev)

    return fn, twice(dev, 4)


@case("ok")
def multinomial(dev):
    def fn(x):
        return torch.multinomial(x.softmax(-1), 1)

    return fn, twice(dev, 2, 4)


@case("ok")
def quantile(dev):
    def fn(x, q):
        return torch.quantile(x, q)

    return fn, [(ramp(dev, 9), torch.tensor([0.2, 0.5]).to(dev)), (ramp(dev, 9), torch.tensor([0.1, 0.9]).to(dev))]
