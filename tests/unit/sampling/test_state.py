"""The host's side of the sampler: rows, and the ring."""

import pytest
import torch

from ostinato.errors import SamplingError
from ostinato.kernels.sample.buffers import PROMPT_BIT, RING_STEPS
from ostinato.sampling import SamplerState, SamplingParams


def test_a_row_is_rewritten_for_each_request() -> None:
    state = SamplerState.allocate(2, 20, "cpu")
    first = SamplingParams(temperature=0.5, top_k=7, repetition_penalty=1.5, logit_bias={4: 2.0}, seed=3, logprobs=2)
    assert state.set_row(1, first, [1, 1, 5], [8, 9]) == 3
    b = state.buffers
    assert b.floats[1].tolist() == [0.5, 1.0, 0.0, 1.5, 0.0, 0.0]
    assert b.ints[1].tolist() == [7, 1, 1, 2]
    assert b.stop_ids[1].tolist() == [8, 9] + [-1] * 14
    assert b.token_counts[1].nonzero().flatten().tolist() == [1, 5]
    assert b.token_counts[1, 5] == PROMPT_BIT
    assert b.logit_bias[1].tolist() == [0.0] * 4 + [2.0] + [0.0] * 15
    b.counter[1] = 17
    state.set_row(1, SamplingParams(seed=-5), [], [2])
    assert b.ints[1].tolist() == [0, 0, 0, 0]
    assert b.seed[1] == -5
    assert b.counter[1] == 0
    assert b.stop_ids[1].tolist() == [2] + [-1] * 15
    assert b.floats[0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0], "another row was touched"


def test_a_row_without_a_seed_gets_its_own() -> None:
    state = SamplerState.allocate(1, 20, "cpu")
    seeds = {state.set_row(0, SamplingParams(), []) for _ in range(20)}
    assert len(seeds) == 20
    assert int(state.buffers.seed[0]) in seeds


def test_a_large_top_k_means_all_tokens() -> None:
    state = SamplerState.allocate(1, 20, "cpu")
    state.set_row(0, SamplingParams(top_k=2**40), [])
    assert state.buffers.ints[0, 0] == 20


@pytest.mark.parametrize(
    ("params", "stop_ids", "message"),
    [
        (SamplingParams(), range(17), "at most 16 stop token ids"),
        (SamplingParams(logit_bias={20: 1.0}), [], "beyond the vocabulary of 20"),
    ],
)
def test_refuses_what_does_not_fit(params: SamplingParams, stop_ids: list[int], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        SamplerState.allocate(1, 20, "cpu").set_row(0, params, [], stop_ids)


def test_a_cancelled_row_draws_no_more() -> None:
    state = SamplerState.allocate(1, 20, "cpu")
    state.set_row(0, SamplingParams(), [])
    state.activate(0, 3, 0, 100)
    state.step(torch.zeros(1, 20))
    state.deactivate(0)
    state.step(torch.zeros(1, 20))
    assert state.read(0, 0).token is not None
    assert state.read(0, 1).token is None


def test_the_ring_keeps_its_last_steps_and_says_so() -> None:
    state = SamplerState.allocate(1, 20, "cpu")
    state.set_row(0, SamplingParams(seed=1), [])
    state.activate(0, 3, 0, 1000)
    for step in range(RING_STEPS + 1):
        assert state.read(0, step) is None
        state.step(torch.randn(1, 20))
        published = state.read(0, step)
        assert published.token == int(state.buffers.sampled[0])
        assert published.logprob == float(state.buffers.logprob[0])
    with pytest.raises(SamplingError, match="read the ring sooner"):
        state.read(0, 0)
