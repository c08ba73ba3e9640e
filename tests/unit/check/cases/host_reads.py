"""The host reads the device: every one of these makes the host wait."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, case_of, ints, ramp, twice

CASES: list[Case] = []
case = case_of(CASES)


@case("error", "D2H_SYNC")
def item(dev):
    def fn(x):
        largest = x.abs().sum().item()  # BAD
        return x * largest

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def float_of_tensor(dev):
    def fn(x):
        scale = float(x.abs().max())  # BAD
        return x / scale

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def if_tensor(dev):
    def fn(x):
        if (x > 0).any():  # BAD
            return x * 2
        return x

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def while_tensor(dev):
    def fn(x):
        while x.abs().max() > 0.1:  # BAD
            x = x * 0.5
        return x

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def assert_tensor(dev):
    def fn(x):
        assert torch.isfinite(x).all()  # BAD
        return x + 1

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def tolist_split(dev):
    def fn(x, sizes):
        return x.split(sizes.tolist())  # BAD

    return fn, [(ramp(dev, 6, 2), ints(dev, 2, 4)), (ramp(dev, 6, 2), ints(dev, 2, 4))]


@case("error", "D2H_SYNC")
def list_index(dev):
    table = [1.0, 2.0, 3.0]

    def fn(x, i):
        return x * table[i[0]]  # BAD

    return fn, [(ramp(dev, 4), ints(dev, 1)), (ramp(dev, 4), ints(dev, 2))]


@case("error", "D2H_SYNC")
def range_over_tensor(dev):
    def fn(x, n):
        for _ in range(n[0]):  # BAD
            x = x + 1
        return x

    return fn, [(ramp(dev, 4), ints(dev, 2)), (ramp(dev, 4), ints(dev, 2))]


@case("error", "D2H_SYNC")
def slice_bound(dev):
    def fn(x, n):
        return x[: n[0]] * 2  # BAD

    return fn, [(ramp(dev, 4), ints(dev, 2)), (ramp(dev, 4), ints(dev, 2))]


@case("error", "D2H_SYNC")
def membership(dev):
    def fn(x):
        return x * (1.0 if 0.5 in x else 2.0)  # BAD

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def python_max(dev):
    def fn(x):
        return max(x[0], x[1]) * 2  # BAD

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def log_fstring(dev):
    log = []

    def fn(x):
        log.append(f"{x.sum():.3f}")  # BAD
        return x + 1

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def log_repr(dev):
    log = []

    def fn(x):
        log.append(repr(x))  # BAD
        return x + 1

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def to_cpu(dev):
    def fn(x):
        return x.cpu().sum()  # BAD

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def to_cpu_string(dev):
    def fn(x):
        host = x.to("cpu")  # BAD
        return host + 1

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def copy_into_host(dev):
    host = torch.zeros(4)

    def fn(x):
        host.copy_(x)  # BAD
        return x * 2

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def equal(dev):
    def fn(x, y):
        same = torch.equal(x, y)  # BAD
        return x if same else y

    return fn, [(ramp(dev, 4), ramp(dev, 4)), (ramp(dev, 4), ramp(dev, 4))]


@case("error", "D2H_SYNC")
def allclose(dev):
    def fn(x):
        return x * 2 if torch.allclose(x, x) else x  # BAD

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def device_value_masked_fill(dev):
    def fn(x):
        return x.masked_fill(x > 0, x.min())  # BAD

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def histc_no_range(dev):
    def fn(x):
        return torch.histc(x, bins=4)  # BAD

    return fn, twice(dev, 4)


@case("ok")
def histc_range(dev):
    def fn(x):
        return torch.histc(x, bins=4, min=-1, max=1)

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def one_hot_open(dev):
    def fn(i):
        return F.one_hot(i)  # BAD

    return fn, [(ints(dev, 0, 2),), (ints(dev, 1, 2),)]


@case("ok")
def one_hot_closed(dev):
    def fn(i):
        return F.one_hot(i, 4)

    return fn, [(ints(dev, 0, 2),), (ints(dev, 1, 3),)]


@case("error", "D2H_SYNC")
def inverse(dev):
    def fn(x):
        return torch.linalg.inv(x)  # BAD

    return fn, [(torch.eye(3).to(dev),), (torch.eye(3).to(dev) * 2,)]


@case("error", "D2H_SYNC")
def tensors_in_a_list(dev):
    def fn(x):
        return torch.tensor([x[0], x[1]], device=x.device) * 2  # BAD

    return fn, twice(dev, 4)


@case("error", "D2H_SYNC")
def clip_grad_error(dev):
    weight = nn.Parameter(ramp(dev, 4))

    def fn(x):
        weight.grad = x * 2
        torch.nn.utils.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)  # BAD
        return weight.grad * 1

    return fn, twice(dev, 4)


@case("ok")
def clip_grad(dev):
    weight = nn.Parameter(ramp(dev, 4))

    def fn(x):
        weight.grad = x * 2
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        return weight.grad * 1

    return fn, twice(dev, 4)
