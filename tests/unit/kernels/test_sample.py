"""The sampler: noise against published values, the fast CPU path and the kernels against the reference, statistics."""

import numpy as np
import pytest
import torch

from ostinato.errors import KernelError
from ostinato.kernels.sample import SampleBuffers, sample_step
from ostinato.kernels.sample.noise import GUMBEL_MAX, GUMBEL_MIN, gumbel, philox
from ostinato.kernels.sample.ref import RowSettings, choose, choose_ref, penalize_ref, sample_step_ref
from ostinato.kernels.sample.triton import sample_step as kernel
from ostinato.sampling import SamplerState, SamplingParams

PLAIN = RowSettings(
    temperature=1.0, top_p=1.0, min_p=0.0, repetition=1.0, presence=0.0, frequency=0.0, top_k=0, seed=0, counter=0
)


def settings(**changes: float) -> RowSettings:
    return RowSettings(**(vars(PLAIN) | changes))


def test_philox_known_answers() -> None:
    """The known-answer vectors that Random123 publishes for philox4x32-10."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        words = philox((np.array([counter[0]]), *counter[1:]), key)
        assert tuple(int(word[0]) for word in words) == expected


def test_noise_is_gumbel_distributed_and_bounded() -> None:
    drawn = np.concatenate([gumbel(-1, draw, np.arange(100_000)) for draw in range(5)])
    assert drawn.min() >= GUMBEL_MIN - 1e-5
    assert drawn.max() <= GUMBEL_MAX + 1e-5
    # Mean and variance of 500,000 draws, within five standard errors.
    assert abs(drawn.mean() - np.euler_gamma) < 5 * np.sqrt(np.pi**2 / 6 / len(drawn))
    assert abs(drawn.var() - np.pi**2 / 6) < 5 * np.sqrt(4.4 * (np.pi**2 / 6) ** 2 / len(drawn))
    # Kolmogorov-Smirnov against exp(-exp(-g)): 1.95 / sqrt(n) is exceeded once in a thousand.
    at = np.sort(drawn)
    exact = np.exp(-np.exp(-at.astype(np.float64)))
    assert np.abs(exact - (np.arange(len(at)) + 0.5) / len(at)).max() < 1.95 / np.sqrt(len(at))


@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 0.001},
        {"min_p": 0.1},
        {"top_k": 50, "top_p": 0.7, "min_p": 0.02, "temperature": 1.4},
        {"top_p": 0.99, "min_p": 0.3, "temperature": 0.7},
    ],
    ids=str,
)
def test_fast_path_equals_reference(changes: dict, spread: float) -> None:
    rng = np.random.default_rng(0)
    for draw in range(8):
        logits = (rng.standard_normal(5000) * spread).astype(np.float32)
        logits[rng.integers(0, 5000, 50)] = np.round(logits[:50])  # ties
        row = settings(seed=draw - 4, counter=draw, **changes)
        assert choose(logits, row) == choose_ref(logits, row)


def chosen_distribution(logits: np.ndarray, **changes: float) -> np.ndarray:
    """Probabilities by the definitions, in float64, token by token."""
    row = settings(**changes)
    p = np.exp((logits - logits.max()).astype(np.float64) / row.temperature)
    if row.top_k:
        p[p < np.sort(p)[-row.top_k]] = 0
    order = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[order]) / p.sum()
    p[order[np.searchsorted(mass, row.top_p) + 1 :]] = 0
    p[p < row.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_frequencies_fit_the_probabilities(changes: dict) -> None:
    """Chi-square of 4,000 draws; the bound is exceeded about once in 3,000 such tests."""
    logits = np.random.default_rng(1).standard_normal(24).astype(np.float32) * 1.5
    p = chosen_distribution(logits, **changes)
    draws = 4000
    drawn = np.bincount([choose(logits, settings(seed=11, counter=i, **changes)) for i in range(draws)], minlength=24)
    assert drawn[p == 0].sum() == 0
    likely = p * draws >= 5
    expected = np.append(p[likely], p[~likely].sum()) * draws
    observed = np.append(drawn[likely], drawn[~likely].sum())
    used = expected > 0
    chi_square = ((observed - expected)[used] ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    assert chi_square < freedom + 3.4 * np.sqrt(2 * freedom) + 6


def test_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 3.0])
    counts = torch.tensor([1 << 24, (1 << 24) | 2, 3, 0, 0], dtype=torch.int32)  # prompt; prompt and twice; 3 times
    row = settings(repetition=2.0, frequency=0.5, presence=0.25)
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0, 0.0])
    expected = torch.tensor([2.0 / 2, -2.0 * 2 - 0.5 * 2 - 0.25, 1.0 / 2 - 0.5 * 3 - 0.25, 10.5, 3.0])
    torch.testing.assert_close(penalize_ref(logits, bias, counts, row), expected)


ROWS = [
    SamplingParams(temperature=0.0, logprobs=20),
    SamplingParams(temperature=0.8, seed=1, logprobs=0),
    SamplingParams(temperature=1.0, seed=2, top_k=5, top_p=0.95),
    SamplingParams(temperature=0.7, seed=-3, top_p=0.9, logprobs=3),
    SamplingParams(temperature=1.0, seed=4, min_p=0.05, repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingParams(temperature=1.5, seed=5, top_k=40, top_p=0.8),
    SamplingParams(temperature=1.5, seed=-(2**63), top_k=250),
    SamplingParams(temperature=1.0, seed=2**63 - 1, top_p=0.95, logit_bias={3: 4.0, 5: -100.0, 6: float("-inf")}),
    SamplingParams(temperature=2.0, seed=7, top_p=0.999, min_p=0.001),
]


def states(vocab: int, devices: tuple[object, ...], rows: list[SamplingParams] = ROWS) -> list[SamplerState]:
    made = []
    for device in devices:
        state = SamplerState.allocate(len(rows) + 1, vocab, device)
        for row, params in enumerate(rows):
            state.set_row(row, params, [1, 2, 3], [vocab - 1])
            state.activate(row, 5, 7, 5)
        made.append(state)
    return made


@pytest.mark.parametrize(("vocab", "sizes"), [(300, (64, 512, 512)), (257, (128, 32, 64)), (250, (64, 16, 16))])
def test_kernel_equals_reference(vocab: int, sizes: tuple[int, int, int], device: torch.device) -> None:
    """With scratch for all candidates, for some, and for few, where rows are searched in full."""
    chunk, small, capacity = sizes
    cpu, other = states(vocab, ("cpu", device))
    for step in range(2):
        logits = torch.randn(len(ROWS) + 1, vocab) * 2
        logits[0, 40] = logits[0, 50] = logits[0].max()  # greedy: the first of equals
        sample_step_ref(logits, None, *cpu.buffers.tensors())
        kernel(logits.to(device), None, *other.buffers.tensors(), chunk=chunk, small=small, capacity=capacity)
        for name in ("sampled", "tokens", "positions", "counter", "remaining", "active", "step", "token_counts"):
            expected, got = (getattr(state.buffers, name) for state in (cpu, other))
            assert torch.equal(expected, got.cpu()), (step, name)
        torch.testing.assert_close(other.buffers.logprob.cpu(), cpu.buffers.logprob, rtol=0, atol=1e-5)
        for row, params in enumerate(ROWS):
            if device.type == "cuda":
                torch.cuda.synchronize()
            expected, got = cpu.read(row, step), other.read(row, step)
            assert got is not None
            assert expected.token == got.token
            assert abs(expected.logprob - got.logprob) < 1e-5
            assert len(expected.top) == (0 if expected.token is None else params.logprobs or 0)
            assert [token for token, _ in expected.top] == [token for token, _ in got.top]
            assert all(abs(a - b) < 1e-5 for (_, a), (_, b) in zip(expected.top, got.top, strict=True))


def test_kernel_takes_rows_in_any_order_and_is_the_same_alone(device: torch.device) -> None:
    together, alone = states(300, (device, device))
    logits = torch.randn(len(ROWS), 300, device=device)
    order = torch.tensor([4, 1, 7, 2], dtype=torch.int32, device=device)
    kernel(logits[order.long()].contiguous(), order, *together.buffers.tensors(), chunk=64)
    for row in order.tolist():
        kernel(
            logits[row : row + 1],
            torch.tensor([row], dtype=torch.int32, device=device),
            *alone.buffers.tensors(),
            chunk=64,
        )
    for name in ("sampled", "tokens", "positions", "counter", "step"):
        assert torch.equal(getattr(together.buffers, name), getattr(alone.buffers, name)), name


@pytest.mark.parametrize("step", [sample_step_ref, kernel], ids=["reference", "kernel"])
def test_rows_stop_and_then_stand_still(step: object, device: torch.device) -> None:
    state = SamplerState.allocate(3, 50, device if step is kernel else "cpu")
    state.set_row(0, SamplingParams(temperature=0.0), [], [9, 11])
    state.activate(0, 1, 10, 100)
    state.set_row(1, SamplingParams(temperature=0.0), [])
    state.activate(1, 1, 20, 2)
    buffers = state.buffers
    for index, best in enumerate((4, 11, 6, 7)):
        logits = torch.zeros(3, 50, device=buffers.seed.device)
        logits[:, best] = 5.0
        step(logits, None, *buffers.tensors())
        if buffers.seed.is_cuda:
            torch.cuda.synchronize()
        assert state.read(0, index).token == (best if index < 2 else None)
        assert state.read(1, index).token == (best if index < 2 else None)
        assert state.read(2, index).token is None
        assert state.read(0, index + 1) is None
    assert buffers.active.tolist() == [0, 0, 0]
    assert buffers.tokens.tolist() == [11, 11, 0]
    assert buffers.positions.tolist() == [12, 22, 0]
    assert buffers.remaining.tolist() == [98, 0, 0]
    assert buffers.counter.tolist() == [2, 2, 0]
    assert buffers.step.tolist() == [4, 4, 4]
    assert buffers.sampled.tolist() == [-1, -1, -1]


def test_noise_is_fresh_each_step_and_repeats_with_the_seed() -> None:
    drawn = []
    for _ in range(2):
        state = SamplerState.allocate(1, 1000, "cpu")
        state.set_row(0, SamplingParams(seed=99), [])
        state.activate(0, 1, 0, 100)
        for _ in range(50):
            state.step(torch.zeros(1, 1000))
        drawn.append([state.read(0, step).token for step in range(50)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 45


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: sample_step(torch.zeros(2, 50, dtype=torch.float16), b), "float32 logits"),
        (lambda b: sample_step(torch.zeros(2, 49), b), "do not fit"),
        (lambda b: sample_step(torch.zeros(4, 50), b), "do not fit"),
        (lambda b: sample_step(torch.zeros(2, 50, device="meta"), b), "logits are on meta"),
        (lambda b: sample_step(torch.zeros(2, 50), b, torch.zeros(3, dtype=torch.int32)), "rows int32"),
    ],
)
def test_refuses_what_it_does_not_take(call: object, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call(SampleBuffers.allocate(3, 50, "cpu"))
