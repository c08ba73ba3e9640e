"""The delta-net layer at many rows: what the rule rounds by eight equals what the product would round."""

import pytest
import torch

from ostinato.kv.recurrent import RecurrentSpec, RecurrentState
from ostinato.layers import delta_net
from ostinato.layers.batch import Batch
from ostinato.layers.delta_net import DeltaNet
from ostinato.layers.linear import Linear, Norm, RoundedEights

from ...unit.kernels.block_weights import random_weight

CUDA = torch.device("cuda")
HIDDEN, KEYS, VALUES, DIM = 2048, 16, 32, 128
CHANNELS = (2 * KEYS + VALUES) * DIM


def layer() -> DeltaNet:
    return DeltaNet(
        norm=Norm(torch.rand(HIDDEN, device=CUDA) + 0.5, 1e-6),
        in_proj=Linear((random_weight("I4_128", CHANNELS + VALUES * DIM, HIDDEN, CUDA),)),
        beta_alpha=torch.randn(2 * VALUES, HIDDEN, device=CUDA) * 0.02,
        conv_weight=torch.randn(4, CHANNELS, device=CUDA) * 0.5,
        a_log=torch.rand(VALUES, device=CUDA),
        dt_bias=torch.randn(VALUES, device=CUDA),
        gate_norm=Norm(torch.rand(DIM, device=CUDA) + 0.5, 1e-6),
        out=Linear((random_weight("I4_128", HIDDEN, VALUES * DIM, CUDA),)),
        num_k_heads=KEYS,
        num_v_heads=VALUES,
        tiled=False,
    )


@pytest.mark.parametrize("rows", [8, 13, 32])
def test_rounding_in_the_rule_equals_rounding_in_the_product(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = layer()
    state = RecurrentState.allocate(RecurrentSpec(CHANNELS, 4, VALUES, DIM, DIM), rows, torch.float32, CUDA)
    for tensor in state.tensors():
        tensor.normal_()
    other = RecurrentState(*(tensor.clone() for tensor in state.tensors()))
    index = torch.arange(rows, dtype=torch.int32, device=CUDA)
    batch = Batch(index, index + 5, index, True, torch.ones_like(index))
    h = torch.randn(rows, HIDDEN, device=CUDA)
    qkvz = mixer.in_proj(h, norm=mixer.norm, out_dtype=torch.bfloat16)
    ruled = mixer.rule(qkvz, h, batch, state)
    assert isinstance(ruled, RoundedEights)
    found = mixer.output(ruled, h)
    monkeypatch.setattr(delta_net, "prefers_eights", lambda weight, rows: False)
    plain = mixer.rule(qkvz, h, batch, other)
    assert isinstance(plain, torch.Tensor)
    expected = mixer.output(plain, h)
    # Both round 128 columns with one scale; only the second rounds to bfloat16 before that, to 2^-9 of a value, so that
    # some values reach the next step of int8, which is at most 1/40 of a value of root mean square.
    assert float((found - expected).norm() / (expected - h).norm()) < 8e-3
    for ours, theirs in zip(state.tensors(), other.tensors(), strict=True):
        assert torch.equal(ours, theirs)
