"""The attention layer: what it hands to its output product at one row of a decode step."""

from __future__ import annotations

import pytest
import torch

from ostinato.kv.paged import KVSpec, PagedKV
from ostinato.layers.attention import Attention
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Linear, Norm
from ostinato.layers.rope import Rope
from tests.unit.kernels.block_weights import random_weight

CPU = torch.device("cpu")


def layer(kind: str, hidden: int, heads: int, kv_heads: int, dim: int, gated: bool, device: torch.device) -> Attention:
    """Random block weights; half of a head is rotated."""
    rows = (heads * (1 + gated) + 2 * kv_heads) * dim
    ones = Norm(torch.ones(dim, device=device), 1e-6)
    return Attention(
        norm=Norm(torch.ones(hidden, device=device), 1e-6),
        qkv=Linear((random_weight(kind, rows, hidden, device),)),
        out=Linear((random_weight(kind, hidden, heads * dim, device),)),
        rope=Rope(10000.0 ** -(torch.arange(0, dim // 2, 2, device=device) / (dim // 2)), 1.0),
        q_norm=ones,
        k_norm=ones,
        num_heads=heads,
        spec=KVSpec(kv_heads, dim),
        scale=dim**-0.5,
        window=0,
        gated=gated,
    )


def one_row(mixer: Attention, position: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """A row of one slot over a cache of random vectors: what ``Attention`` is called with."""
    kv = PagedKV([mixer.spec], num_slots=1, context=1024, page_size=256, dtype=dtype, device=device)
    kv.reserve(0, 1024)
    pages = kv.layers[0]
    for cache in (pages.k, pages.v):
        cache.normal_()
    index = torch.zeros(1, dtype=torch.int32, device=device)
    batch = Batch(index, torch.full_like(index, position), index, True)
    return torch.randn(1, mixer.norm.weight.shape[0], device=device), batch, pages, dtype


@pytest.mark.parametrize("gated", [False, True])
def test_a_rounded_row_goes_through_the_same_product(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = layer("I4_128", 256, 4, 2, 64, gated, CPU)
    h, *given = one_row(mixer, 300, torch.float32, CPU)
    expected = mixer(h, *given)
    seen = []
    product = Linear.of_rounded
    monkeypatch.setattr(
        Linear, "of_rounded", lambda self, row, **named: seen.append(row) or product(self, row, **named)
    )
    monkeypatch.setattr(Attention, "_rounds", lambda self, rows, routed: True)
    found = mixer(h, *given)
    assert [row.x.dtype for row in seen] == [torch.int8]
    # int8 in groups of 32 is off by 1 / sqrt(12) of a step, of which 127 are some 2 to 3 times the root mean square.
    error = float((found - expected).norm() / (expected - h).norm())
    assert 0 < error < 9e-3


def test_on_a_cpu_rows_stay_as_they_are() -> None:
    mixer = layer("Q4_0", 64, 2, 1, 32, False, CPU)
    assert not mixer._rounds(torch.zeros(1, 64), routed=True)
