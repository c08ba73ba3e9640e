"""What a request may ask of the sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ostinato.errors import SamplingError

MAX_LOGPROBS = 20


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SamplingError(message)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn. Raises SamplingError where a value is out of its range.

    temperature: ≥ 0; 0 (and anything under 1e-5) means the most likely token. top_k: keep the k most likely, 0 all.
    top_p: keep the smallest set of most likely tokens whose probability reaches it, 1 all. min_p: keep tokens at least
    this likely relative to the most likely one, 0 all. repetition_penalty: > 1 makes tokens of prompt and answer less
    likely. presence_penalty, frequency_penalty: subtracted once, or once per occurrence in the answer.
    seed: any int64; None draws one. max_tokens: longest answer. stop: strings that end the answer. ignore_eos: go on at
    an end-of-text token. logprobs: how many most likely tokens to report beside the drawn one; None reports nothing.
    logit_bias: added to the logit of a token id.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        t = self.temperature
        _require(math.isfinite(t) and t >= 0, f"temperature must be a number of at least 0, got {t}")
        _require(self.top_k >= 0, f"top_k must be at least 0 (0 turns it off), got {self.top_k}")
        _require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1 (1 turns it off), got {self.top_p}")
        _require(0 <= self.min_p <= 1, f"min_p must be from 0 (off) to 1, got {self.min_p}")
        r = self.repetition_penalty
        _require(math.isfinite(r) and r > 0, f"repetition_penalty must be above 0 (1 turns it off), got {r}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, f"{name} must be from -2 to 2, got {value}")
        s = self.seed
        _require(s is None or -(2**63) <= s < 2**63, f"seed must fit a signed 64-bit integer, got {s}")
        _require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        _require(all(self.stop), "stop strings must not be empty")
        n = self.logprobs
        _require(n is None or 0 <= n <= MAX_LOGPROBS, f"logprobs must be from 0 to {MAX_LOGPROBS}, got {n}")
        for token, bias in self.logit_bias.items():
            _require(token >= 0, f"logit_bias: token id {token} is negative")
            _require(not math.isnan(bias), f"logit_bias of token {token} is not a number")

    @property
    def uses_penalties(self) -> bool:
        """Whether tokens must be counted."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
