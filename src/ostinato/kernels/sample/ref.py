"""The sampler in plain PyTorch and NumPy: ``choose_ref`` is the truth, ``choose`` what a CPU runs, with equal results.

Order: bias, repetition, frequency and presence penalty, temperature, top-k, top-p, min-p, then argmax of value plus
Gumbel noise. Every filter is a threshold on the value, so tokens of equal value stay or go together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ostinato.kernels.sample import buffers as columns
from ostinato.kernels.sample.buffers import GREEDY_BELOW, SampleBuffers
from ostinato.kernels.sample.noise import GUMBEL_MAX, GUMBEL_MIN, gumbel

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowSettings:
    """One row of ``SampleBuffers.floats`` and ``ints`` as numbers, with the row's seed and counter."""

    temperature: float
    top_p: float
    min_p: float
    repetition: float
    presence: float
    frequency: float
    top_k: int
    seed: int
    counter: int


def penalize_ref(
    logits: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor | None, row: RowSettings
) -> torch.Tensor:
    """Bias and penalties of one row: logits [V] float32, bias [V] or None, counts int32 [V] or None."""
    if bias is not None:
        logits = logits + bias
    if counts is not None:
        generated = (counts & columns.COUNT_MASK).float()
        repeated = torch.where(logits > 0, logits / row.repetition, logits * row.repetition)
        logits = torch.where(counts != 0, repeated, logits)
        logits = logits - row.frequency * generated - row.presence * (generated > 0).float()
    return logits


def choose_ref(logits: Floats, row: RowSettings) -> int:
    """The token for penalized logits [V]: noise for every token, a full sort for top-p."""
    if row.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    values = logits / np.float32(row.temperature)
    keep = np.ones(len(values), dtype=bool)
    if 0 < row.top_k < len(values):
        keep &= values >= np.sort(values)[-row.top_k]
    if row.top_p < 1.0:
        keep &= values >= _top_p_threshold(values[keep], values.max(), row.top_p)
    if row.min_p > 0.0:
        keep &= values >= values.max() + np.float32(math.log(row.min_p))
    noisy = values + gumbel(row.seed, row.counter, np.arange(len(values)))
    return int(np.where(keep, noisy, -np.inf).argmax())


def _top_p_threshold(values: Floats, largest: np.float32, top_p: float, total: float | None = None) -> np.float32:
    """The smallest value in the smallest set of largest values whose mass reaches top_p of ``total`` (default: all)."""
    descending = -np.sort(-values)
    mass = np.cumsum(np.exp(descending - largest), dtype=np.float64)
    reached = int(np.searchsorted(mass, top_p * (mass[-1] if total is None else total)))
    return np.float32(descending[min(reached, len(descending) - 1)])


