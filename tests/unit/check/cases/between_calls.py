"""What changes between calls: positions, caches, flags, counters, addresses."""

from __future__ import annotations

import torch

from .case import Case, case_of, ints, ramp, twice

CASES: list[Case] = []
case = case_of(CASES)


@case("hazard", "BAKED_OFFSET BAKED_SCALAR SHAPE_CHANGES")
def kv_python_position(dev):
    cache = torch.zeros(1, 8, 4).to(dev)

    def fn(x, position):
        cache[:, position] = x  # BAD
        return cache.sum(1)

    return fn, [(ramp(dev, 1, 4), 0), (ramp(dev, 1, 4), 1), (ramp(dev, 1, 4), 2)]


@case("ok")
def kv_tensor_position(dev):
    cache = torch.zeros(1, 8, 4).to(dev)

    def fn(x, position):
        cache.index_copy_(1, position, x.unsqueeze(1))
        return cache.sum(1)

    return fn, [(ramp(dev, 1, 4), ints(dev, i)) for i in range(3)]


@case("hazard", "SHAPE_CHANGES STALE_INPUT")
def cat_cache(dev):
    state = {"keys": torch.zeros(1, 1, 4).to(dev)}

    def fn(x):
        state["keys"] = torch.cat([state["keys"], x[:, None]], 1)  # BAD
        return state["keys"].sum(1)

    return fn, [(ramp(dev, 1, 4),), (ramp(dev, 1, 4) * 2,)]


@case("hazard", "STALE_INPUT")
def rebound_state(dev):
    state = {"h": torch.zeros(4).to(dev)}

    def fn(x):
        state["h"] = state["h"] * 0.5 + x  # BAD
        return state["h"] * 2

    return fn, twice(dev, 4)


@case("ok")
def inplace_state(dev):
    h = torch.zeros(4).to(dev)

    def fn(x):
        h.mul_(0.5).add_(x)
        return h * 2

    return fn, twice(dev, 4)


@case("hazard", "CONTROL_FLOW")
def python_flag(dev):
    def fn(x, is_first):
        return x * 2 if is_first else x - 1  # BAD

    return fn, [(ramp(dev, 4), True), (ramp(dev, 4), False), (ramp(dev, 4), True)]


@case("hazard", "CONTROL_FLOW")
def python_counter_branch(dev):
    state = {"n": 0}

    def fn(x):
        state["n"] += 1
        if state["n"] % 2:
            x = x * 3  # BAD
        return x + 1

    return fn, twice(dev, 4)


@case("hazard", "BAKED_SCALAR")
def python_step_count(dev):
    state = {"t": 0}

    def fn(x):
        state["t"] += 1
        return x / (1 - 0.9 ** state["t"])  # BAD

    return fn, twice(dev, 4)


@case("hazard", "SHAPE_CHANGES BAKED_SCALAR BAKED_OFFSET")
def growing_window(dev):
    table = ramp(dev, 8, 4)

    def fn(x, length):
        return x @ table[:length].sum(0)  # BAD

    return fn, [(ramp(dev, 2, 4), 1), (ramp(dev, 2, 4), 2), (ramp(dev, 2, 4), 3)]


@case("hazard", "FROZEN_WARMUP")
def frozen_scale(dev):
    state = {}

    def fn(x):
        if "scale" not in state:
            state["scale"] = x.abs().max()  # BAD
        return x / state["scale"]

    return fn, twice(dev, 4)


@case("ok")
def lazy_constant(dev):
    state = {}

    def fn(x):
        if "mask" not in state:
            state["mask"] = torch.ones(4, 4, device=x.device).tril()
        return x @ state["mask"]

    return fn, twice(dev, 4)


@case("ok")
def lazy_upload(dev):
    state = {}

    def fn(x):
        if "table" not in state:
            state["table"] = torch.tensor([1.0, 2.0, 3.0, 4.0], device=dev)
        return x * state["table"]

    return fn, twice(dev, 4)


@case("ok")
def metadata_branch(dev):
    def fn(x):
        if x.shape[0] > 2 and x.dtype == torch.float32 and len(x) == x.numel():
            return x.reshape(x.size(0), -1).expand(x.shape[0], 3)
        return x

    return fn, twice(dev, 4)


@case("hazard", "DATA_PTR STALE_INPUT")
def data_ptr_key(dev):
    seen = {}

    def fn(x):
        return seen.setdefault(x.data_ptr(), x * 2) + 1  # BAD

    return fn, twice(dev, 4)


@case("hazard", "OUT_RESIZED")
def half_width_buffer(dev):
    buffers = [torch.empty(4, 2).to(dev) for _ in range(8)]

    def fn(x):
        return torch.mul(x, 2, out=buffers.pop())  # BAD

    return fn, twice(dev, 4, 4)


@case("hazard", "WRONG_DEVICE")
def other_device(dev):
    def fn(x):
        return x.to("cuda:1")  # BAD

    return fn, twice(dev, 4)
