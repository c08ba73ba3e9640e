"""Ordinary model and training code: modules, attention, optimizers, backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, case_of, ints, ramp, twice

CASES: list[Case] = []
case = case_of(CASES)


@case("ok")
def decode_block(dev):
    generator = torch.Generator().manual_seed(0)
    emb = torch.randn(16, 8, generator=generator).to(dev)
    w = torch.randn(24, 8, generator=generator).to(dev)
    taps = torch.randn(8, 1, 3, generator=generator).to(dev)
    keys, values = torch.zeros(1, 2, 6, 4).to(dev), torch.zeros(1, 2, 6, 4).to(dev)

    def fn(token, position):
        h = F.layer_norm(F.embedding(token, emb), (8,))
        q, k, v = F.linear(h, w).view(1, 1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        mask = torch.arange(6, device=token.device)[None] <= position[:, None]
        a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        h = h + a.transpose(1, 2).reshape(1, 1, 8)
        h = F.conv1d(h.transpose(1, 2), taps, padding=1, groups=8).transpose(1, 2)
        return (h @ emb.T).topk(3, -1)

    return fn, [(ints(dev, 3).view(1, 1), ints(dev, 0)), (ints(dev, 5).view(1, 1), ints(dev, 1))]


@case("ok")
def module_on_device(dev):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).to(dev)

    def fn(x):
        return model(x)

    return fn, twice(dev, 3, 4)


@case("error", "DEVICE_MISMATCH")
def module_on_host(dev):
    model = nn.Linear(4, 8)

    def fn(x):
        return model(x)  # BAD

    return fn, twice(dev, 3, 4)


@case("ok")
def recurrent(dev):
    model = nn.GRU(4, 8, batch_first=True).to(dev)

    def fn(x):
        return model(x)[0]

    return fn, twice(dev, 2, 3, 4)


@case("ok")
def multihead_attention(dev):
    model = nn.MultiheadAttention(8, 2, batch_first=True).to(dev)

    def fn(x):
        return model(x, x, x)[0]

    return fn, twice(dev, 2, 3, 8)


@case("ok")
def autocast(dev):
    model = nn.Linear(4, 8).to(dev)

    def fn(x):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model(x)

    return fn, twice(dev, 3, 4)


@case("hazard", "BAKED_SCALAR CAPTURABLE")
def adam_not_capturable(dev):
    weight = nn.Parameter(ramp(dev, 4))
    optimizer = torch.optim.Adam([weight], lr=0.1, foreach=False)

    def fn(x):
        weight.grad = x * 1
        optimizer.step()  # BAD
        return weight.detach() * 1

    return fn, [(ramp(dev, 4),), (ramp(dev, 4) * 3,), (-ramp(dev, 4),)]


@case("ok")
def adam_capturable(dev):
    weight = nn.Parameter(ramp(dev, 4))
    optimizer = torch.optim.Adam([weight], lr=0.1, capturable=True)

    def fn(x):
        weight.grad = x * 1
        optimizer.step()
        return weight.detach() * 1

    return fn, [(ramp(dev, 4),), (ramp(dev, 4) * 3,), (-ramp(dev, 4),)]


@case("ok")
def sgd_momentum(dev):
    weight = nn.Parameter(ramp(dev, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)

    def fn(x):
        optimizer.zero_grad(set_to_none=False)
        (weight * x).sum().backward()
        optimizer.step()
        return weight.detach() * 1

    return fn, twice(dev, 4)


@case("ok")
def backward(dev):
    weight = nn.Parameter(ramp(dev, 4, 4))

    def fn(x):
        loss = (x @ weight).square().mean()
        return torch.autograd.grad(loss, weight)[0]

    return fn, twice(dev, 2, 4)
