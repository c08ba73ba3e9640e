"""The gated activation between the two products of a feed-forward block."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.gated.ref import gated_activation_ref
from ostinato.kernels.registry import register

__all__ = ["GATES", "gated_activation"]

GATES = ("silu", "gelu_tanh")


def gated_activation(gate_up: torch.Tensor, kind: str, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """act(gate) * up, computed in float32.

    gate_up: [M, 2F] float32, bfloat16 or float16, contiguous: F columns of gate, then F of up.
    kind: ``silu`` or ``gelu_tanh``. Returns [M, F] of ``out_dtype`` (default: gate_up's). Raises KernelError.
    """
    if kind not in GATES:
        raise KernelError(f"unknown gated activation {kind!r}: choose one of {', '.join(GATES)}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous() or not gate_up.is_floating_point():
        raise KernelError(
            f"gated_activation takes contiguous floats [M, 2F], got {tuple(gate_up.shape)} {gate_up.dtype}"
        )
    dtype = gate_up.dtype if out_dtype is None else out_dtype
    if gate_up.device.type == "cpu":
        return gated_activation_ref(gate_up, kind, dtype)
    result: torch.Tensor = _gated_activation(gate_up, kind, dtype)
    return result


_gated_activation = register(
    "gated_activation(Tensor gate_up, str kind, ScalarType out_dtype) -> Tensor",
    reference=gated_activation_ref,
    kernel="ostinato.kernels.gated.triton:gated_activation",
    fake=lambda gate_up, kind, dtype: gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=dtype),
)
