"""Shapes that depend on data, and the forms of the same work that do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .case import Case, case_of, ints, ramp, twice

CASES: list[Case] = []
case = case_of(CASES)


@case("error", "DYNAMIC_SHAPE D2H_SYNC")
def nonzero(dev):
    def fn(x):
        return (x > 0).nonzero()  # BAD

    return fn, twice(dev, 4)


@case("error", "DYNAMIC_SHAPE D2H_SYNC")
def mask_read(dev):
    def fn(x):
        return x[x > 0]  # BAD

    return fn, twice(dev, 4)


@case("error", "DYNAMIC_SHAPE D2H_SYNC")
def mask_write_device_scalar(dev):
    def fn(x):
        x = x.clone()
        x[x > 0] = x.min()  # BAD
        return x

    return fn, twice(dev, 4)


@case("ok")
def mask_write_python_scalar(dev):
    def fn(x):
        x = x.clone()
        x[x > 0] = 0.0
        return x

    return fn, twice(dev, 4)


@case("error", "DYNAMIC_SHAPE D2H_SYNC")
def where_one_argument(dev):
    def fn(x):
        return torch.where(x > 0)[0]  # BAD

    return fn, twice(dev, 4)


@case("ok")
def where_three_arguments(dev):
    def fn(x):
        return torch.where(x > 0, x, 0.0)

    return fn, twice(dev, 4)


@case("error", "DYNAMIC_SHAPE D2H_SYNC")
def unique(dev):
    def fn(i):
        return torch.unique(i)  # BAD

    return fn, [(ints(dev, 1, 2, 2),), (ints(dev, 1, 1, 2),)]


@case("error", "DYNAMIC_SHAPE D2H_SYNC")
def bincount(dev):
    def fn(i):
        return torch.bincount(i, minlength=8)  # BAD

    return fn, [(ints(dev, 1, 2, 2),), (ints(dev, 1, 1, 2),)]


@case("ok")
def scatter_count(dev):
    def fn(i):
        return torch.zeros(8, dtype=torch.long, device=i.device).scatter_add_(0, i, torch.ones_like(i))

    return fn, [(ints(dev, 1, 2, 2),), (ints(dev, 1, 1, 2),)]


@case("error", "DYNAMIC_SHAPE D2H_SYNC")
def repeat_interleave(dev):
    def fn(x, r):
        return x.repeat_interleave(r, 0)  # BAD

    return fn, [(ramp(dev, 3), ints(dev, 1, 2, 1)), (ramp(dev, 3), ints(dev, 1, 2, 1))]


@case("ok")
def repeat_interleave_sized(dev):
    def fn(x, r):
        return x.repeat_interleave(r, 0, output_size=4)

    return fn, [(ramp(dev, 3), ints(dev, 1, 2, 1)), (ramp(dev, 3), ints(dev, 2, 1, 1))]


@case("error", "DYNAMIC_SHAPE D2H_SYNC")
def masked_select(dev):
    def fn(x):
        return x.masked_select(x > 0).sum()  # BAD

    return fn, twice(dev, 4)


@case("ok")
def same_device_to(dev):
    def fn(x, y):
        return x.to(x.device).to(torch.float16).float() + y.to(x) + x.cuda() if x.is_cuda else x

    return fn, [(ramp(dev, 4), ramp(dev, 4)), (ramp(dev, 4), ramp(dev, 4))]


@case("ok")
def moe_static(dev):
    weights = ramp(dev, 4, 8, 8)

    def fn(x, logits):
        p, chosen = logits.softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for i in range(4):
            share = (chosen == i).to(p.dtype) * p
            out = out + (x @ weights[i]) * share.sum(-1, keepdim=True)
        return out

    return fn, [(ramp(dev, 3, 8), ramp(dev, 3, 4)), (ramp(dev, 3, 8), -ramp(dev, 3, 4))]


@case("error", "D2H_SYNC DYNAMIC_SHAPE")
def moe_loop(dev):
    weights = ramp(dev, 4, 8, 8)

    def fn(x, logits):
        p, chosen = logits.softmax(-1).topk(2, -1)
        hits = F.one_hot(chosen, 4).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for i in (hits.sum((-1, -2)) > 0).nonzero():  # BAD
            k, t = torch.where(hits[i[0]])  # BAD
            out.index_add_(0, t, (x[t] @ weights[i[0]]) * p[t, k, None])  # BAD
        return out

    return fn, [(ramp(dev, 3, 8), ramp(dev, 3, 4)), (ramp(dev, 3, 8), -ramp(dev, 3, 4))]


@case("error", "D2H_SYNC")
def grouped_mm_float32(dev):
    w = torch.ones(2, 16, 16).to(dev)

    def fn(x, offsets):
        return torch._grouped_mm(x, w, offs=offsets)  # BAD

    return fn, [(torch.ones(4, 16).to(dev), torch.tensor([2, 4], dtype=torch.int32).to(dev)) for _ in range(2)]
