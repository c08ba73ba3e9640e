"""The attention layer at one row: its result goes to the output product in int8 where that pays."""

import pytest
import torch

from ostinato.kernels.block_linear import prefers_int8
from ostinato.kv.paged import KVSpec, PagedKV
from ostinato.layers import attention
from ostinato.layers.attention import Attention
from ostinato.layers.batch import Batch
from ostinato.layers.linear import Linear, Norm
from ostinato.layers.rope import Rope

from ...unit.kernels.block_weights import random_weight

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def layer(kind: str, hidden: int, heads: int, kv_heads: int, dim: int, gated: bool) -> Attention:
    rows = (heads * (1 + gated) + 2 * kv_heads) * dim
    ones = Norm(torch.ones(dim, device=CUDA), 1e-6)
    return Attention(
        norm=Norm(torch.ones(hidden, device=CUDA), 1e-6),
        qkv=Linear((random_weight(kind, rows, hidden, CUDA),)),
        out=Linear((random_weight(kind, hidden, heads * dim, CUDA),)),
        rope=Rope(10000.0 ** -(torch.arange(0, 64, 2, device=CUDA) / 64), 1.0),
        q_norm=ones,
        k_norm=ones,
        num_heads=heads,
        spec=KVSpec(kv_heads, dim),
        scale=dim**-0.5,
        window=0,
        gated=gated,
    )


@pytest.mark.parametrize("position", [0, 70, 600])
@pytest.mark.parametrize("kind", ["I4_128", "Q4_0", "Q4_K"])
def test_rounding_in_the_join_equals_rounding_in_the_product(
    kind: str, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mixer = layer(kind, 2048, 16, 2, 256, gated=True)
    kv = PagedKV([mixer.spec], num_slots=1, context=1024, page_size=256, dtype=torch.bfloat16, device=CUDA)
    kv.reserve(0, 1024)
    pages = kv.layers[0]
    for cache in (pages.k, pages.v):
        cache.normal_()
    index = torch.zeros(1, dtype=torch.int32, device=CUDA)
    batch = Batch(index, torch.full_like(index, position), index, True)
    h = torch.randn(1, 2048, device=CUDA)
    calls = []
    launch = attention.int8_linear
    monkeypatch.setattr(attention, "int8_linear", lambda *args, **named: calls.append(0) or launch(*args, **named))
    rounded = mixer(h, batch, pages, torch.bfloat16)
    assert calls == [0]
    monkeypatch.setattr(attention, "prefers_int8", lambda weight, rows: False)
    expected = mixer(h, batch, pages, torch.bfloat16)
    assert calls == [0]
    # Both round the same row to int8, in groups of 32 columns, or of 4: 6.4e-3 of it each time, at random.
    assert float((rounded - expected).norm() / (expected - h).norm()) < 1.1e-2


def test_a_short_row_is_left_to_the_product() -> None:
    assert not prefers_int8(layer("Q4_1", 576, 9, 3, 64, gated=False).out.block_weight, 1)
