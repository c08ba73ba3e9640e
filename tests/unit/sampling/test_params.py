"""What a request may ask for, and what is refused."""

import dataclasses

import pytest

from ostinato.errors import SamplingError
from ostinato.sampling import SamplingParams


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"top_p": 1e-9, "min_p": 1.0, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1, "logprobs": 20, "stop": ("a", "b"), "logit_bias": {0: float("-inf")}},
    ],
    ids=str,
)
def test_takes_what_is_in_range(values: dict) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        assert getattr(params, name) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.01}, "top_p must be"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"min_p": -0.01}, "min_p must be"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be"),
        ({"presence_penalty": 2.1}, "presence_penalty must be"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be"),
        ({"seed": 2**63}, "seed must fit"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"stop": ("",)}, "stop strings must not be empty"),
        ({"logprobs": 21}, "logprobs must be"),
        ({"logit_bias": {-1: 1.0}}, "token id -1"),
        ({"logit_bias": {1: float("nan")}}, "not a number"),
    ],
    ids=str,
)
def test_refuses_what_is_not_in_one_line(values: dict, message: str) -> None:
    with pytest.raises(SamplingError, match=message) as raised:
        SamplingParams(**values)
    assert "\n" not in str(raised.value)


def test_is_frozen_and_takes_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3  # type: ignore[misc]  # the point of the test
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]  # the point of the test


def test_knows_when_tokens_must_be_counted() -> None:
    assert not SamplingParams().uses_penalties
    assert SamplingParams(repetition_penalty=1.1).uses_penalties
    assert SamplingParams(presence_penalty=-0.5).uses_penalties
    assert SamplingParams(frequency_penalty=0.5).uses_penalties
