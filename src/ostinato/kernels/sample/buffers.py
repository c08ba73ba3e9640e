"""What the sampler reads and advances: static device tensors, one row per slot."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

MAX_STOP_IDS = 16
MAX_LOGPROBS = 20
RING_STEPS = 64
GREEDY_BELOW = 1e-5  # temperatures under this one mean argmax
PROMPT_BIT = 1 << 24  # set in token_counts where the token occurs in the prompt
COUNT_MASK = PROMPT_BIT - 1  # times generated
NO_TOKEN = 0xFFFFFFFF  # what a row that is not active publishes

# Columns of ``floats`` and ``ints``.
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, NUM_FLOATS = range(7)
TOP_K, USE_COUNTS, USE_BIAS, NUM_LOGPROBS, NUM_INTS = range(5)


@dataclass(frozen=True, eq=False)
class SampleBuffers:
    """The sampler's state for S slots and V tokens.

    Set by the host between steps:
    floats: float32 [S, 6], temperature, top_p, min_p, repetition, presence and frequency penalty.
    ints: int32 [S, 4], top_k (0: off), whether penalties need counts, whether a bias is set, top log-probs wanted.
    seed: int64 [S]. stop_ids: int32 [S, 16], -1 where unused. logit_bias: float32 [S, V].

    Advanced by each step, for active rows:
    counter: int32 [S], tokens drawn for the request so far; the noise depends on seed, counter and token alone.
    token_counts: int32 [S, V], times generated, plus PROMPT_BIT where the token occurs in the prompt.
    tokens, positions: int32 [S], the next input token and its position.
    remaining: int32 [S], tokens still allowed. active: int32 [S], 1 until a stop id or the last allowed token.

    Written by each step:
    step: int32 [S], steps of the row, active or not. sampled: int32 [S], -1 where not active. logprob: float32 [S],
    log softmax of the untouched logits.
    ring: int64 [R, S, 2] in memory that the host can read without a CUDA call (pinned where there is a GPU): at
    ``step % R``, ``(step + 1) << 32`` or'ed with the token (NO_TOKEN where not active), then with the log-prob's bits.
    top_ring: int64 [R, S, 20, 2], likewise: the most likely tokens in order, as many as were asked for.
    """

    floats: torch.Tensor
    ints: torch.Tensor
    seed: torch.Tensor
    stop_ids: torch.Tensor
    logit_bias: torch.Tensor
    counter: torch.Tensor
    token_counts: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    remaining: torch.Tensor
    active: torch.Tensor
    step: torch.Tensor
    sampled: torch.Tensor
    logprob: torch.Tensor
    ring: torch.Tensor
    top_ring: torch.Tensor

    @classmethod
    def allocate(cls, max_batch: int, vocab: int, device: torch.device | str) -> SampleBuffers:
        """Buffers for ``max_batch`` slots, none active, greedy; about 8 * max_batch * vocab bytes."""
        device = torch.device(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def published(*shape: int) -> torch.Tensor:
            pinned = device.type == "cuda"
            return torch.zeros((RING_STEPS, max_batch, *shape), dtype=torch.int64, pin_memory=pinned)

        floats = zeros(max_batch, NUM_FLOATS, dtype=torch.float32)
        floats[:, TOP_P] = 1.0
        floats[:, REPETITION] = 1.0
        return cls(
            floats=floats,
            ints=zeros(max_batch, NUM_INTS),
            seed=zeros(max_batch, dtype=torch.int64),
            stop_ids=zeros(max_batch, MAX_STOP_IDS) - 1,
            logit_bias=zeros(max_batch, vocab, dtype=torch.float32),
            counter=zeros(max_batch),
            token_counts=zeros(max_batch, vocab),
            tokens=zeros(max_batch),
            positions=zeros(max_batch),
            remaining=zeros(max_batch),
            active=zeros(max_batch),
            step=zeros(max_batch),
            sampled=zeros(max_batch) - 1,
            logprob=zeros(max_batch, dtype=torch.float32),
            ring=published(2),
            top_ring=published(MAX_LOGPROBS, 2),
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def vocab(self) -> int:
        return self.logit_bias.shape[1]

    @property
    def max_batch(self) -> int:
        return self.seed.shape[0]
