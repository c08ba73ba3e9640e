"""The host's side of the sampler: fills a slot's row before its first step, and reads the ring that steps write."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ostinato.errors import SamplingError
from ostinato.kernels.sample import SampleBuffers, sample_step
from ostinato.kernels.sample.buffers import MAX_STOP_IDS, NO_TOKEN, PROMPT_BIT
from ostinato.sampling.params import SamplingParams


@dataclass(frozen=True)
class Published:
    """What one step of one row put into the ring. token is None where the row was not active.

    top: the most likely tokens with their log-probabilities, in order, as many as the request asked for.
    """

    token: int | None
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SamplerState:
    """The sampler's device buffers, with the host's writes to them and its view of the ring.

    Writes go through pinned memory and never wait for the device; they are ordered on the current stream, so call them
    with the stream current that the steps run on. ``rows`` of the device buffers are the engine's slots.
    """

    def __init__(self, buffers: SampleBuffers) -> None:
        self.buffers = buffers
        self._ring: npt.NDArray[np.int64] = buffers.ring.numpy()
        self._top_ring: npt.NDArray[np.int64] = buffers.top_ring.numpy()
        self._num_top = [0] * buffers.max_batch

    @classmethod
    def allocate(cls, max_batch: int, vocab: int, device: torch.device | str) -> SamplerState:
        """State for ``max_batch`` slots, none of them active."""
        return cls(SampleBuffers.allocate(max_batch, vocab, device))

    @property
    def tokens(self) -> torch.Tensor:
        """int32 [max_batch]: the next input token of each slot, on the device."""
        return self.buffers.tokens

    @property
    def positions(self) -> torch.Tensor:
        """int32 [max_batch]: the position of that token, on the device."""
        return self.buffers.positions

    def set_row(self, row: int, params: SamplingParams, prompt_ids: Sequence[int], stop_ids: Sequence[int] = ()) -> int:
        """Make ``row`` ready for a new request; not yet active. Returns the seed, drawn here where params has none.

        prompt_ids: for the repetition penalty. stop_ids: at most 16 token ids that end the answer.
        Raises SamplingError.
        """
        b = self.buffers
        if len(stop_ids) > MAX_STOP_IDS:
            raise SamplingError(f"at most {MAX_STOP_IDS} stop token ids fit a row, got {len(stop_ids)}")
        beyond = [token for token in params.logit_bias if token >= b.vocab]
        if beyond:
            raise SamplingError(f"logit_bias: token id {beyond[0]} is beyond the vocabulary of {b.vocab}")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        p = params
        floats = (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        ints = (min(p.top_k, b.vocab), int(p.uses_penalties), int(bool(p.logit_bias)), p.logprobs or 0)
        self._write(b.floats[row], floats)
        self._write(b.ints[row], ints)
        self._write(b.seed[row : row + 1], (seed,))
        self._write(b.stop_ids[row], (*stop_ids, *(-1 for _ in range(MAX_STOP_IDS - len(stop_ids)))))
        b.counter[row : row + 1].zero_()
        self._num_top[row] = p.logprobs or 0
        if params.uses_penalties:
            counts = np.zeros(b.vocab, dtype=np.int32)
            counts[np.asarray(prompt_ids, dtype=np.int64)] = PROMPT_BIT
            self._copy(b.token_counts[row], torch.from_numpy(counts))
        if params.logit_bias:
            bias = np.zeros(b.vocab, dtype=np.float32)
            bias[list(params.logit_bias)] = list(params.logit_bias.values())
            self._copy(b.logit_bias[row], torch.from_numpy(bias))
        return seed

    def activate(self, row: int, token: int, position: int, remaining: int) -> None:
        """Let ``row`` draw ``remaining`` tokens; its next input is ``token`` at ``position``."""
        for tensor, value in (
            (self.buffers.tokens, token),
            (self.buffers.positions, position),
            (self.buffers.remaining, remaining),
            (self.buffers.active, 1),
        ):
            tensor[row : row + 1].fill_(value)

    def deactivate(self, row: int) -> None:
        """Stop ``row``, for instance when its request is cancelled."""
        self.buffers.active[row : row + 1].zero_()

    def step(self, logits: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """``sample_step`` on these buffers."""
        sample_step(logits, self.buffers, rows)

    def read(self, row: int, step: int) -> Published | None:
        """What the ``step``-th step of ``row`` (0 is its first since allocation) published; None if not yet there.

        Reads host memory only. Steps are kept for the last ``RING_STEPS`` steps; an older one raises SamplingError.
        """
        entry = self._ring[step % self._ring.shape[0], row]
        token, logprob = int(entry[0]), int(entry[1])
        stamp = min(token >> 32, logprob >> 32)
        if stamp > step + 1:
            raise SamplingError(f"step {step} of row {row} was overwritten by step {stamp - 1}: read the ring sooner")
        if stamp < step + 1:
            return None
        value = token & NO_TOKEN
        if value == NO_TOKEN:
            return Published(None, 0.0)
        top: tuple[tuple[int, float], ...] = ()
        if self._num_top[row]:
            # The kernel writes these after the token; each word has its own stamp.
            words = self._top_ring[step % self._ring.shape[0], row, : self._num_top[row]].copy()
            if int((words >> 32).min()) < step + 1:
                return None
            lower = (words & NO_TOKEN).astype(np.uint32)
            top = tuple(zip(lower[:, 0].tolist(), lower[:, 1].copy().view(np.float32).tolist(), strict=True))
        return Published(value, float(np.uint32(logprob & NO_TOKEN).view(np.float32)), top)

    def _write(self, target: torch.Tensor, values: Sequence[float]) -> None:
        self._copy(target, torch.tensor(values, dtype=target.dtype))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy without a wait. PyTorch keeps the pinned memory until the copy has run."""
        if target.is_cuda:
            source = source.pin_memory()
        target.copy_(source, non_blocking=True)
