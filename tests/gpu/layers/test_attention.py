"""The attention layer at one row: its result goes to the output product in int8 where that pays."""

import pytest
import torch

from ostinato.kernels.block_linear import prefers_int8
from ostinato.layers import attention
from ostinato.layers.linear import Linear

from ...unit.layers.test_attention import layer, one_row

CUDA = torch.device("cuda")


@pytest.mark.parametrize("position", [0, 70, 600])
@pytest.mark.parametrize("kind", ["I4_128", "Q4_0", "Q4_K"])
def test_rounding_in_the_join_equals_rounding_in_the_product(
    kind: str, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mixer = layer(kind, 2048, 16, 2, 256, True, CUDA)
    h, *given = one_row(mixer, position, torch.bfloat16, CUDA)
    calls = []
    product = Linear.of_rounded
    monkeypatch.setattr(Linear, "of_rounded", lambda *args, **named: calls.append(0) or product(*args, **named))
    rounded = mixer(h, *given)
    assert calls == [0]
    monkeypatch.setattr(attention, "prefers_int8", lambda weight, rows: False)
    expected = mixer(h, *given)
    assert calls == [0]
    # Both round the same row to int8, in groups of 32 columns, or of 4: 6.4e-3 of it each time, at random.
    assert float((rounded - expected).norm() / (expected - h).norm()) < 1.1e-2


def test_a_short_row_is_left_to_the_product() -> None:
    assert not prefers_int8(layer("Q4_1", 576, 9, 3, 64, False, CUDA).out.block_weight, 1)