def choose(logits: Floats, row: RowSettings) -> int:
    """``choose_ref`` without work for tokens that cannot win: the noise is bounded, and so is what top-p can keep."""
    if row.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    temperature = np.float32(row.temperature)
    top_logit = logits.max()
    largest = np.float32(top_logit / temperature)
    filtered = row.min_p > 0.0 or row.top_p < 1.0 or 0 < row.top_k < len(logits)
    # How far under the largest value a winner can be; one more than needed, so that no rounding below can drop it.
    reach = GUMBEL_MAX - GUMBEL_MIN + 1.0
    if row.min_p > 0.0:
        reach = min(reach, 1.0 - math.log(row.min_p))
    elif not filtered:
        strong = np.flatnonzero(logits >= top_logit - temperature)  # a few draws tell more
        drawn = logits[strong] / temperature + gumbel(row.seed, row.counter, strong)
        reach = GUMBEL_MAX + 0.1 + float(largest - drawn.max())
    threshold = np.float32(-np.inf)
    total = None
    if 0 < row.top_k < len(logits):
        kth = torch.from_numpy(logits).topk(row.top_k, sorted=False).values.min().item()
        threshold = np.float32(np.float32(kth) / temperature)
        lowest = kth - 1e-6 * abs(kth)  # a smaller logit may round to an equal value
        if row.top_p == 1.0:
            lowest = max(lowest, top_logit - reach * temperature)
    elif row.top_p < 1.0:
        total = float(np.exp(logits / temperature - largest).sum(dtype=np.float64))
        # All tokens under this share together weigh less than 1 - top_p.
        share = total * (1.0 - row.top_p) / len(logits)
        lowest = top_logit + (math.log(share) - 1.0) * temperature if share > 0 else -np.inf
    else:
        lowest = top_logit - reach * temperature
    tokens: npt.NDArray[np.intp] = np.flatnonzero(logits >= lowest)
    values = logits[tokens] / temperature
    if filtered:
        keep = values >= threshold
        if row.top_p < 1.0:
            keep &= values >= _top_p_threshold(values[keep], largest, row.top_p, total)
        if row.min_p > 0.0:
            keep &= values >= largest + np.float32(math.log(row.min_p))
        tokens, values = tokens[keep], values[keep]
    if filtered and len(tokens) > 1024:
        likely = values >= largest - np.float32(2.0)
        drawn = values[likely] + gumbel(row.seed, row.counter, tokens[likely])
        near = values >= drawn.max() - np.float32(GUMBEL_MAX + 0.1)
        tokens, values = tokens[near], values[near]
    return int(tokens[(values + gumbel(row.seed, row.counter, tokens)).argmax()])


def sample_step_ref(logits: torch.Tensor, rows: torch.Tensor | None, *tensors: torch.Tensor) -> None:
    """One step of the sampler on the CPU; ``tensors`` are those of a SampleBuffers, updated in place."""
    state = SampleBuffers(*tensors)
    for b, slot in enumerate(range(logits.shape[0]) if rows is None else rows.tolist()):
        _sample_row(logits[b], state, slot)


def _sample_row(logits: torch.Tensor, state: SampleBuffers, slot: int) -> None:
    step = int(state.step[slot])
    state.step[slot] = step + 1
    published = state.ring[step % state.ring.shape[0], slot].numpy()
    if not int(state.active[slot]):
        state.sampled[slot] = -1
        published[0] = (step + 1) << 32 | columns.NO_TOKEN
        published[1] = (step + 1) << 32
        return
    top_k, use_counts, use_bias, num_logprobs = state.ints[slot].tolist()
    counter = int(state.counter[slot])
    row = RowSettings(*(*state.floats[slot].tolist(), top_k, int(state.seed[slot]), counter))
    counts = state.token_counts[slot] if use_counts else None
    penalized = penalize_ref(logits, state.logit_bias[slot] if use_bias else None, counts, row)
    token = choose(penalized.numpy(), row)

    normalizer = logits.logsumexp(0)
    logprob = logits[token] - normalizer
    if num_logprobs:
        best, ids = logits.sort(descending=True, stable=True)
        top = state.top_ring[step % state.top_ring.shape[0], slot, :num_logprobs]
        top[:, 0] = (step + 1) << 32 | ids[:num_logprobs]
        top[:, 1] = (step + 1) << 32 | (best[:num_logprobs] - normalizer).view(torch.int32).long() & 0xFFFFFFFF
    state.sampled[slot] = token
    state.logprob[slot] = logprob
    published[0] = (step + 1) << 32 | token
    published[1] = (step + 1) << 32 | int(logprob.view(torch.int32)) & 0xFFFFFFFF
    _advance(state, slot, token, counter)


def _advance(state: SampleBuffers, slot: int, token: int, counter: int) -> None:
    """Make the token the next input, and stop the row at a stop id or at its last allowed token."""
    state.tokens[slot] = token
    state.positions[slot] += 1
    state.counter[slot] = counter + 1
    if int(state.ints[slot, columns.USE_COUNTS]):
        state.token_counts[slot, token] += 1
    remaining = int(state.remaining[slot]) - 1
    state.remaining[slot] = remaining
    if remaining <= 0 or token in state.stop_ids[slot].tolist():
        state.active[slot] = 0
