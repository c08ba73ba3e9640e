"""The gated delta rule of Qwen3-Next and Qwen3.5, one token after the other, in plain PyTorch: the truth.

Source: "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), with the convolution, norms and
gates as ``Qwen3_5MoeGatedDeltaNet`` of transformers has them. Everything is float32.

A decoded token leaves the state as it found it and its own change beside it, which the next token's call adds first: so
the kernel has no state to write while the next kernel waits for its result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ostinato.kernels.block_linear.eights import SPAN, by_eights
from ostinato.kernels.rms_norm.ref import quantize_rows_ref, rms_norm_ref

L2_EPS = 1e-6  # added to the sum of squares of a query or key before its root
FORMS = ("plain", "rounded", "eights")  # of what ``delta_decode`` returns
PARTS = 4  # the programs that may share a head, each with its sum of squares


def delta_decode_ref(
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
    active: torch.Tensor | None,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
    form: str = "plain",
    gates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``delta_decode`` means: each row is the next token of its own slot."""
    beta, decay = gates_ref(h, norm, norm_eps, beta_alpha, a_log, dt_bias, gates)
    rows = []
    for m, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        runs = active is None or bool(active[m])
        conv, matrix, changes = conv_state[slot], state[slot], pending[slot]
        if not runs:  # computed all the same, on copies
            conv, matrix, changes = conv.clone(), matrix.clone(), changes.clone()
        x = convolve_ref(qkvz[m : m + 1], conv_weight, conv, position)
        before = settled_ref(matrix, changes, position)
        o, _, last = recurrence_ref(x, beta[m : m + 1], decay[m : m + 1], before, num_k_heads, num_v_heads, tiled)
        matrix.copy_(before)
        changes[position % 2] = last
        rows.append(o)
    o = torch.cat(rows)
    gate = F.silu(qkvz[:, conv_weight.shape[1] :].float()).view_as(o)
    if form == "rounded":
        squares = o.new_zeros(*o.shape[:2], PARTS)
        squares[..., 0] = o.square().sum(-1)
        y, scale = quantize_rows_ref((o * gate_norm * gate).flatten(1))
        return y, squares, scale
    y = (rms_norm_ref(o, gate_norm, eps, torch.float32) * gate).flatten(1)
    if form == "eights":
        y, factors = by_eights(*quantize_rows_ref(y, SPAN))
        return y, o.new_empty(0), factors
    return y.to(qkvz.dtype), o.new_empty(0), o.new_empty(0)


def delta_prefill_ref(
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
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
) -> torch.Tensor:
    """What ``delta_prefill`` means: the rows are consecutive tokens of one slot."""
    beta, decay = gates_ref(h, norm, norm_eps, beta_alpha, a_log, dt_bias)
    slot, position = int(slots[0]), int(positions[0])
    x = convolve_ref(qkvz, conv_weight, conv_state[slot], position)
    before = settled_ref(state[slot], pending[slot], position)
    o, after, _ = recurrence_ref(x, beta, decay, before, num_k_heads, num_v_heads, tiled)
    state[slot].copy_(after)
    nothing = pending[slot, (position + len(h) - 1) % 2]  # the state has it all
    nothing[:, :-1] = 0.0
    nothing[:, -1] = 1.0
    gate = F.silu(qkvz[:, conv_weight.shape[1] :].float()).view_as(o)
    return (rms_norm_ref(o, gate_norm, eps, torch.float32) * gate).flatten(1).to(qkvz.dtype)


def gates_ref(
    h: torch.Tensor,
    norm: torch.Tensor,
    norm_eps: float,
    beta_alpha: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(beta, g), each [M, Hv]: how much of a value is written, and the logarithm of what remains of the state.

    logits: [M, 2 Hv] if they are known already.
    """
    if logits is None:
        logits = rms_norm_ref(h, norm, norm_eps, torch.float32) @ beta_alpha.float().T
    b, a = logits.chunk(2, dim=1)
    return torch.sigmoid(b), -torch.exp(a_log) * F.softplus(a + dt_bias)


def convolve_ref(qkvz: torch.Tensor, conv_weight: torch.Tensor, ring: torch.Tensor, position: int) -> torch.Tensor:
    """SiLU of the causal convolution of q | k | v, [T, C]; T consecutive tokens from ``position`` on.

    ring: [W, C], written in place: entry p % W holds the inputs at position p.
    """
    width, channels = conv_weight.shape
    x = qkvz[:, :channels].float()
    past = [p for p in range(position - width + 1, position) if p >= 0]
    known = torch.cat((x.new_zeros(width - 1 - len(past), channels), ring[[p % width for p in past]], x))
    for row in range(max(len(x) - width, 0), len(x)):
        ring[(position + row) % width] = x[row]
    return F.silu(sum(known[t : t + len(x)] * conv_weight[t] for t in range(width)))  # type: ignore[arg-type]  # no int


def settled_ref(state: torch.Tensor, pending: torch.Tensor, position: int) -> torch.Tensor:
    """The state before ``position``, float32 [Hv, Dk, Dv], of one slot's state and pending changes."""
    key_dim, value_dim = state.shape[1:]
    if not position:
        return torch.zeros_like(state, dtype=torch.float32)
    key, change, decay = torch.split(pending[(position - 1) % 2], [key_dim, value_dim, 1], dim=1)
    return state.float() * decay[:, :, None] + key[:, :, None] * change[:, None, :]


def recurrence_ref(
    x: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor,
    matrix: torch.Tensor,
    num_k_heads: int,
    num_v_heads: int,
    tiled: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The delta rule over x [T, C] from ``matrix`` float32 [Hv, Dk, Dv] on.

    Returns o [T, Hv, Dv], the matrix after the last token, and what that token did to it: key | change | decay,
    [Hv, Dk + Dv + 1].
    """
    key_dim, value_dim = matrix.shape[1:]
    q, k, v = torch.split(x, [num_k_heads * key_dim, num_k_heads * key_dim, num_v_heads * value_dim], dim=1)
    q, k = (_unit(part.view(len(x), num_k_heads, key_dim)) for part in (q, k))
    repeats = num_v_heads // num_k_heads
    q, k = (part.repeat(1, repeats, 1) if tiled else part.repeat_interleave(repeats, 1) for part in (q, k))
    q, v = q * key_dim**-0.5, v.view(len(x), num_v_heads, value_dim)
    out = torch.empty_like(v)
    last = x.new_empty(0)
    for t in range(len(x)):
        kept = decay[t].exp()
        matrix = matrix * kept[:, None, None]
        change = (v[t] - torch.einsum("hkv,hk->hv", matrix, k[t])) * beta[t][:, None]
        matrix = matrix + k[t][:, :, None] * change[:, None, :]
        out[t] = torch.einsum("hkv,hk->hv", matrix, q[t])
        last = torch.cat((k[t], change, kept[:, None]), 1)
    return out, matrix, last


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
