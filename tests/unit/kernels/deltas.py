"""Random arguments of the delta ops."""

import torch

from ostinato.kernels.delta.ref import delta_decode_ref, delta_prefill_ref, settled_ref


def arguments(
    rows: int,
    key_heads: int = 2,
    value_heads: int = 4,
    key_dim: int = 16,
    value_dim: int = 16,
    hidden: int = 24,
    width: int = 4,
    num_slots: int = 3,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
) -> dict:
    """Everything but slots, positions and active; the states are poisoned with NaN."""
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return {
        "qkvz": torch.randn(rows, channels + value_heads * value_dim).to(dtype),
        "h": torch.randn(rows, hidden) * 3.0,
        "norm": torch.rand(hidden) + 0.5,
        "norm_eps": 1e-6,
        "beta_alpha": (torch.randn(2 * value_heads, hidden) * hidden**-0.5).to(dtype),
        "conv_weight": torch.randn(width, channels) * 0.5,
        "a_log": torch.empty(value_heads).uniform_(0.01, 4).log(),
        "dt_bias": torch.randn(value_heads),
        "gate_norm": torch.rand(value_dim) + 0.5,
        "eps": 1e-6,
        "conv_state": torch.full((num_slots, width, channels), torch.nan),
        "state": torch.full((num_slots, value_heads, key_dim, value_dim), torch.nan, dtype=state_dtype),
        "pending": torch.full((num_slots, 2, value_heads, key_dim + value_dim + 1), torch.nan),
        "num_k_heads": key_heads,
        "num_v_heads": value_heads,
    }


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_past(given: dict, positions: list[int]) -> dict:
    """``given`` where slot i holds the states after positions[i] random tokens, of which the last is still pending.

    slots = 0, 1, …
    """
    for slot, position in enumerate(positions):
        if position:
            past = arguments(
                position, given["num_k_heads"], given["num_v_heads"], *given["state"].shape[2:], given["h"].shape[1],
                given["conv_weight"].shape[0], dtype=given["qkvz"].dtype,
            )  # fmt: skip
            filled = given | {"qkvz": past["qkvz"], "h": past["h"]}
            if position > 1:
                delta_prefill_ref(**rows_of(filled, 0, position - 1, slot), tiled=False)
            delta_decode_ref(**rows_of(filled, position - 1, position, slot), active=None, tiled=False)
    return given | {"slots": int32(*range(len(positions))), "positions": int32(*positions)}


def rows_of(given: dict, first: int, stop: int, slot: int = 1) -> dict:
    """The rows first … stop - 1 of ``given``, at these positions of a slot."""
    rows = {name: given[name][first:stop] for name in ("qkvz", "h")}
    place = {"slots": int32(*[slot] * (stop - first)), "positions": int32(*range(first, stop))}
    return given | rows | {name: v.to(given["h"].device) for name, v in place.items()}


def settled(given: dict, position: int, slot: int = 1) -> torch.Tensor:
    """The state of a slot before ``position``, with what is pending."""
    return settled_ref(given["state"][slot], given["pending"][slot], position)


def copied(given: dict, device: torch.device | str = "cpu") -> dict:
    return {name: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v for name, v in given.items()}


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative distance of two tensors; NaN or infinity anywhere fails."""
    assert got.isfinite().all()
    norm = expected.cpu().double().norm().clamp_min(1e-30)  # a state before its first token is zeros
    return float((got.cpu().double() - expected.cpu().double()).norm() / norm)
