"""The public delta ops on the CPU: against transformers, in any split, and what they refuse."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeGatedDeltaNet,
    torch_recurrent_gated_delta_rule,
)

from ostinato.errors import KernelError
from ostinato.kernels.delta import delta_decode, delta_prefill
from ostinato.kernels.delta.ref import FORMS, recurrence_ref, settled_ref

from .deltas import arguments, copied, distance, int32, rows_of, settled, with_past

# Sums of at most a few hundred float32 products, taken in another order.
FLOAT32 = 1e-5


def prefill(given: dict, first: int, stop: int) -> torch.Tensor:
    return delta_prefill(**rows_of(given, first, stop))


def decode(given: dict, row: int) -> torch.Tensor:
    return delta_decode(**rows_of(given, row, row + 1))[0]


def test_the_recurrence_is_that_of_transformers() -> None:
    x = torch.randn(9, 2 * 2 * 8 + 4 * 6)
    beta, decay = torch.rand(9, 4), -torch.rand(9, 4)
    state = torch.randn(4, 8, 6)
    q, k = (part.view(1, 9, 2, 8).repeat_interleave(2, 2) for part in (x[:, :16], x[:, 16:32]))
    expected, last = torch_recurrent_gated_delta_rule(
        q, k, x[:, 32:].view(1, 9, 4, 6), g=decay[None], beta=beta[None], initial_state=state[None].clone(),
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    got, after, change = recurrence_ref(x, beta, decay, state, 2, 4, False)
    assert distance(got, expected[0]) < FLOAT32
    assert distance(after, last[0]) < FLOAT32
    before = recurrence_ref(x[:8], beta[:8], decay[:8], state, 2, 4, False)[1]
    pending = torch.stack((torch.full_like(change, torch.nan), change))
    assert distance(settled_ref(before, pending, 6), last[0]) < FLOAT32


def test_layer_of_transformers() -> None:
    """Prefill of 7 tokens, then 5 decoded ones: the whole layer, its two projections aside."""
    config = Qwen3_5MoeTextConfig(
        hidden_size=24, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    layer = Qwen3_5MoeGatedDeltaNet(config, 0).float().eval()
    torch.nn.init.normal_(layer.dt_bias)
    torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    given = arguments(12, value_dim=8)
    h, norm = given["h"], given["norm"]
    x = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * norm
    cache = DynamicCache(config=config)
    with torch.no_grad():
        parts = [layer(x[None, :7], cache)[0]]
        parts += [layer(x[None, t : t + 1], cache)[0] for t in range(7, 12)]
        given |= {
            "qkvz": torch.cat((layer.in_proj_qkv(x), layer.in_proj_z(x)), 1),
            "beta_alpha": torch.cat((layer.in_proj_b.weight, layer.in_proj_a.weight)),
            "conv_weight": layer.conv1d.weight[:, 0].T.contiguous(),
            "a_log": layer.A_log.detach(),
            "dt_bias": layer.dt_bias.detach(),
            "gate_norm": layer.norm.weight.detach(),
            "eps": config.rms_norm_eps,
        }
        got = torch.cat([prefill(given, 0, 7), *(decode(given, t) for t in range(7, 12))])
        assert distance(layer.out_proj(got), torch.cat(parts)) < FLOAT32


@pytest.mark.parametrize("splits", [(1,) * 13, (2, 11), (3, 1, 4, 5), (12, 1)], ids=str)
def test_any_split_gives_the_same(splits: tuple[int, ...]) -> None:
    given = arguments(13)
    whole, parts = copied(given), copied(given)
    expected = prefill(whole, 0, 13)
    ends = [sum(splits[: i + 1]) for i in range(len(splits))]
    got = torch.cat([prefill(parts, end - size, end) for end, size in zip(ends, splits, strict=True)])
    assert distance(got, expected) < FLOAT32
    for name in ("state", "conv_state"):
        assert distance(parts[name][1], whole[name][1]) < FLOAT32
    for name in ("state", "conv_state", "pending"):
        assert parts[name][[0, 2]].isnan().all(), "other slots are left alone"


def test_decoding_and_prefill_take_turns() -> None:
    """What decoding leaves pending is found by prefill, at even and odd positions, and the other way round."""
    given = arguments(13)
    whole, parts = copied(given), copied(given)
    expected = prefill(whole, 0, 13)
    got = [decode(parts, 0), decode(parts, 1), prefill(parts, 2, 5), decode(parts, 5), prefill(parts, 6, 8)]
    assert torch.equal(settled(parts, 8), parts["state"][1]), "prefill leaves nothing pending"
    got += [prefill(parts, 8, 9), *(decode(parts, t) for t in range(9, 13))]
    assert distance(torch.cat(got), expected) < FLOAT32
    assert distance(settled(parts, 13), whole["state"][1]) < FLOAT32
    assert distance(parts["state"][1], whole["state"][1]) > 1e-3, "the last change is not yet in the state"


def test_an_inactive_row_loses_nothing() -> None:
    given = arguments(6)
    whole, parts = copied(given), copied(given)
    expected = prefill(whole, 0, 6)
    got = []
    for t in range(6):
        got.append(decode(parts, t))
        delta_decode(**rows_of(parts, t, t + 1) | {"positions": int32(t + 1)}, active=int32(0))
    assert distance(torch.cat(got), expected) < FLOAT32


def test_a_new_text_in_a_used_slot() -> None:
    """Whatever the last text left pending, also at the same positions, is no part of the next."""
    given = arguments(5)
    fresh, used = copied(given), with_past(copied(given), [0, 4])
    expected = torch.cat([decode(fresh, t) for t in range(5)])
    assert distance(torch.cat([decode(used, t) for t in range(5)]), expected) < FLOAT32
    assert distance(prefill(with_past(copied(given), [0, 3]), 0, 5), expected) < FLOAT32


def test_inactive_rows_leave_their_states() -> None:
    given = with_past(arguments(3), [5, 1, 0])
    before = copied(given)
    y, _, _ = delta_decode(**given, active=int32(1, 0, 0))
    assert y[0].isfinite().all()
    for name in ("state", "conv_state", "pending"):
        assert torch.equal(given[name][1:].nan_to_num(7.0), before[name][1:].nan_to_num(7.0))
        assert not torch.equal(given[name][0], before[name][0])


def test_the_deferred_norm_is_the_norm() -> None:
    given = with_past(arguments(2, value_dim=32), [3, 0])
    expected, *empty = delta_decode(**copied(given))
    y, squares, scale = delta_decode(**given, form="rounded")
    assert all(tensor.numel() == 0 for tensor in empty)
    assert squares.shape == (2, 4, 4)
    norm = torch.rsqrt(squares.sum(-1, keepdim=True) / 32 + given["eps"])
    # Int8 is off by half a unit at most, 1/254 of the largest of 32, which is some three deviations.
    assert distance((y.view(2, 4, 32) * scale[..., None].view(2, 4, 1) * norm).flatten(1), expected) < 0.012


def test_tiled_heads_are_a_permutation() -> None:
    """With j % Hk for j // (Hv / Hk), value head r * Hk + i does what head i * (Hv / Hk) + r did."""
    given = arguments(6)
    expected = prefill(given, 0, 6).view(6, 4, 16)
    order = torch.tensor([0, 2, 1, 3])
    q_and_k = 2 * 2 * 16
    channels = torch.cat((torch.arange(q_and_k), q_and_k + (order[:, None] * 16 + torch.arange(16)).flatten()))
    columns = torch.cat((channels, channels[q_and_k:] + 4 * 16))
    moved = given | {
        "qkvz": given["qkvz"][:, columns].contiguous(),
        "conv_weight": given["conv_weight"][:, channels].contiguous(),
        "beta_alpha": given["beta_alpha"][torch.cat((order, 4 + order))].contiguous(),
        "a_log": given["a_log"][order],
        "dt_bias": given["dt_bias"][order],
    }
    slots, positions = int32(*[0] * 6), int32(*range(6))
    got = delta_prefill(**moved, slots=slots, positions=positions, tiled=True).view(6, 4, 16)
    assert distance(got, expected[:, order]) < FLOAT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_k_heads": 3}, "no multiple of 3 key heads"),
        ({"state": torch.zeros(3, 4, 16, 16, dtype=torch.float16)}, "float32 or bfloat16"),
        ({"conv_state": torch.zeros(3, 3, 128)}, r"conv_state \[3, 4, 128\]"),
        ({"pending": torch.zeros(3, 2, 4, 32)}, r"pending \[3, 2, 4, 33\]"),
        ({"h": torch.zeros(1, 24)}, r"contiguous h \[2, 24\]"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, r"slots \[2\] of int32"),
        ({"gate_norm": torch.zeros(16, device="meta")}, "gate_norm on meta"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    given = arguments(2) | {"slots": int32(0, 0), "positions": int32(0, 1)} | change
    with pytest.raises(KernelError, match=message):
        delta_prefill(**given)
    with pytest.raises(KernelError, match=message):
        delta_decode(**given)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("rounded", "the norm of value heads of a multiple of 32, got 8"),
        ("eights", "whole value heads of 128 by eight rows, got 8"),
        ("int8", "a form of plain, rounded, eights, got 'int8'"),
    ],
)
def test_forms_that_do_not_fit_are_refused(form: str, message: str) -> None:
    given = with_past(arguments(1, value_dim=8), [0])
    with pytest.raises(KernelError, match=message):
        delta_decode(**given, form=form)


@pytest.mark.parametrize("form", FORMS)
def test_results_without_data_look_like_the_references(form: str) -> None:
    given = with_past(arguments(2, value_dim=128, dtype=torch.bfloat16), [0, 0])
    shapes = []
    for device in ("cpu", "meta"):
        y, squares, scale = delta_decode(**copied(given, device), form=form)
        whole = delta_prefill(**copied(given, device))
        shapes.append([(t.shape, t.dtype) for t in (y, squares, scale, whole)])
    assert shapes[0] == shapes[1]
