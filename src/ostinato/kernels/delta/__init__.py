"""The gated delta rule with all that surrounds it: convolution, SiLU, L2 norms, gates, state, gated norm."""

from __future__ import annotations

import torch

from ostinato.errors import KernelError
from ostinato.kernels.block_linear.eights import SPAN
from ostinato.kernels.delta.ref import FORMS, PARTS, delta_decode_ref, delta_prefill_ref
from ostinato.kernels.registry import register

__all__ = ["delta_decode", "delta_prefill"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.bfloat16)


def delta_decode(
    qkvz: torch.Tensor,
    h: torch.Tensor,
    norm: torch.Tensor,
    norm_eps: float,
    beta_alpha: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    gate_norm: torch.Tensor,
    eps: float,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    pending: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    active: torch.Tensor | None = None,
    *,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool = False,
    form: str = "plain",
    gates: torch.Tensor | None = None,
    prefetch: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of each row's slot, in one kernel; conv_state, state and pending are written in place at ``slots``.

    qkvz: [M, 2 Hk Dk + 2 Hv Dv] floats, q | k | v | z of the input projection. h: float32 [M, H], the residual stream,
    whose rms_norm(h, norm, norm_eps) times beta_alpha ([2 Hv, H]: b rows, then a rows) gives the gates.
    conv_weight: float32 [W, C] over the channels of q | k | v, the oldest tap first.
    a_log, dt_bias: float32 [Hv]. gate_norm: float32 [Dv].
    conv_state: float32 [S, W, C], a ring: entry p % W holds the inputs at position p.
    state: float32 or bfloat16 [S, Hv, Dk, Dv].
    pending: float32 [S, 2, Hv, Dk + Dv + 1]; entry p % 2 holds key | change | decay of the token at position p. What p
    tokens leave is state * decay + key changeᵀ with entry (p - 1) % 2: the call for position p writes that to
    ``state``, and its own change to ``pending``.
    slots, positions: int32 [M]. A row at position 0 starts from nothing, whatever its states hold. active: int32 [M]; a
    row of 0 leaves its states alone, and its result means nothing. No two active rows may share a slot. Value head j
    takes key head j // (Hv / Hk), or j % Hk if ``tiled``.

    Returns (y, squares, scale) in a form that the next product takes:
    ``plain``: y [M, Hv Dv] in qkvz's dtype is rms_norm(o, gate_norm, eps) * silu(z); the others are empty.
    ``rounded`` (Dv a multiple of 32), for ``int8_linear``: y is o * gate_norm * silu(z) as int8 with scale float32
    [M, Hv Dv / 32]. The norm is deferred, so that several programs may share a head: squares float32 [M, Hv, 4] has
    parts of the sum of o² of a head, and ``int8_linear`` multiplies by rsqrt(squares.sum(-1) / Dv + eps).
    ``eights`` (Dv = 128), for ``eights_linear``: the plain y as int8 by eight rows, its factors in place of scale.
    gates: float32 [M, 2 Hv], rms_norm(h, norm, norm_eps) · beta_alpha where somebody has it already; h, norm and
    beta_alpha are then not read.
    prefetch: a promise that no kernel has read or written the states, or written slots, positions or active, since the
    last full dependency of the stream (the start of a step); the kernel then reads them all and writes ``state`` while
    the one before it still runs.
    Raises KernelError.
    """
    _check(
        "delta_decode", qkvz, h, norm, beta_alpha, conv_weight, a_log, dt_bias, gate_norm, conv_state, state,
        pending, slots, positions, active, num_k_heads, num_v_heads,
    )  # fmt: skip
    if gates is not None and (
        gates.shape != (qkvz.shape[0], 2 * num_v_heads)
        or gates.dtype != torch.float32
        or not gates.is_contiguous()
        or gates.device != qkvz.device
    ):
        raise KernelError(
            f"delta_decode takes contiguous gates float32 [{qkvz.shape[0]}, {2 * num_v_heads}] on {qkvz.device}, got"
            f" {list(gates.shape)} {gates.dtype} on {gates.device}"
        )
    if form not in FORMS:
        raise KernelError(f"delta_decode returns y in a form of {', '.join(FORMS)}, got {form!r}")
    if form == "rounded" and state.shape[3] % 32:
        raise KernelError(f"delta_decode defers the norm of value heads of a multiple of 32, got {state.shape[3]}")
    if form == "eights" and state.shape[3] != SPAN:
        raise KernelError(f"delta_decode rounds whole value heads of {SPAN} by eight rows, got {state.shape[3]}")
    values = (
        qkvz, h, norm, norm_eps, beta_alpha, conv_weight, a_log, dt_bias, gate_norm, eps, conv_state, state,
        pending, slots, positions, active, num_k_heads, num_v_heads, tiled, form, gates,
    )  # fmt: skip
    if qkvz.device.type == "cpu":
        return delta_decode_ref(*values)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _delta_decode(*values, prefetch)
    return result


def delta_prefill(
    qkvz: torch.Tensor,
    h: torch.Tensor,
    norm: torch.Tensor,
    norm_eps: float,
    beta_alpha: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    gate_norm: torch.Tensor,
    eps: float,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    pending: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool = False,
) -> torch.Tensor:
    """T consecutive tokens of one slot, by chunks; arguments as for ``delta_decode``, with T for M.

    slots and positions: int32 [T]; the first of each is read. Starts from the slot's states, or from nothing where
    positions[0] is 0, and leaves them as T calls of ``delta_decode`` would, but with nothing pending: all of it is in
    ``state``. Returns y [T, Hv Dv] in qkvz's dtype.
    Raises KernelError.
    """
    _check(
        "delta_prefill", qkvz, h, norm, beta_alpha, conv_weight, a_log, dt_bias, gate_norm, conv_state, state,
        pending, slots, positions, None, num_k_heads, num_v_heads,
    )  # fmt: skip
    values = (
        qkvz, h, norm, norm_eps, beta_alpha, conv_weight, a_log, dt_bias, gate_norm, eps, conv_state, state,
        pending, slots, positions, num_k_heads, num_v_heads, tiled,
    )  # fmt: skip
    if qkvz.device.type == "cpu":
        return delta_prefill_ref(*values)
    result: torch.Tensor = _delta_prefill(*values)
    return result


def _check(
    op: str,
    qkvz: torch.Tensor,
    h: torch.Tensor,
    norm: torch.Tensor,
    beta_alpha: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    gate_norm: torch.Tensor,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    pending: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    active: torch.Tensor | None,
    num_k_heads: int,
    num_v_heads: int,
) -> None:
    """Raise KernelError unless the arguments fit each other."""
    if num_k_heads < 1 or num_v_heads < 1 or num_v_heads % num_k_heads:
        raise KernelError(f"{op}: {num_v_heads} value heads are no multiple of {num_k_heads} key heads")
    if state.dim() != 4 or state.shape[1] != num_v_heads or state.dtype not in STATES:
        raise KernelError(
            f"{op} takes state [slots, {num_v_heads}, Dk, Dv] of float32 or bfloat16, got {tuple(state.shape)}"
            f" {state.dtype}"
        )
    num_slots, _, key_dim, value_dim = state.shape
    channels = 2 * num_k_heads * key_dim + num_v_heads * value_dim
    if qkvz.dim() != 2 or qkvz.shape[0] < 1 or h.dim() != 2 or conv_weight.dim() != 2:
        raise KernelError(
            f"{op} takes qkvz and h of at least one row and a conv_weight of two dimensions, got"
            f" {tuple(qkvz.shape)}, {tuple(h.shape)} and {tuple(conv_weight.shape)}"
        )
    rows, hidden, width = qkvz.shape[0], h.shape[1], conv_weight.shape[0]
    float32 = (torch.float32,)
    expected = {
        "qkvz": (qkvz, (rows, channels + num_v_heads * value_dim), FLOATS),
        "h": (h, (rows, hidden), float32),
        "norm": (norm, (hidden,), float32),
        "beta_alpha": (beta_alpha, (2 * num_v_heads, hidden), FLOATS),
        "conv_weight": (conv_weight, (width, channels), float32),
        "a_log": (a_log, (num_v_heads,), float32),
        "dt_bias": (dt_bias, (num_v_heads,), float32),
        "gate_norm": (gate_norm, (value_dim,), float32),
        "conv_state": (conv_state, (num_slots, width, channels), float32),
        "state": (state, tuple(state.shape), STATES),
        "pending": (pending, (num_slots, 2, num_v_heads, key_dim + value_dim + 1), float32),
        "slots": (slots, (rows,), (torch.int32,)),
        "positions": (positions, (rows,), (torch.int32,)),
    }
    if active is not None:
        expected["active"] = (active, (rows,), (torch.int32,))
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise KernelError(
                f"{op} takes a contiguous {name} {list(shape)} of {' or '.join(str(d)[6:] for d in dtypes)}, got"
                f" {list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
            )
        if tensor.device != qkvz.device:
            raise KernelError(f"{op}: qkvz is on {qkvz.device} and {name} on {tensor.device}: move them to one device")


def _decode_cpu(*values: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return delta_decode_ref(*values[:-1])  # type: ignore[arg-type]  # the schema holds the types


def _decode_fake(qkvz: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    state, num_v_heads, form = rest[10], rest[16], rest[18]
    assert isinstance(state, torch.Tensor)
    assert isinstance(num_v_heads, int)
    rows, columns = qkvz.shape[0], num_v_heads * state.shape[3]
    if form == "eights":
        shape = ((rows + 7) // 8, num_v_heads)
        factors = qkvz.new_empty((*shape, 8, 2), dtype=torch.float32)
        return qkvz.new_empty((*shape, 8 * SPAN), dtype=torch.int8), factors.new_empty(0), factors
    rounded = form == "rounded"
    y = qkvz.new_empty((rows, columns), dtype=torch.int8 if rounded else qkvz.dtype)
    squares = qkvz.new_empty((rows, num_v_heads, PARTS) if rounded else (0,), dtype=torch.float32)
    return y, squares, qkvz.new_empty((rows, columns // 32) if rounded else (0,), dtype=torch.float32)


def _prefill_fake(qkvz: torch.Tensor, *rest: object) -> torch.Tensor:
    state = rest[10]
    assert isinstance(state, torch.Tensor)
    return qkvz.new_empty((qkvz.shape[0], state.shape[1] * state.shape[3]))


_ARGUMENTS = (
    "Tensor qkvz, Tensor h, Tensor norm, float norm_eps, Tensor beta_alpha, Tensor conv_weight, Tensor a_log,"
    " Tensor dt_bias, Tensor gate_norm, float eps, Tensor(a!) conv_state, Tensor(b!) state,"
    " Tensor(c!) pending, Tensor slots, Tensor positions"
)
_delta_decode = register(
    f"delta_decode({_ARGUMENTS}, Tensor? active, int num_k_heads, int num_v_heads, bool tiled, str form,"
    " Tensor? gates, bool prefetch) -> (Tensor, Tensor, Tensor)",
    reference=_decode_cpu,
    kernel="ostinato.kernels.delta.decode.triton:delta_decode",
    fake=_decode_fake,
)
_delta_prefill = register(
    f"delta_prefill({_ARGUMENTS}, int num_k_heads, int num_v_heads, bool tiled) -> Tensor",
    reference=delta_prefill_ref,
    kernel="ostinato.kernels.delta.prefill.triton:delta_prefill",
    fake=_prefill_fake,
)
