"""Classified snippets: the checker's acceptance suite.

Each case is a factory ``make(dev) -> (fn, argument sets)``. ``fn(*args)`` is the region; tensors in the argument sets
are static inputs, Python numbers are host values that change from call to call. Lines that must be reported end in
``# BAD``, and no other line may be.

verdict ``ok``: nothing at hazard or error level. ``error``: an error on every BAD line. ``hazard``: at least a hazard.
``rules``: any of these is a right answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Case:
    """One snippet and what must be said of it."""

    name: str
    make: Callable[[str], tuple[Callable[..., Any], list[tuple[Any, ...]]]]
    verdict: str
    rules: frozenset[str]

    @property
    def bad_lines(self) -> set[int]:
        """The lines of this file that must be reported."""
        source, start = inspect.getsourcelines(self.make)
        return {start + i for i, text in enumerate(source) if text.rstrip().endswith("# BAD")}


CASES: list[Case] = []


def case(verdict: str, rules: str = ""):
    """Add a factory to the suite."""

    def add(make):
        CASES.append(Case(make.__name__, make, verdict, frozenset(rules.split())))
        return make

    return add


def ramp(dev, *shape):
    """float32 from -1 to 1."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(dev)


def ints(dev, *values):
    """int64."""
    return torch.tensor(values).to(dev)


def twice(dev, *shape):
    """Two argument sets of one tensor each, with other values."""
    return [(ramp(dev, *shape),), (ramp(dev, *shape) * 0.5 + 0.1,)]


# ------------------------------------------------------------------ the host reads the device
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


# ------------------------------------------------------------------ shapes that depend on data
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


# ------------------------------------------------------------------ host to device
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


# ------------------------------------------------------------------ streams, allocator, generators
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


# ------------------------------------------------------------------ what changes between calls
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


# ------------------------------------------------------------------ ordinary model and training code
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
