"""The compiled sampler against the reference, at real vocabularies, with the ring in pinned memory."""

import pytest
import torch

from ostinato.sampling import SamplerState, SamplingParams

ROWS = [
    SamplingParams(temperature=0.0, logprobs=20),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.0, seed=2, top_k=40, top_p=0.95),
    SamplingParams(temperature=0.7, seed=-3, top_p=0.9, logprobs=5),
    SamplingParams(temperature=1.0, seed=4, min_p=0.05, repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingParams(temperature=1.5, seed=5, top_k=2000),  # more than there are chunks: the search of the whole row
    SamplingParams(temperature=1.0, seed=6, top_p=0.95, logit_bias={3: 4.0, 5: -100.0}),
    SamplingParams(temperature=2.0, seed=7, top_p=0.999),
]


@pytest.mark.parametrize("vocab", [1000, 49152, 248320])
def test_steps_equal_the_reference(vocab: int) -> None:
    states = [SamplerState.allocate(len(ROWS) + 1, vocab, device) for device in ("cpu", "cuda")]
    for state in states:
        for row, params in enumerate(ROWS):
            state.set_row(row, params, [1, 2, 3], [vocab - 1])
            state.activate(row, 5, 7, 1000)
    for step in range(4):
        logits = torch.randn(len(ROWS) + 1, vocab) * 3
        states[0].step(logits)
        states[1].step(logits.cuda())
        torch.cuda.synchronize()
        for name in ("sampled", "tokens", "positions", "counter", "remaining", "active", "step", "token_counts"):
            cpu, gpu = (getattr(state.buffers, name) for state in states)
            assert torch.equal(cpu, gpu.cpu()), (step, name)
        torch.testing.assert_close(states[1].buffers.logprob.cpu(), states[0].buffers.logprob, rtol=0, atol=2e-5)
        for row, params in enumerate(ROWS):
            published = states[1].read(row, step)
            assert published is not None
            assert published.token == int(states[0].buffers.sampled[row])
            assert abs(published.logprob - float(states[0].buffers.logprob[row])) < 2e-5
            expected = states[0].read(row, step)
            assert len(expected.top) == (params.logprobs or 0)
            assert [token for token, _ in published.top] == [token for token, _ in expected.top]
            assert all(abs(a - b) < 2e-5 for (_, a), (_, b) in zip(published.top, expected.top, strict=True))
        assert states[1].read(len(ROWS), step).token is None
        assert states[1].read(0, step + 1) is None


def test_a_graph_draws_new_tokens_that_the_host_reads_without_cuda() -> None:
    state = SamplerState.allocate(2, 5000, "cuda")
    state.set_row(0, SamplingParams(temperature=1.0, seed=1), [])
    state.activate(0, 1, 0, 1_000_000)
    logits = torch.zeros(2, 5000, device="cuda")
    state.step(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.step(logits)
    drawn = []
    for step in range(1, 40):
        graph.replay()
        published = None
        while published is None:
            published = state.read(0, step)
        drawn.append(published.token)
    assert len(set(drawn)) > 30, "39 draws of 5000 tokens hardly repeat"
