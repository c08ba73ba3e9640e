"""A request and what comes back for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ostinato.sampling import SamplingParams


@dataclass(frozen=True, eq=False)
class Request:
    """prompt: token ids, at least one. stop_ids: tokens that end the answer (they are returned as its last token)."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine. Only the scheduler writes to it.

    slot: row of the batch, -1 while queued. num_cached: leading prompt tokens whose KV the slot already held.
    prefilled: prompt tokens whose KV stands. limit: tokens that it may draw. launched: tokens asked of the device;
    tokens: those that came back. keeps_slot: slot and KV outlive the answer.
    """

    request: Request
    slot: int = -1
    num_cached: int = 0
    prefilled: int = 0
    limit: int = 0
    launched: int = 0
    tokens: list[int] = field(default_factory=list)
    keeps_slot: bool = False
    finish_reason: str | None = None

    @property
    def prompt_done(self) -> bool:
        return self.prefilled == len(self.request.prompt)

    @property
    def ended_in_step(self) -> bool:
        """Whether the device itself ended the answer, or nothing of it is under way: no later token was run.

        Recurrent state then stands after all tokens but the last, and can be gone on from.
        """
        return self.finish_reason in ("stop", "length") or self.launched == len(self.tokens)


@dataclass(frozen=True)
class TokenEvent:
    """One new token of a sequence. logprob: natural log of its probability before penalties and temperature.

    top: the most likely tokens with theirs, as many as the request asked for.

    finish_reason: ``stop`` (a stop token), ``length`` (max_tokens or the context is used up), or None while it goes on.
    """

    sequence: Sequence
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    finish_reason: str | None
