"""Host to device: uploads inside the region, and tensors that stayed on the host."""

from __future__ import annotations

import torch

from .case import Case, case_of, ramp, twice

CASES: list[Case] = []
case = case_of(CASES)


@case("error", "H2D_PAGEABLE H2D_BLOCKING")
def tensor_literal(dev):
    def fn(x):
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=dev)  # BAD

    return fn, twice(dev, 4)


@case("error", "H2D_PAGEABLE H2D_BLOCKING")
def new_tensor(dev):
    def fn(x):
        return x + x.new_tensor([1.0, 2.0, 3.0, 4.0])  # BAD

    return fn, twice(dev, 4)


@case("ok")
def empty_literal(dev):
    def fn(x):
        return torch.cat([x, torch.tensor([], device=dev)])

    return fn, twice(dev, 4)


@case("ok")
def full_on_device(dev):
    def fn(x):
        return x + torch.full((), 3.0, device=x.device) + x.new_full((4,), 2.0)

    return fn, twice(dev, 4)


@case("error", "H2D_PAGEABLE H2D_BLOCKING")
def host_factory_moved(dev):
    def fn(x):
        return x + torch.arange(4).to(dev)  # BAD

    return fn, twice(dev, 4)


@case("error", "H2D_PAGEABLE H2D_BLOCKING")
def scalar_setitem(dev):
    buffer = ramp(dev, 8)

    def fn(x):
        buffer[0] = 5.0  # BAD
        return x + buffer[:4]

    return fn, twice(dev, 4)


@case("ok")
def slice_fill(dev):
    buffer = ramp(dev, 8)

    def fn(x):
        buffer[0:1] = 5.0
        buffer[1].fill_(2.0)
        return x + buffer[:4]

    return fn, twice(dev, 4)


@case("error", "H2D_PAGEABLE H2D_BLOCKING")
def cpu_index(dev):
    index = torch.tensor([0, 2])

    def fn(x):
        return x[index]  # BAD

    return fn, twice(dev, 4)


@case("error", "H2D_PAGEABLE H2D_BLOCKING")
def list_as_index(dev):
    def fn(x):
        return x[[0, 2]]  # BAD

    return fn, twice(dev, 4)


@case("ok")
def device_mask(dev):
    def fn(x):
        m = torch.tril(torch.ones(4, 4, device=x.device))
        return x @ m + torch.arange(4, device=x.device)

    return fn, twice(dev, 4, 4)


@case("hazard", "H2D_PINNED H2D_BLOCKING")
def pinned_copy(dev):
    def fn(x):
        host = torch.ones(4, pin_memory=torch.cuda.is_available())
        return x + host.to(dev, non_blocking=True)  # BAD

    return fn, twice(dev, 4)


@case("error", "H2D_BLOCKING")
def pinned_blocking(dev):
    host = torch.ones(4, pin_memory=torch.cuda.is_available())

    def fn(x):
        return x + host.to(dev)  # BAD

    return fn, twice(dev, 4)


@case("error", "DEVICE_MISMATCH")
def device_mismatch(dev):
    host = torch.ones(4, 4)

    def fn(x):
        return x @ host  # BAD

    return fn, twice(dev, 4, 4)


@case("hazard", "BAKED_SCALAR")
def cpu_scalar_operand(dev):
    step = torch.zeros(())

    def fn(x):
        step.add_(1)
        return x * step  # BAD

    return fn, twice(dev, 4)


@case("ok")
def constant_cpu_scalar(dev):
    scale = torch.tensor(0.5)

    def fn(x):
        return x * scale

    return fn, twice(dev, 4)
