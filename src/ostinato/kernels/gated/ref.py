"""Gated activations in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activate(gate: torch.Tensor, kind: str) -> torch.Tensor:
    """``silu`` or ``gelu_tanh`` of float32 values."""
    return F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")


def gated_activation_ref(gate_up: torch.Tensor, kind: str, out_dtype: torch.dtype) -> torch.Tensor:
    """act(gate) * up of [M, 2F], whose first F columns are the gate; computed in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (activate(gate, kind) * up).to(out_dtype)
